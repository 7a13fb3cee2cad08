"""Makes the pruned model classes known to transformers' Auto classes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from .modeling_snp import SnpOPTConfig, SnpOPTForCausalLM


def register_auto_classes() -> None:
    """Register every class of `modeling_snp`; doing it again is harmless."""
    AutoConfig.register(SnpOPTConfig.model_type, SnpOPTConfig, exist_ok=True)
    AutoModelForCausalLM.register(SnpOPTConfig, SnpOPTForCausalLM, exist_ok=True)
