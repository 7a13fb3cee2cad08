"""The model and the text that come in: checkpoint, skeleton, hidden states on their way through the blocks.

May import families, core and system.
"""
