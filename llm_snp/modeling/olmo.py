"""OLMo with a width of its own for every decoder block."""

from __future__ import annotations

from transformers import OlmoConfig, OlmoForCausalLM, OlmoModel

from .narrowing import Narrowed, narrow_llama_block


class SnpOlmoConfig(OlmoConfig):  # type: ignore[misc]
    """OLMo with `block_widths`, a dict of what is left of each block: `heads` (of keys) and `neurons`.

    All other fields describe the dense model.
    """

    model_type = "snp_olmo"
    block_widths = None


class SnpOlmoModel(Narrowed, OlmoModel):  # type: ignore[misc]
    """`OlmoModel`, the model without its head, with the widths of `config.block_widths`."""

    config_class = SnpOlmoConfig
    blocks_path = "layers"
    narrow = staticmethod(narrow_llama_block)


class SnpOlmoForCausalLM(Narrowed, OlmoForCausalLM):  # type: ignore[misc]
    """`OlmoForCausalLM` whose blocks have the widths of `config.block_widths`."""

    config_class = SnpOlmoConfig
    base_class = SnpOlmoModel
    blocks_path = "model.layers"
    narrow = staticmethod(narrow_llama_block)
