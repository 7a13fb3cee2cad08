"""The numerics of subspace node pruning: torch only; no transformers, no block, no file.

Letters: d rows of the consumer, m its columns, u units, g columns per unit, k kept units, n calibration tokens.

May import errors only.
"""
