"""Hugging Face classes for pruned models, one file per family.

A result that needs its class carries a copy of its family's file, and of `narrowing.py`; hence both import torch and
transformers only, and each other.
"""
