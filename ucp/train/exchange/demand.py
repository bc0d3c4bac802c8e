"""What a rank asks for, as the others need to know it, and the memory that it goes to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ucp.errors import ConflictError
from ucp.layout import Box, Shape
from ucp.layout.block import View
from ucp.plan import ZEROS, Cover, Key
from ucp.train.transfer import Fill, regions, view_of

Want = tuple[Shape, Box]
"""A box, and the shape of the view in whose coordinates it is. Row-major positions are the same in all views."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What one rank wants of one state of one tensor of the source.

    `place` is the object and the byte where the tensor's first fragment lies, `fragments` how many there are; `twins`
    are tensors that must hold the same.
    """

    shape: Shape
    dtype: str
    place: tuple[str, int]
    fragments: int
    twins: tuple[Key, ...]
    wants: tuple[Want, ...]

    def agrees(self, other: Demand) -> bool:
        """Whether both speak of the same bytes of the source."""
        return (self.shape, self.dtype, self.place, self.fragments) == (
            other.shape,
            other.dtype,
            other.place,
            other.fragments,
        )


Table = Mapping[Key, Demand]
"""All that a rank asks for."""


@dataclass(slots=True)
class Mine:
    """A rank's own side of one `Demand`: where the tensor comes from, and the memory of each want, in order."""

    cover: Cover
    twins: tuple[Cover, ...]
    views: list[View] = field(default_factory=list)
    wants: list[Want] = field(default_factory=list)
    targets: list[torch.Tensor] = field(default_factory=list)

    def demand(self) -> Demand:
        """As it travels."""
        spec, held = self.cover.spec, self.cover.fragments
        first = min(((f.extent.object, f.extent.offset) for f in held if f.extent.object != ZEROS), default=("", 0))
        twins = tuple(twin.key for twin in self.twins)
        return Demand(spec.shape, spec.dtype, first, len(held), twins, tuple(self.wants))


def collect(fills: Iterable[Fill]) -> tuple[dict[Key, Mine], list[Fill]]:
    """What this rank asks for by tensor and state, and the fills that are not for exchange: of other covers."""
    found: dict[Key, Mine] = {}
    apart = []
    for fill in fills:
        mine = found.setdefault(fill.cover.key, Mine(fill.cover, fill.twins))
        if mine.cover is not fill.cover or mine.twins != fill.twins:
            apart.append(fill)
            continue
        view = view_of(fill)
        for box, target in regions(fill):
            if box.size:
                mine.views.append(view)
                mine.wants.append((view.shape, box))
                mine.targets.append(target)
    return found, apart


def check_same(tables: Sequence[Table]) -> None:
    """ConflictError where ranks speak of one tensor of the source and see different ones."""
    seen: dict[Key, tuple[int, Demand]] = {}
    for rank, table in enumerate(tables):
        for key, demand in table.items():
            first, other = seen.setdefault(key, (rank, demand))
            if not demand.agrees(other):
                raise ConflictError(
                    f"ranks {first} and {rank} see different checkpoints: {key} is {other.dtype} {list(other.shape)} "
                    f"in {other.fragments} parts at {other.place}, and {demand.dtype} {list(demand.shape)} "
                    f"in {demand.fragments} at {demand.place}",
                    hint="give all ranks of a group the same source, or load with together=False",
                )
