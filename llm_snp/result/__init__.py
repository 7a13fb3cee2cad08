"""The smaller checkpoint: its shards, config and code are written here, read back, published, and exported.

May import documents, evaluation, pruning and what is below them.
"""
