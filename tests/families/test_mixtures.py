"""What is special about experts: which tokens they are measured and repaired on, and how they lie in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LENGTH, Prune, logits
from safetensors.torch import load_file
from tiny_models import BLOCKS, KNOWN, save_tiny, tiny_config
from transformers import AutoModelForCausalLM

from llm_snp.config import PruneConfig
from llm_snp.dense.checkpoint import Checkpoint
from llm_snp.dense.experts import Experts, routes
from llm_snp.dense.hub import load_config
from llm_snp.dense.skeleton import Skeleton, empty_model
from llm_snp.dense.stream import Stream
from llm_snp.dense.taps import Taps
from llm_snp.dense.whole import whole_model
from llm_snp.errors import CheckpointError, OptionError, UnsupportedModelError
from llm_snp.families import FAMILIES, family_of
from llm_snp.healing.pair import open_model
from llm_snp.pruning.calibrate import Reference, calibrate_block, calibrate_site
from llm_snp.pruning.order import TOKENS_PER_NEURON, scarcity
from llm_snp.running.preview import preview

MIXTURES = [name for name in KNOWN if FAMILIES[tiny_config(name).model_type].mixture is not None]
pytestmark = pytest.mark.skipif(not MIXTURES, reason="this transformers does not have experts as they are needed")


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    return save_tiny("mixtral", tmp_path / "mixtral")


def streamed(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    """The logits of a checkpoint of which one block is loaded at a time."""
    skeleton = opened(directory)
    stream = Stream(skeleton, ids)
    for index in range(BLOCKS):
        stream.advance(index, skeleton.load_block(index, skeleton.block_state(index)))
    with skeleton.outer_weights():
        return skeleton.leave(ids, stream.states)


def opened(directory: Path) -> Skeleton:
    config = load_config(directory)
    family = family_of(config)
    checkpoint = Checkpoint(directory, family.renames)
    return Skeleton(config, family.blocks, checkpoint, torch.device("cpu"), torch.float32)


def moved(block: Any, by: float) -> Any:
    """The block with other experts, routed to as before."""
    generator = torch.Generator().manual_seed(1)
    for expert in block.mlp.experts:
        weight = expert.down_proj.weight
        expert.down_proj.weight = torch.nn.Parameter(weight + by * torch.randn(weight.shape, generator=generator))
    return block


def other(name: str, fields: dict[str, Any]) -> Any:
    """A tiny config with other fields."""
    config = tiny_config(name)
    return type(config)(**(config.to_dict() | fields))


def keys(directory: Path) -> set[str]:
    return {key for file in directory.glob("*.safetensors") for key in load_file(file)}


def test_a_config_names_no_kernels_of_the_hub(tmp_path: Path) -> None:
    """transformers would fetch them, and run them where a whole model is loaded."""
    directory = save_tiny("mixtral", tmp_path / "model")
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"experts_implementation": "deepgemm"}))
    config = load_config(directory)
    if not hasattr(config, "_experts_implementation"):
        pytest.skip("this transformers knows no kernels of experts")
    assert config._experts_implementation == "deepgemm"
    model = whole_model(directory, config, None, CheckpointError)
    assert model.config._experts_implementation != "deepgemm"


def test_moments_are_weighted_by_the_squared_routing_weight(mixtral: Path, ids: torch.Tensor) -> None:
    """By hand, with the stock model: of h, over the tokens routed to the expert, divided by all tokens."""
    skeleton = opened(mixtral)
    site = family_of(skeleton.config).sites(skeleton.config, 0)[-1]
    block, stream = skeleton.load_block(0, skeleton.block_state(0)), Stream(skeleton, ids[:, :LENGTH])
    found = calibrate_block(0, block, stream, (site,))
    stock = AutoModelForCausalLM.from_pretrained(mixtral).eval().model.layers[0].mlp
    with torch.no_grad(), Taps(block, ["mlp"]) as taps:
        for _, hidden, call in stream.batches(0):
            block(hidden, **call.kwargs)
        x = taps.input("mlp").double()
    _, weights, picked = stock.gate.double()(x)
    for member, (tokens, places) in zip(site.members, routes(picked, site.experts), strict=True):
        gate, up = (x[tokens] @ stock.experts.gate_up_proj[member.expert].double().mT).chunk(2, -1)
        h, p = torch.nn.functional.silu(gate) * up, weights[tokens, places, None].double()
        expected = (h * p.square()).mT @ h / len(x)
        torch.testing.assert_close(found[member.name].covariance, expected, rtol=1e-4, atol=1e-7)
        assert found[member.name].rows == len(tokens) < found[member.name].tokens == len(x)


def test_experts_share_what_is_to_be_corrected(mixtral: Path, ids: torch.Tensor) -> None:
    """By their weights for the token: together they are told all of it, once."""
    skeleton = opened(mixtral)
    site = family_of(skeleton.config).sites(skeleton.config, 0)[-1]
    dense, block = (skeleton.load_block(0, skeleton.block_state(0)) for _ in range(2))
    stream = Stream(skeleton, ids[:, :LENGTH])
    outputs = []
    for other in (dense, moved(block, 0.1)):
        with torch.no_grad(), Taps(other, outputs=["mlp"]) as taps:
            for _, hidden, call in stream.batches(0):
                other(hidden, **call.kwargs)
        outputs.append(taps.output("mlp"))
    found = calibrate_site(0, block, stream, site, Reference(dense, stream.copy(), residual=True), hold_out=False)
    told = torch.stack([one.fit.residual for one in found if one.fit.residual is not None]).sum(0)
    torch.testing.assert_close(told, (outputs[0] - outputs[1]).double().sum(0), rtol=1e-4, atol=1e-4)
    held = calibrate_site(0, block, stream, site, Reference(dense, stream.copy(), residual=True), hold_out=True)
    for whole, parts in zip(found, held, strict=True):
        assert parts.held is not None
        assert parts.all.rows == whole.fit.rows
        assert parts.all.tokens == whole.fit.tokens
        torch.testing.assert_close(parts.all.covariance, whole.fit.covariance)


def test_an_expert_without_a_token() -> None:
    """It is called all the same, and gives nothing."""
    config = tiny_config("mixtral")
    experts = empty_model(config).model.layers[0].mlp.experts.to_empty(device="cpu")
    assert isinstance(experts, Experts)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.fill_(0.1)
    hidden, picked = torch.randn(6, config.hidden_size), torch.tensor([[0, 2]] * 6)
    with torch.no_grad(), Taps(experts, ["1.down_proj", "2.down_proj"]) as taps:
        output = experts(hidden, picked, torch.full((6, 2), 0.5))
    assert taps.input("1.down_proj").shape == (0, config.intermediate_size)
    assert taps.input("2.down_proj").shape == (6, config.intermediate_size)
    assert output.shape == hidden.shape


@pytest.mark.parametrize("name", MIXTURES)
def test_files_are_those_that_transformers_writes(
    name: str, prune: Prune, tmp_path: Path, ids: torch.Tensor, text: Path
) -> None:
    """Tensor by tensor, for the stock class, which makes up none, and computes what was measured."""
    directory = save_tiny(name, tmp_path / name)
    report = prune(directory, tmp_path / "out", 0.2, format="stock", samples=8)
    assert keys(tmp_path / "out") == keys(directory)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    mixture = FAMILIES[model.config.model_type].mixture
    assert mixture is not None
    assert getattr(model.config, mixture.neurons) == report["plan"]["kept"][0]["neurons"] < 96
    found = streamed(tmp_path / "out", ids[:, :LENGTH])
    torch.testing.assert_close(found, logits(model, ids[:, :LENGTH]), rtol=1e-4, atol=1e-4)


def test_each_expert_keeps_neurons_of_its_own_choice(mixtral: Path, prune: Prune, tmp_path: Path) -> None:
    """As many as the others of its block, a multiple of 8; and those that saw few tokens are named."""
    report = prune(mixtral, tmp_path / "out", 0.4, samples=8, attention="none", target="none", allocation="uniform")
    dense, pruned = (opened(path).block_state(0) for path in (mixtral, tmp_path / "out"))
    kept = report["plan"]["kept"][0]["neurons"]
    choices = []
    for expert in range(4):
        name = f"mlp.experts.{expert}.gate_proj.weight"
        rows = (pruned[name][:, None] == dense[name]).all(-1).nonzero()[:, 1]
        assert len(rows) == kept < 96
        choices.append(tuple(rows.tolist()))
    assert kept % 8 == 0
    assert len(set(choices)) == 4
    note = next(note for note in report["notes"] if note.startswith("block 0 mlp: 4 experts"))
    assert f"saw fewer than {TOKENS_PER_NEURON} tokens per neuron, for which the damping was raised: " in note
    assert sum("singular" in note for note in report["notes"]) == 0


def test_an_expert_is_damped_for_what_it_did_not_see(mixtral: Path, ids: torch.Tensor) -> None:
    skeleton = opened(mixtral)
    attention, experts = family_of(skeleton.config).sites(skeleton.config, 0)
    block, stream = skeleton.load_block(0, skeleton.block_state(0)), Stream(skeleton, ids[:, :LENGTH])
    found = calibrate_block(0, block, stream, (attention, experts))
    assert scarcity(attention, found[attention.name]) == 1
    for member in experts.members:
        assert scarcity(member, found[member.name]) == TOKENS_PER_NEURON * 96 / found[member.name].rows > 1
        found[member.name].rows = TOKENS_PER_NEURON * 96
        assert scarcity(member, found[member.name]) == 1


def test_what_is_refused(mixtral: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"layers is not possible for mixtures of experts, .* leave it out"):
        preview(PruneConfig(model=str(mixtral), structures="layers", output=str(tmp_path / "out")))
    with pytest.raises(UnsupportedModelError, match=r"is a mixture of experts \(mixtral\), .* but not healed"):
        open_model(mixtral)
    for fields, said in (
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5 in config.json, but there are 4 experts"),
        ({"num_local_experts": 0, "num_experts_per_tok": 0}, "num_local_experts is 0 in config.json"),
    ):
        config = other("mixtral", fields)
        with pytest.raises(UnsupportedModelError, match=said):
            family_of(config)
    config = other("olmoe", {"clip_qkv": 8.0})
    with pytest.raises(UnsupportedModelError, match=r"clip_qkv is 8\.0 in config\.json: .* nothing of its attention"):
        family_of(config)
    config = other("qwen3_moe", {"decoder_sparse_step": 9})
    with pytest.raises(UnsupportedModelError, match=r"of which no block has any \(decoder_sparse_step 9, 0 mlp_only"):
        family_of(config)
    config = other("qwen2_moe", {"decoder_sparse_step": 0})
    with pytest.raises(UnsupportedModelError, match=r"decoder_sparse_step is 0 in config\.json; it must be a whole"):
        family_of(config)
    config = tiny_config("mixtral")
    config.num_local_experts = 100_000
    with pytest.raises(UnsupportedModelError, match="a model of 300000 experts, and no model has more than 100000"):
        empty_model(config)
