"""The optimizer file of one rank, as a tree.

Keys: ``state_dict`` of deepspeed/runtime/zero/stage_1_and_2.py and of deepspeed/runtime/bf16_optimizer.py,
``_rigid_state_dict`` of deepspeed/runtime/zero/stage3.py. ``param_alignment_paddings`` is left out: without it
DeepSpeed loads the same partitions into jobs with ``parameter_alignment`` and without.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ucp.catalog import Catalog
from ucp.training import first_rank
from ucp.tree import Opaque, Tree

from .._deepspeed_universal.small import scalar_tree
from .flat import Flat, joined
from .groups import Group
from .partition import Piece, dealt, flat_partition, held, sliced_partition, sub_groups
from .wanted import Wanted

_FP32 = "float32"


@dataclass(frozen=True, slots=True)
class Flattened:
    """One flat tensor over all ranks: a group, or a sub-group of it under ZeRO 3. `sizes` are in flat order."""

    group: int
    sizes: Mapping[str, int]


def flattened(groups: Sequence[Group], wanted: Wanted) -> tuple[Flattened, ...]:
    """All flat tensors in DeepSpeed's order."""
    found = []
    for number, group in enumerate(groups):
        sizes = group.sizes
        if wanted.stage == 3:
            parts = sub_groups(sizes, dp=wanted.dp, most=wanted.sub_group_size)
            found += [Flattened(number, part) for part in parts]
        else:
            order = dealt(list(sizes), dp=wanted.dp) if wanted.round_robin else sizes
            found.append(Flattened(number, {name: sizes[name] for name in order}))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class OptimizerFile:
    """What the optimizer files of all ranks have in common. `options` are the groups' hyper-parameters."""

    catalog: Catalog
    wanted: Wanted
    groups: tuple[Group, ...]
    flats: tuple[Flattened, ...]
    options: tuple[Mapping[Tree, Tree], ...]
    scaler: Mapping[str, Tree]
    version: str

    def tree(self, rank: int) -> dict[str, Tree]:
        """``optimizer_state_dict`` of `rank`."""
        wanted = self.wanted
        cut = sliced_partition if wanted.stage == 3 else flat_partition
        pieces = [cut(flat.sizes, dp=wanted.dp, rank=rank) for flat in self.flats]
        if wanted.stage == 3:
            return self._stage_3(pieces)
        common = {
            **self._clip_grad(),
            "base_optimizer_state": self._base(pieces),
            "single_partition_of_fp32_groups": [self._master(part, lean=not wanted.bf16_optimizer) for part in pieces],
        }
        shared = {
            "partition_count": [wanted.dp] * len(pieces),
            "ds_version": self.version,
            "param_slice_mappings": [_mapping(part) for part in pieces],
        }
        if wanted.bf16_optimizer:
            return {**common, "group_paddings": self._whole_paddings(rank), **shared}
        paddings = [_total(part) - held(part) for part in pieces]
        return {**self.scaler, **common, "zero_stage": _stage(wanted), "group_paddings": paddings, **shared}

    def _stage_3(self, pieces: Sequence[Sequence[Piece]]) -> dict[str, Tree]:
        return {
            "zero_stage": _stage(self.wanted),
            **self.scaler,
            "partition_count": self.wanted.dp,
            "optimizer_state_dict": self._base(pieces),
            "fp32_flat_groups": [self._master(part, lean=False) for part in pieces],
        }

    def _base(self, pieces: Sequence[Sequence[Piece]]) -> dict[str, Tree]:
        """The wrapped optimizer's state dict, whose parameters are the flat tensors."""
        states = {number: self._states(flat, pieces[number]) for number, flat in enumerate(self.flats)}
        groups = [
            {**options, "params": [number for number, flat in enumerate(self.flats) if flat.group == index]}
            for index, options in enumerate(self.options)
        ]
        return {"state": {number: state for number, state in states.items() if state}, "param_groups": groups}

    def _states(self, flat: Flattened, pieces: Sequence[Piece]) -> dict[str, Tree]:
        group = self.groups[flat.group]
        scalars = {name: scalar_tree(scalar) for name, scalar in group.scalars.items()}
        return {**scalars, **{state: joined(self.catalog, pieces, state, dtype=_FP32) for state in group.states}}

    def _master(self, pieces: Sequence[Piece], *, lean: bool) -> Flat:
        """The fp32 values; ZeRO 1 and 2 save them without the padding that their states have."""
        kept = [piece for piece in pieces if piece.name is not None] if lean else pieces
        return joined(self.catalog, kept, "value", dtype=_FP32)

    def _clip_grad(self) -> dict[str, Tree]:
        """The limit on gradients, which ZeRO 3 keeps in its configuration alone; a job without it keeps its own."""
        state = first_rank(self.catalog)
        saved, config = state.get("optimizer"), state.get("ds_config")
        told = config.get("gradient_clipping") if isinstance(config, dict) else None
        told = saved.get("clip_grad", told) if isinstance(saved, dict) else told
        return {"clip_grad": told} if isinstance(told, int | float) else {}

    def _whole_paddings(self, rank: int) -> list[int]:
        """BF16_Optimizer counts all padding as the last rank's."""
        if rank < self.wanted.dp - 1:
            return [0] * len(self.flats)
        every = range(self.wanted.dp)
        cut = [[flat_partition(flat.sizes, dp=self.wanted.dp, rank=r) for r in every] for flat in self.flats]
        return [sum(_total(part) - held(part) for part in parts) for parts in cut]


def _total(pieces: Sequence[Piece]) -> int:
    return sum(piece.length for piece in pieces)


def _stage(wanted: Wanted) -> Opaque:
    return Opaque("deepspeed.runtime.zero.config", "ZeroStageEnum", (wanted.stage,))


def _mapping(pieces: Sequence[Piece]) -> OrderedDict[str, Tree]:
    """Where each parameter lies in the rank's partition (deepspeed/utils/tensor_fragment.py)."""
    found: OrderedDict[str, Tree] = OrderedDict()
    at = 0
    for piece in pieces:
        if piece.name is not None:
            address = {"numel": piece.length, "start": at}
            found[piece.name] = Opaque("deepspeed.utils.tensor_fragment", "fragment_address", state=address)
        at += piece.length
    return found
