"""What people read about a result: report, model card, page and plots, all of it made from the report alone.

May import evaluation, pruning, and what is below them.
"""
