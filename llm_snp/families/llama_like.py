"""The families that are built like Llama, a row for each: to add one, add a row and run `make families`.

Their blocks have the layers of Llama under the same names. Biases, norms and masks may differ: pruning leaves them as
they are. From a row come the `Family` (`LlamaLike.family`) and the file `modeling/NAME.py`: that of Llama with other
names and a few more lines, written by `docs/families.py`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from .attention import PAIRS, WHOLE, Attention, Shape, head_width
from .base import Counted, Family, field
from .grouped import check, check_mixture, grouped_heads, rotary
from .mixture import Mixture, mlps
from .sites import Site


@dataclass(frozen=True)
class LlamaLike:
    """What is different about a family whose blocks are Llama's.

    model_type     of the dense config
    classes        how the names of its classes in transformers begin
    about          what it is, for the table of models
    title          what it is called in the docstrings of its file; None: as its classes
    text_classes   how those of its config and its model without the head begin; None: as the others
    name           of its folder in `transformers.models` and its file in `modeling`; None: its model type
    since          the first transformers with which it works; None: every one that is supported and has it
    normed         what the norms of query and key go over, if there are any: a "head" needs all of its directions, and
                   of heads that are normed together ("all heads") none can go
    output_normed  whether what a layer gives is normed before it joins the residual stream
    counts_heads   whether the stock class takes another number of heads once their width is given
    heads_divide   whether that number, of query heads, has to divide the model's width all the same
    mixture        where its config has the sizes of experts; None: its blocks have one MLP each
    renames, stored  as in `Family`
    hands_on       code of what its attention tells attention functions besides the scaling; None: nothing
    """

    model_type: str
    classes: str
    about: str
    title: str | None = None
    text_classes: str | None = None
    name: str | None = None
    since: str | None = None
    normed: Literal["head", "all heads"] | None = None
    output_normed: bool = False
    counts_heads: bool = False
    heads_divide: bool = False
    hands_on: str | None = None
    mixture: Mixture | None = None
    renames: tuple[tuple[str, str], ...] = ()
    stored: tuple[tuple[str, str], ...] = ()

    @property
    def file(self) -> str:
        """The module of `modeling` that has its classes, and its folder in `transformers.models`."""
        return self.name or self.model_type

    def family(self) -> Family:
        """The description, with its classes. Raises `ImportError` if the installed transformers has none such."""
        modeling = importlib.import_module(f"..modeling.{self.file}", __package__)
        neurons = self.mixture.stock if self.mixture else {"neurons": field("intermediate_size")}
        heads: dict[str, Counted] = {}
        if self.counts_heads:
            heads["heads"] = partial(_fewer_heads, divide=self.heads_divide)
        return Family(
            model_type=self.model_type,
            blocks="model.layers",
            layout=partial(_sites, output_normed=self.output_normed),
            inside=partial(_attention, scores=PAIRS if self.normed is None else WHOLE),
            whole_heads=self.normed != "all heads",
            pruned_class=getattr(modeling, f"Snp{self.classes}ForCausalLM"),
            stock=neurons | heads,
            check=partial(check_mixture, self.mixture) if self.mixture else check,
            mixture=self.mixture,
            renames=self.renames,
            stored=self.stored,
        )


def _sites(config: Any, shape: Shape, output_normed: bool) -> tuple[Site, ...]:
    streams = (None, None) if output_normed else ("input_layernorm", "post_attention_layernorm")
    return (grouped_heads(config, shape, "o_proj", streams[0]), *mlps(shape, streams[1]))


def _attention(config: Any, shape: Shape, scores: str) -> Attention | None:
    # Clipped queries, keys and values (OLMo) are tied to their dimensions.
    return None if getattr(config, "clip_qkv", None) is not None else rotary(config, shape, scores)


def _fewer_heads(config: Any, heads: int, index: int | None, divide: bool) -> dict[str, int] | None:
    """For `Family.stock`."""
    keys = config.num_key_value_heads
    counts = (1, heads) if keys == 1 else (heads, heads * (config.num_attention_heads // keys))
    if divide and config.hidden_size % counts[1]:
        return None
    return {"num_key_value_heads": counts[0], "num_attention_heads": counts[1], "head_dim": head_width(config)}


WINDOW = '{"sliding_window": self.sliding_window}'

ROWS = (
    LlamaLike(
        model_type="llama",
        classes="Llama",
        about="Llama: grouped queries, a gated MLP, rotary positions",
        counts_heads=True,
        heads_divide=True,
    ),
    LlamaLike(
        model_type="mistral",
        classes="Mistral",
        about="Mistral 7B and models of the same architecture",
        counts_heads=True,
        hands_on='{"sliding_window": getattr(self.config, "sliding_window", None)}',
    ),
    LlamaLike(
        model_type="qwen2",
        classes="Qwen2",
        about="Qwen2 and Qwen2.5: biases in query, key and value",
        counts_heads=True,
        hands_on='{"sliding_window": getattr(self, "sliding_window", None)}',
    ),
    LlamaLike(
        model_type="qwen3",
        classes="Qwen3",
        about="Qwen3: norms of queries and keys, shared by all heads",
        since="4.51",
        normed="head",
        counts_heads=True,
        hands_on=WINDOW,
    ),
    LlamaLike(
        model_type="gemma",
        classes="Gemma",
        about="Gemma (1)",
        counts_heads=True,
    ),
    LlamaLike(
        model_type="gemma2",
        classes="Gemma2",
        about="Gemma 2: what a layer gives is normed before it joins the residual stream",
        title="Gemma 2",
        since="4.56",  # before, a KV cache had one shape for all blocks
        output_normed=True,
        counts_heads=True,
        heads_divide=True,
        hands_on='{"sliding_window": self.sliding_window, "softcap": self.attn_logit_softcapping}',
    ),
    LlamaLike(
        model_type="gemma3_text",
        classes="Gemma3",
        about="Gemma 3, text only: what a layer gives is normed before it joins the residual stream",
        title="Gemma 3 (text)",
        text_classes="Gemma3Text",
        name="gemma3",
        since="4.56",  # as Gemma 2
        normed="head",
        output_normed=True,
        counts_heads=True,
        heads_divide=True,
        hands_on=WINDOW,
    ),
    LlamaLike(
        model_type="olmo",
        classes="Olmo",
        about="OLMo: norms without weights",
        title="OLMo",
    ),
    LlamaLike(
        model_type="olmo2",
        classes="Olmo2",
        about="OLMo 2: one norm for all query heads and one for all keys; what a layer gives is normed, too",
        title="OLMo 2",
        normed="all heads",
        output_normed=True,
    ),
    LlamaLike(
        model_type="olmo3",
        classes="Olmo3",
        about="OLMo 3: as OLMo 2, with windows in some blocks",
        title="OLMo 3",
        since="4.57",
        normed="all heads",
        output_normed=True,
        hands_on=WINDOW,
    ),
    LlamaLike(
        model_type="mixtral",
        classes="Mixtral",
        about="Mixtral 8x7B and 8x22B: a mixture of experts",
        since="5.0",  # before, each expert was a module of its own
        counts_heads=True,
        hands_on='{"sliding_window": getattr(self.config, "sliding_window", None)}',
        mixture=Mixture(experts="num_local_experts"),
        renames=(
            (r"\.block_sparse_moe\.", ".mlp."),
            (r"\.mlp\.experts\.(\d+)\.w1\.", r".mlp.experts.\1.gate_proj."),
            (r"\.mlp\.experts\.(\d+)\.w3\.", r".mlp.experts.\1.up_proj."),
            (r"\.mlp\.experts\.(\d+)\.w2\.", r".mlp.experts.\1.down_proj."),
        ),
        stored=(
            (r"\.mlp\.", ".block_sparse_moe."),
            (r"(\.experts\.\d+)\.gate_proj\.", r"\1.w1."),
            (r"(\.experts\.\d+)\.up_proj\.", r"\1.w3."),
            (r"(\.experts\.\d+)\.down_proj\.", r"\1.w2."),
        ),
    ),
    LlamaLike(
        model_type="qwen2_moe",
        classes="Qwen2Moe",
        about="Qwen2-MoE and Qwen1.5-MoE: a mixture of experts beside an MLP for all tokens",
        title="Qwen2-MoE",
        since="5.0",  # as Mixtral
        mixture=Mixture(
            neurons="moe_intermediate_size",
            shared="shared_expert_intermediate_size",
            dense="intermediate_size",
            divided="norm_topk_prob",
        ),
    ),
    LlamaLike(
        model_type="qwen3_moe",
        classes="Qwen3Moe",
        about="Qwen3-MoE: a mixture of experts, with the attention of Qwen3",
        title="Qwen3-MoE",
        since="5.0",  # as Mixtral
        normed="head",
        counts_heads=True,
        hands_on=WINDOW,
        mixture=Mixture(neurons="moe_intermediate_size", dense="intermediate_size", divided="norm_topk_prob"),
    ),
    LlamaLike(
        model_type="olmoe",
        classes="Olmoe",
        about="OLMoE: a mixture of experts; one norm for all query heads and one for all keys",
        title="OLMoE",
        since="5.0",  # as Mixtral
        normed="all heads",
        mixture=Mixture(divided="norm_topk_prob"),
    ),
)
LLAMA_LIKE = {row.model_type: row for row in ROWS}
