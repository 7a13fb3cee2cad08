"""Healing: a result is trained for a short while to predict what its dense teacher predicts, and written anew.

Training is transformers' `Trainer`, LoRA is peft's. May import result and what is below it.
"""
