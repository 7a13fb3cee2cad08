"""The machine: processes, files, interruption, progress, devices. Knows nothing of models.

May import errors only.
"""
