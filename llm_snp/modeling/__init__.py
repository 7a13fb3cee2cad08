"""Hugging Face classes for pruned models, one file per family.

A result that needs its class carries its family's file and those that this imports, in one (`bundle`).
Hence all import torch and transformers only, and each other: no other room.
"""
