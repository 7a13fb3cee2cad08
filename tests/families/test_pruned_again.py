"""What every family must keep when a model is pruned that was pruned before: its description is of what is left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Prune, Shell, load, logits
from pruned_models import save_pruned
from test_families import DIRECTIONS, QUERIES, WHOLE_HEADS, duplicated, half_of_no_use
from tiny_models import KNOWN, tiny_config
from torch import nn

from llm_snp.dense.hub import load_config
from llm_snp.dense.skeleton import empty_model, linear_blocks
from llm_snp.dense.whole import whole_model
from llm_snp.errors import CheckpointError
from llm_snp.families import ATTENTION, FAMILIES, Family, family_of

EXACT = {"target": "self", "allocation": "uniform", "damping": 1e-8, "samples": 48}


def parent(name: str, directory: Path, queries: bool = False) -> tuple[Any, Family]:
    """A pruned model with a whole block, one with fewer heads, and one whose heads lost directions, or query heads.

    Every head has other rotary pairs left.
    """
    config = tiny_config(name)
    family, attention = family_of(config), family_of(config).attention(config)
    units = {site.unit: site.units for site in family.sites(config)}
    inside = {} if attention is None else {unit: count // 2 for unit, (_, count) in attention.directions.items()}
    if queries:
        inside = {"queries": units["heads"] * 3 // 2}
    kept = [
        {},
        {"neurons": units["neurons"] // 2} | ({"heads": units["heads"] // 2} if family.whole_heads else {}),
        {"neurons": 12} | inside,
    ]
    model = save_pruned(name, kept, directory)
    generator = torch.Generator().manual_seed(5)
    for buffer, table in model.named_buffers():
        if buffer.endswith("pair_table") and attention is not None:
            for row in table:
                row.copy_(torch.randperm(attention.score_units, generator=generator)[: len(row)].sort().values)
        if buffer.endswith("readers"):
            table.copy_(torch.tensor([0, 0, 1, 2, 2, 3]))
    return model, family


@pytest.mark.parametrize("name", KNOWN)
def test_the_description_is_of_the_blocks_that_are_left(name: str, tmp_path: Path) -> None:
    """Every linear layer has one role, every row of it one part, and `narrow` gives these blocks of whole ones."""
    model, family = parent(name, tmp_path)
    config = model.config
    blocks, _ = linear_blocks(empty_model(config), family.blocks)
    whole, _ = linear_blocks(empty_model(family.dense_config(config)), family.blocks)
    for index, block in enumerate(blocks):
        sites = family.sites(config, index)
        layers = [layer for site in sites for layer in site.layers]
        linears = {path for path, layer in block.named_modules() if isinstance(layer, nn.Linear)}
        assert sorted(layers) == sorted(path for path in linears if not path.endswith("shared_expert_gate"))
        for site in sites:
            assert block.get_submodule(site.consumer).in_features == site.units * site.group
            for layer in site.layers[:-1]:
                rows = [rows.of(site.units).flatten() for rows in site.producers if rows.layer == layer]
                count = block.get_submodule(layer).out_features
                if rows and site.name != ATTENTION:
                    assert torch.cat(rows).sort().values.tolist() == list(range(count))
                assert all(part.max() < count for part in rows)
        family.pruned_class.narrow(whole[index], **family.widths(config, {}, index))
        assert {k: v.shape for k, v in whole[index].state_dict().items()} == {
            k: v.shape for k, v in block.state_dict().items()
        }


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, "heads") for name in WHOLE_HEADS]
    + [(name, "dims") for name in ("opt", "llama-tied", "qwen3", "phi3", "gpt_neox", "olmo2") if name in DIRECTIONS]
    + [(name, "queries") for name in ("llama", "phi3") if name in QUERIES],
)
def test_what_is_of_no_use_goes_without_loss(
    name: str, mode: str, prune: Prune, tmp_path: Path, ids: torch.Tensor
) -> None:
    model, family = parent(name, tmp_path / "parent", queries=mode == "queries")
    model = half_of_no_use(model) if mode == "dims" else duplicated(model, family)
    if mode == "queries":
        with torch.no_grad():  # the query heads 0 and 1, and 3 and 4, read one key/value head each
            query = model.get_submodule(f"{family.blocks}.2.self_attn.{'qkv' if name == 'phi3' else 'q'}_proj").weight
            query[4:8], query[16:20] = query[:4].clone(), query[12:16].clone()
    model.save_pretrained(tmp_path / "parent")
    sparsity = {"heads": 0.3, "dims": 0.25, "queries": 0.2}[mode]
    report = prune(tmp_path / "parent", tmp_path / "out", sparsity, attention=mode, **EXACT)
    assert report["sparsity"]["achieved"] == pytest.approx(sparsity, abs=0.06)
    before, after = logits(load(tmp_path / "parent"), ids), logits(load(tmp_path / "out"), ids)
    assert (after - before).square().mean() < 1e-6 * before.square().mean()
    assert report["model"]["type"] in FAMILIES


@pytest.mark.parametrize(
    ("ending", "change"),
    [
        ("pair_table", lambda table: table + 1000),
        ("pair_table", lambda table: table - 1),
        ("pair_table", lambda table: table.flip(1)),
        ("readers", lambda table: table + 1000),
        ("readers", lambda table: table.flip(0)),
        ("readers", lambda table: table * 0),
    ],
)
def test_tables_with_numbers_they_cannot_have(
    shell: Shell, tmp_path: Path, ending: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """A stranger's: on a GPU an index out of range ends all that the process can do."""
    directory = tmp_path / "parent"
    model, family = parent("llama-tied", directory, queries=ending == "readers")
    for buffer, table in model.named_buffers():
        if buffer.endswith(ending):
            table.copy_(change(table.clone()))
    model.save_pretrained(directory)
    for given in ((), ("--calibration", "self")):
        said = shell.refused(directory, *given)
        assert said.startswith(f"{family.blocks}.2.self_attn.{ending} in the weights has other numbers than those of 4")
    with pytest.raises(CheckpointError, match="in the weights has other numbers"):
        whole_model(directory, load_config(directory), None, CheckpointError)


@pytest.mark.parametrize("value", [False, None])
def test_the_dense_model_s_fields_beside_those_of_each_block(
    prune: Prune, dense: Path, tmp_path: Path, value: Any
) -> None:
    """Some transformers refuse to tell them unless that is allowed, and a stranger's config need not allow it."""
    prune(dense, tmp_path / "parent", 0.3, attention="dims")
    file = tmp_path / "parent" / "config.json"
    fields = json.loads(file.read_text())
    assert fields["per_layer_config"]
    file.write_text(json.dumps(fields | {"allow_global_per_layer_attribute_access": value}))
    prune(tmp_path / "parent", tmp_path / "out", 0.2)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["allow_global_per_layer_attribute_access"] is True
