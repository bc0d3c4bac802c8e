"""What ranks tell each other in a save: layouts, which seldom change, and numbers, which do."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ucp.catalog import Scalar, Tensor
from ucp.format.native_shard import Piece
from ucp.format.spreads import Chain
from ucp.train.inventory import Inventory
from ucp.train.save.plan import Plan


@dataclass(frozen=True, slots=True)
class Layout:
    """What a rank holds: `tensors` without their numbers, boxes, those of them on a GPU, ties and mesh axes.

    `spreads` says how tensors lie on meshes.
    """

    tensors: Mapping[str, Tensor]
    pieces: Sequence[Piece]
    on_device: frozenset[Piece]
    ties: Mapping[str, str]
    axes: tuple[tuple[str, int], ...]
    spreads: Mapping[str, Chain]


@dataclass(frozen=True, slots=True)
class Values:
    """What changes from step to step beside the tensors: numbers per parameter, hyper-parameters, training state."""

    scalars: Mapping[str, Mapping[str, Scalar]]
    groups: Sequence[tuple[list[str], dict[str, Any]]]
    state: Mapping[str, Any]
    ranked: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Told:
    """What a rank brings to a save: where to and of what step, its values, and its layout unless `version` knows it.

    `staged` is the version of the plan by which it has staged: 0 if it has staged all it holds, or nothing yet.
    """

    request: tuple[Any, ...]
    values: Values
    version: int
    staged: int
    layout: Layout | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """What rank 0 tells a rank to do: `plan` is what it writes and compares; `tag` names the files of this save.

    `brief` is what the form has to tell this rank beyond that, `before` the fingerprint of the root to be replaced.
    """

    tag: str
    plan: Plan
    brief: Any = None
    before: str | None = None


def told_apart(inventory: Inventory, memory: Mapping[Piece, torch.Tensor]) -> tuple[Layout, Values]:
    """A rank's inventory in two, of which later changes of the job change nothing."""
    bare = {name: replace(tensor, scalars={}) for name, tensor in inventory.tensors.items()}
    on_device = frozenset(piece for piece in inventory.pieces if memory[piece].is_cuda)
    layout = Layout(bare, inventory.pieces, on_device, inventory.ties, inventory.axes, inventory.spreads)
    scalars = {name: tensor.scalars for name, tensor in inventory.tensors.items() if tensor.scalars}
    groups, state, ranked = copy.deepcopy((inventory.groups, inventory.state, inventory.ranked))
    return layout, Values(scalars, groups, state, ranked)
