"""Hugging Face classes for pruned models, one file per family.

A result that needs its class carries its family's file and those that this imports, in one (`bundle`).
Hence all import torch and transformers only, and each other: no other room. Those that are `llama.py` with other names
are written by `make families` (`families/llama_like.py`).
"""
