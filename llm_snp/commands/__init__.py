"""What can be typed after `python -m llm_snp`: one module per command, found by its name.

May import every other room.
"""
