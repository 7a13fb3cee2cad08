"""What a run is about: options resolved, model and output found, everything checked that needs no weights."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import EXPERT_ORDERS, METHODS, ORDERS, PruneConfig, judged_attention
from ..dense.hub import EMBEDDED, load_config, locate
from ..errors import CheckpointError, OptionError, OutputError, first_line
from ..families import EXPERTS, SHARED, Family, Site, family_of
from ..system.device import resolve_device
from ..system.plain import encodable
from ..system.private import public_name
from .kinds import sites_of
from .plan import check_order

# Of all blocks together. The largest models there are have a fifth of that.
MOST_UNITS = 2**25


@dataclass(frozen=True)
class Job:
    """options: resolved; directory: of the model; config: its transformers config; whole: that of the dense model whose
    blocks have widths of their own by now, or the same; length: tokens per window.
    """

    options: PruneConfig
    directory: Path
    config: Any
    whole: Any
    family: Family
    output: Path
    device: torch.device
    length: int

    def sites(self, index: int) -> tuple[Site, ...]:
        """What is pruned in a block."""
        return sites_of(self.family, self.config, self.options, index)

    @property
    def from_hub(self) -> bool:
        """Whether the model was a repository on the Hub; a local directory may look like the name of one."""
        model = self.options.model
        return model is not None and self.directory != Path(os.path.expanduser(model))


def open_job(options: PruneConfig, weights: bool, local_index: int = 0) -> Job:
    """Resolve and check `options`; `weights` False fetches a model's config only. Raises `SnpError`.

    local_index: of this process among those on its machine; it takes the GPU of that number.
    """
    options.validate()
    if options.revision and (options.model is None or os.path.isdir(os.path.expanduser(options.model))):
        raise OptionError("--revision is for models on the Hub, and this one is a local directory; leave it out")
    directory = locate(options.model, options.revision, weights)
    config = load_config(directory)
    family = family_of(config)
    check_units(family, config)
    pruned = getattr(config, "block_widths", None) is not None
    if not pruned:
        config.architectures = family.architectures  # what a stranger has written there a stock result would have
    whole = family.dense_config(config) if pruned else config
    options = fit_for_format(options, family)
    check_format(options, family, config)
    options = fitted(options.resolved(), family, config)
    output = output_of(options)
    device = resolve_device(options.device, local_index)
    return Job(options, directory, config, whole, family, output, device, window_length(options, config))


def check_units(family: Family, config: Any) -> None:
    """Raise `CheckpointError` for more units than any model has: a plan has a few numbers of each.

    A run holds the config against the weights, but --dry-run has none.
    """
    count = 0
    for index in range(config.num_hidden_layers):
        attention = family.attention(config, index)
        count += sum(site.units for site in family.sites(config, index))
        count += sum(units for _, units in attention.directions.values()) if attention is not None else 0
    if count > MOST_UNITS:
        raise CheckpointError(
            f"config.json describes a model whose blocks have {count:,} neurons, heads and directions in these, and "
            f"no model has more than {MOST_UNITS:,}; are its widths right?"
        )


def fitted(options: PruneConfig, family: Family, config: Any) -> PruneConfig:
    """The choices that a model leaves; `options`: resolved. Raises `OptionError` for one that it cannot have."""
    options = fit_for_heads(options, family, config)
    check_structures(options, config)
    options = fit_for_experts(for_layers(options), family)
    check_order(family, config, options)
    return options


def for_layers(options: PruneConfig) -> PruneConfig:
    """Where layers go as a whole, what is inside an attention does not matter; `options`: resolved."""
    if options.structures != "layers" or options.attention == "none":
        return options
    return dataclasses.replace(options, attention="heads")


def check_structures(options: PruneConfig, config: Any) -> None:
    """Raise `OptionError` where layers cannot go as a whole; `options`: resolved."""
    if options.structures == "units":
        return
    given = "--method everything" if options.in_steps else f"--structures {options.structures}"
    if family_of(config).mixture is not None:
        raise OptionError(
            f"{given} is not possible for mixtures of experts, where an MLP layer is many experts; leave it out: "
            "neurons of all of them go"
        )
    if options.allocation != "loss":
        raise OptionError(
            f"{given} and --allocation {options.allocation} exclude each other: which layers go the measured loss "
            "decides; give --allocation loss"
        )
    if options.whole_blocks and options.attention == "none":
        raise OptionError(
            "--structures layers takes whole blocks with this --format, and --attention none leaves the attention as "
            "it is; leave one of them out"
        )
    if getattr(config, "use_sliding_window", None) and not getattr(config, "layer_types", None):
        raise OptionError(
            f"{given}: this transformers tells from a block's number whether it has a window, and blocks would get "
            "other numbers; install a newer one"
        )
    if getattr(config, "scale_attn_by_inverse_layer_idx", None):
        raise OptionError(
            f"{given} is not possible where an attention's scores are divided by its block's number "
            "(scale_attn_by_inverse_layer_idx), because blocks would get other numbers; leave it out: units of all "
            "blocks go"
        )


def fit_for_experts(options: PruneConfig, family: Family) -> PruneConfig:
    """Where whole experts cannot be compared with neurons, `both` means neurons, and nothing where there are none.

    options: resolved.

    Raises `OptionError` for `whole` where they cannot, and for an order that ranks nothing else where others can go.
    """
    compared = options.order in EXPERT_ORDERS and options.allocation == "loss"
    if options.experts == "both" and (family.mixture is None or not compared):
        options = dataclasses.replace(options, experts=None if family.mixture is None else "neurons")
    if options.whole_experts and family.mixture is None:
        raise OptionError(
            f"--experts {options.experts} is for mixtures of experts, and models of type {family.model_type!r} are "
            "none; leave it out"
        )
    if options.whole_experts and options.order not in EXPERT_ORDERS:
        raise OptionError(
            f"--order {options.order} ranks what a single layer reads, and an expert is three of them; give --order "
            f"{' or '.join(EXPERT_ORDERS)}, or leave out --experts {options.experts}"
        )
    if options.order not in ORDERS and (options.experts, options.attention) != ("whole", "none"):
        raise OptionError(
            f"--order {options.order} ranks whole experts only, and here other units can go, too; give --experts whole "
            "and --attention none with it, or another order"
        )
    return options


def fit_for_format(options: PruneConfig, family: Family) -> PruneConfig:
    """With --format blockwise or stock, the choices that lead to what that can express; else `options` as they are.

    Raises `OptionError` where another choice was made.
    """
    if options.format == "auto" or options.structures == "layers":
        return options
    heads = family.whole_heads if options.format == "blockwise" else "heads" in family.stock
    modes = ("heads", "none") if heads else ("none",)
    given = None if options.attention == "auto" else options.attention
    if given not in (None, *modes):
        why = {
            "blockwise": "engines for blocks of different widths know whole heads only",
            "stock": f"the stock class of model type {family.model_type!r} cannot have such attention layers",
        }
        raise OptionError(
            f"--format {options.format} and --attention {given} exclude each other: {why[options.format]}; "
            f"leave one of them out, or give --attention {' or '.join(modes)}"
        )
    attention = given or modes[0]
    experts = options.experts or METHODS[options.method]["experts"]
    mixed = family.mixture is not None and experts == "both" and options.allocation in (None, "loss")
    if options.format == "blockwise" or attention == "heads" or mixed:
        return dataclasses.replace(options, attention=attention)
    if options.allocation not in (None, "uniform"):
        raise OptionError(
            f"--format stock and --allocation {options.allocation} exclude each other: without heads it is the same "
            "number of neurons or experts in every block that goes; leave one of them out, or give --allocation uniform"
        )
    return dataclasses.replace(options, attention=attention, allocation="uniform")


def check_format(options: PruneConfig, family: Family, config: Any) -> None:
    """Raise `OptionError` where a pruned model has already what --format blockwise or stock cannot express."""
    blocks = range(len(getattr(config, "block_widths", None) or ()))
    if options.format == "stock" and blocks:
        raise OptionError(
            "--format stock is for models whose blocks are alike, and those of this one, which is pruned already, are "
            "not: leave it out, or prune the dense model"
        )
    inside = set(family.widths(config, {})) - {"heads", "neurons", SHARED, EXPERTS}
    whole = family.widths(config, {})
    for index in blocks if options.format == "blockwise" else ():
        widths = family.widths(config, {}, index)
        if any(widths[unit] < whole[unit] for unit in inside) or "queries" in widths:
            raise OptionError(
                "--format blockwise is for whole heads and neurons, and this model, which is pruned already, has lost "
                "parts of heads: leave it out, or prune the dense model"
            )


def fit_for_heads(options: PruneConfig, family: Family, config: Any) -> PruneConfig:
    """Where heads can only go as a whole, `both` means heads, and where they cannot, `dims`; `options`: resolved.

    `auto` is one of these, by the texts.

    Raises `OptionError` for what cannot be: `dims`, or `heads`, and `queries` where no key/value head has several.
    """
    if options.attention == "auto":
        directions = options.one_kind and family.attention(config) is not None
        options = dataclasses.replace(options, attention=judged_attention(directions))
    if not family.whole_heads and options.attention in ("heads", "queries"):
        raise OptionError(
            f"--attention {options.attention} is not possible for models of type {family.model_type!r}, whose heads "
            "are normed together; give --attention dims"
        )
    if not family.whole_heads and options.attention == "both":
        options = dataclasses.replace(options, attention="dims")
    if options.attention == "queries" and family.queries(config) is None:
        raise OptionError(
            "--attention queries is for models in which several key/value heads have several query heads each, and "
            "this one has none; give --attention heads"
        )
    if not options.directions or family.attention(config) is not None:
        return options
    if options.attention == "dims":
        raise OptionError(
            f"--attention dims is not possible for models of type {family.model_type!r}, whose heads can only go as a "
            "whole; give --attention heads"
        )
    return dataclasses.replace(options, attention="heads")


def output_of(options: PruneConfig) -> Path:
    """The directory that --output names, or the default. Raises `OutputError` for what can be no directory."""
    output = Path(os.path.expanduser(options.output)) if options.output else default_output(options)
    try:
        resolved = output.resolve()
        os.lstat(f"{resolved}.replaced")  # the longest name that a run gives it
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links, before Python 3.13
        cause = getattr(error, "strerror", None) or first_line(error)
        raise OutputError(f"--output {output} cannot be made: {cause}; give another directory") from error
    if not encodable(str(resolved)):
        raise OutputError(
            f"--output {output} cannot be made: {str(resolved)!a} is no UTF-8 text, and weights cannot be written "
            "there; give another directory"
        )
    if not resolved.name:
        raise OutputError(f"--output {output} is the root of the file system; give a directory below it")
    return output


def default_output(options: PruneConfig) -> Path:
    """./<model name>-snp-<percent>"""
    path = EMBEDDED if options.model is None else Path(os.path.expanduser(options.model))
    name = public_name(path.resolve()) if os.path.exists(path) else path.name  # a Hub id ends in the model's name, too
    return Path(f"{name}-snp-{100 * options.sparsity:g}")


def window_length(options: PruneConfig, config: Any) -> int:
    """--sequence-length, capped by the positions the model has."""
    return min(options.sequence_length, getattr(config, "max_position_embeddings", options.sequence_length))
