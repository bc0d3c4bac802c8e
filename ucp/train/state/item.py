"""The protocol of whatever is saved beside tensors, and how the ranks' copies of it become one tree of a catalog."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from ucp.catalog import Catalog
from ucp.errors import ConflictError, NotFoundError
from ucp.format.documents import canonical
from ucp.format.state import Encoder
from ucp.layout import Mesh
from ucp.tree import Tree

RANKS = "rank"
"""Key under which a catalog's state keeps what ranks have of their own (`ucp.training`)."""


@dataclass(frozen=True, slots=True)
class World:
    """The ranks that load, this one among them, and how many ranks saved.

    `same_layout`: rank r of the job is where rank r was that saved. The meshes say more where layouts differ; ranks
    count row-major in them.
    """

    rank: int
    size: int
    saved_size: int
    same_layout: bool
    mesh: Mesh | None = None
    saved_mesh: Mesh | None = None

    def beside(self, stored: Mapping[int, object]) -> World:
        """The same, where more ranks left a state than the source knows of: then their number alone tells."""
        if self.saved_size >= len(stored):
            return self
        return replace(self, saved_size=len(stored), same_layout=len(stored) == self.size, saved_mesh=None)


class Prepared(NamedTuple):
    """A state ready to be installed, and a note for the report where it is not what was saved."""

    state: Any
    note: str | None = None


class Item(ABC):
    """Something that is no tensor of a model or optimizer: a scheduler, random streams, a sampler, a number.

    `per_rank`: ranks have states of their own, and all are kept. Others are the same on all ranks that have them.
    `last`: to be installed after everything else, as random streams are, from which anything may draw.
    """

    name: str
    per_rank: ClassVar[bool] = False
    last: ClassVar[bool] = False

    @abstractmethod
    def saved(self) -> Tree:
        """The state as a tree of its own: nothing that happens later changes it. FitError for what is no tree."""

    def told(self, catalog: Catalog) -> Tree:
        """What a checkpoint says of it, mostly under its own name; NotFoundError where it says nothing."""
        if self.name not in catalog.state:
            raise NotFoundError(f"{catalog.url}: has no training state {self.name!r}")
        return catalog.state[self.name]

    @abstractmethod
    def prepare(self, stored: Tree, *, world: World) -> Prepared:
        """Make ready what was stored, changing nothing; FitError where it does not fit.

        `stored` may have `LazyTensor` leaves. Items that are `per_rank` get a dict of the trees by rank number.
        """

    @abstractmethod
    def install(self, state: Any) -> None:
        """Set what `prepare` made ready."""

    def restore(self, stored: Tree, *, world: World) -> str | None:
        """Prepare and install; the note for the report, if there is one."""
        prepared = self.prepare(stored, world=world)
        self.install(prepared.state)
        return prepared.note


def combined(name: str, held: Mapping[int, Tree], *, per_rank: bool) -> Tree:
    """What a catalog keeps of the trees that ranks `held`, by rank number: all of them, or the one that all share.

    ConflictError where ranks differ in what they should share.
    """
    if per_rank:
        return {RANKS: {str(rank): tree for rank, tree in sorted(held.items())}}
    first, *others = sorted(held)
    encoder = Encoder(lambda _: b"")
    # Encoded, NaN is what it is, and 1 is not True.
    same = canonical(encoder.encode(held[first], where=name))
    for other in others:
        if canonical(encoder.encode(held[other], where=name)) != same:
            raise ConflictError(
                f"{name}: ranks {first} and {other} have different states of it",
                hint="ucp.PerRank(object) keeps the state of each rank",
            )
    return held[first]


def by_rank(tree: Tree) -> dict[int, Tree]:
    """The trees of each rank that a catalog keeps; one that was kept once is rank 0's."""
    ranks = tree.get(RANKS) if isinstance(tree, dict) and len(tree) == 1 else None
    if not isinstance(ranks, dict) or not ranks or not all(str(rank).isdecimal() for rank in ranks):
        return {0: tree}
    return {int(rank): own for rank, own in ranks.items()}
