"""Rank 0's part in every save: what each rank is to do, and whether the copies that ranks hold agree."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ucp.catalog import Tensor
from ucp.errors import ConflictError, UsageError
from ucp.format.native_shard import Piece
from ucp.format.spreads import Chain
from ucp.train.save.message import Layout, Order, Told
from ucp.train.save.plan import Holding, Plan, assign
from ucp.train.save.whole import Whole, merged, spreads_of, with_values

_DRIFTED = (
    "the ranks have drifted apart, or have parts of a tensor, or several tensors, under one name: declare parts with "
    "layout={glob of names: (DeviceMesh, [Shard(0)])}, and give different tensors different names, as in an "
    "nn.ModuleDict with one key for each in the whole job"
)

_KEPT = 4
"""Versions that are remembered; more than there are saves under way at once."""


@dataclass(frozen=True, slots=True)
class Known:
    """The layouts and plans of all ranks, the tensors that they hold together, and how these lie on meshes."""

    layouts: Sequence[Layout]
    plans: Sequence[Plan]
    tensors: Mapping[str, Tensor]
    spreads: Mapping[str, Sequence[Chain]]


@dataclass(slots=True)
class Lead:
    """What rank 0 remembers from save to save. Versions count from 1."""

    _known: dict[int, Known] = field(default_factory=dict)
    _version: int = 0

    def order(self, told: Sequence[Told]) -> tuple[Whole, list[Order]]:
        """What the ranks hold together, and the order of each.

        ConflictError where ranks contradict each other, FitError where elements of a tensor are on no rank.
        """
        version = self._agreed(told)
        known = self._known[version]
        whole = with_values(known.tensors, known.layouts, [one.values for one in told], told[0].request[1])
        tag = uuid.uuid4().hex[:8]
        return replace(whole, spreads=known.spreads), [Order(tag, plan) for plan in known.plans]

    def _agreed(self, told: Sequence[Told]) -> int:
        """The version of the plans that hold now: the ranks' own, or a new one if a layout has changed."""
        versions = {one.version for one in told}
        if len(versions) == 1 and versions != {0}:
            return versions.pop()
        layouts = [one.layout or self._known[one.version].layouts[rank] for rank, one in enumerate(told)]
        tensors = merged(layouts)
        staged = [self._known[one.staged].plans[rank] if one.staged else None for rank, one in enumerate(told)]
        holdings = [
            Holding(layout.pieces, layout.on_device, None if plan is None else _written(plan))
            for layout, plan in zip(layouts, staged, strict=True)
        ]
        plans = assign(self._version + 1, holdings, lambda piece: tensors[piece.key.name].kind == "buffer")
        self._version += 1
        self._known[self._version] = Known(layouts, plans, tensors, spreads_of(layouts))
        self._known = dict(list(self._known.items())[-_KEPT:])
        return self._version


def _written(plan: Plan) -> frozenset[Piece]:
    return frozenset(cut.piece for cut in plan.write)


def check_requests(told: Sequence[Told]) -> None:
    """UsageError if not all ranks save the same."""
    for rank, one in enumerate(told):
        if one.request != told[0].request:
            raise UsageError(
                f"rank {rank} saves {one.request}, rank 0 {told[0].request}",
                hint="every rank saves the same step to the same place",
            )


def compare(found: Sequence[Mapping[Piece, Any]]) -> None:
    """ConflictError where two ranks have different digests of the same elements."""
    seen: dict[Piece, tuple[int, Any]] = {}
    for rank, digests in enumerate(found):
        for piece, digest in digests.items():
            first, expected = seen.setdefault(piece, (rank, digest))
            if digest != expected:
                raise ConflictError(
                    f"{piece.key}: ranks {first} and {rank} hold different values of the same elements",
                    hint=_DRIFTED,
                )
