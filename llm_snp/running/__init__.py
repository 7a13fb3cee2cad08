"""A whole run, from options to a finished result: preview, the run, going on after an interruption, what follows it.

May import everything but commands.
"""
