"""The method applied to live blocks: calibrate, order, allocate, repair, advance.

May import dense, families, core and system.
"""
