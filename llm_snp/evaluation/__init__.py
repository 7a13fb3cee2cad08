"""What is left of a model: perplexity (streamed or loaded), speed, tasks of lm-evaluation-harness.

May import pruning and what is below it.
"""
