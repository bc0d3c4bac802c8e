"""Experts of layers that DeepSpeed's AutoEP made: all local experts of a rank are stacked in one parameter.

``ds_autoep_layers`` of the model file (``autoep_layers`` in old versions) tells of each layer what its three
parameters, ``w1``, ``w2`` and ``w3``, begin with, how many experts it has, and which rank holds which: consecutive
ones, in order (deepspeed/runtime/engine.py, ``_save_moe_checkpoint``; deepspeed/module_inject/auto_ep_layer.py).
Weights are in a file per layer and expert, ``<parameter>.<expert>``; under ZeRO 3 in the partitions alone, which are
over the ranks that hold the same experts (``ds_zero_partition_groups``, deepspeed/runtime/zero/stage3.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ucp.errors import CorruptError, FitError
from ucp.layout import FlatRange
from ucp.plan import Extent, Fragment, TensorSpec
from ucp.tree import Tree

from . import nodes
from .load import RankFile, Save

KEYS = ("ds_autoep_layers", "autoep_layers")
STACKED = re.compile(r"(.*\bexperts\.w[123])\.(\d+)")
"""A name in an expert's file: the parameter, and the expert's number."""

_WEIGHTS = ("w1", "w2", "w3")


@dataclass(frozen=True, slots=True)
class AutoLayer:
    """One layer: its number among MoE layers, what its parameters begin with, and whether experts have files."""

    number: int
    prefix: str
    experts: int
    has_files: bool

    @property
    def names(self) -> list[str]:
        """Its stacked parameters."""
        return [f"{self.prefix}.{weight}" for weight in _WEIGHTS]


def auto_layers(model: RankFile) -> list[AutoLayer]:
    """The layers that a model file tells of; FitError for experts in another order than consecutive."""
    told = next((model.root[key] for key in KEYS if model.root.get(key)), ())
    where = f"{model.path}: {KEYS[0]}"
    return [_layer(nodes.mapping(entry, where), where) for entry in nodes.sequence(told, where)]


def _layer(entry: Mapping[str, Tree], where: str) -> AutoLayer:
    number, experts, local, ep = (
        nodes.integer(entry.get(key), f"{where}: {key}")
        for key in ("moe_layer_id", "num_experts", "num_local_experts", "ep_size")
    )
    prefix = entry.get("expert_key_prefix")
    if not isinstance(prefix, str) or ep < 1 or local * ep != experts:
        raise CorruptError(f"{where}: {experts} experts of {prefix!r} are {local} on each of {ep} ranks")
    placement = entry.get("expert_placement")
    if placement is not None and _placed(nodes.mapping(placement, where), where) != list(range(experts)):
        raise FitError(f"{where}: the experts of {prefix} are not in consecutive order over ranks")
    if entry.get("expert_tensor_parallel_size", 1) != 1:
        raise FitError(f"{where}: the experts of {prefix} are tensor parallel themselves")
    return AutoLayer(number, prefix, experts, entry.get("checkpoint_format", "per_expert_files") == "per_expert_files")


def _placed(placement: Mapping[str, Tree], where: str) -> list[Tree]:
    ranks = [nodes.mapping(rank, where) for rank in nodes.sequence(placement.get("ranks"), where)]
    ordered = sorted(ranks, key=lambda rank: nodes.integer(rank.get("rank"), where))
    return [expert for rank in ordered for expert in nodes.sequence(rank.get("experts"), where)]


def stacked_of(save: Save) -> dict[str, int]:
    """The number of experts in each stacked parameter."""
    layers = [layer for pp in range(save.mesh["pp"]) for layer in auto_layers(save.model(pp))]
    return {name: layer.experts for layer in layers for name in layer.names}


def stacked_copies(save: Save, stacked: Mapping[str, int]) -> Iterator[tuple[str, TensorSpec, tuple[Fragment, ...]]]:
    """Each stacked parameter as the files of its experts hold it; CorruptError where these do not fit each other."""
    held: dict[str, dict[int, Extent]] = {}
    for _, file in sorted(save.experts.items()):
        for key, node in file.root.items():
            match = STACKED.fullmatch(str(key))
            if match and match[1] in stacked:
                held.setdefault(match[1], {})[int(match[2])] = nodes.tensor(node, f"{file.path}: {key}").extent
    for name, extents in held.items():
        first = extents[min(extents)]
        if sorted(extents) != list(range(stacked[name])):
            raise CorruptError(f"{first.object}: {name} is there of {len(extents)} of {stacked[name]} experts")
        fragments = [_entry(name, number, extents[number], first) for number in range(stacked[name])]
        yield name, TensorSpec((len(extents), *first.shape), first.dtype), tuple(fragments)


def _entry(name: str, number: int, extent: Extent, first: Extent) -> Fragment:
    if (extent.shape, extent.dtype, extent.is_contiguous) != (first.shape, first.dtype, True):
        raise CorruptError(f"{extent.object}: {name} of expert {number} is of another shape or dtype than of others")
    flat = Extent.contiguous(extent.object, extent.offset, (extent.size,), extent.dtype)
    return Fragment(FlatRange(number * extent.size, extent.size), flat)
