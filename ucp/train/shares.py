"""Loading through a program: what a job's own tensors are made of, where the checkpoint holds logical ones.

The job sees a catalog of its own: its names, its local shapes. What fills them are blocks of logical tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ucp.catalog import Catalog
from ucp.errors import FitError
from ucp.lang import Program
from ucp.lang.export import Exporter, Shard, Wanted, export
from ucp.lang.held import Held as Known
from ucp.layout import Shape
from ucp.mapping.sharing import Sharing
from ucp.plan import Cover, Key
from ucp.train.held import Held
from ucp.train.names import stripped
from ucp.train.shards import dtype_name
from ucp.train.targets import Targets
from ucp.train.transfer import Fill, Share
from ucp.train.wish import Wish, chosen


class Supply(Protocol):
    """What fills the tensors of a job."""

    def fills(self, held: Held, name: str, state: str, twins: Sequence[str]) -> list[Fill]:
        """How to fill `held` with a state of source `name`, whose contents `twins` must share."""


@dataclass(frozen=True, slots=True)
class Whole:
    """The checkpoint's tensors are the job's."""

    catalog: Catalog

    def fills(self, held: Held, name: str, state: str, twins: Sequence[str]) -> list[Fill]:
        """One fill, from the tensor of this name."""
        covers = tuple(self.catalog.cover(twin, state) for twin in twins)
        return [Fill(held, self.catalog.cover(name, state), covers)]


@dataclass(frozen=True)
class Shares:
    """Blocks of logical tensors for each state of each of the job's tensors.

    `catalog` is the job's: its names and local shapes, without fragments. `source` is the checkpoint's.
    """

    source: Catalog
    shards: Mapping[Key, Shard]
    catalog: Catalog
    holder: Callable[[str], str]

    def fills(self, held: Held, name: str, state: str, twins: Sequence[str]) -> list[Fill]:
        """One fill for each block. FitError where a twin is put together in another way."""
        shard = self.shards[Key(name, state)]
        others = [self.shards[Key(twin, state)] for twin in twins]
        if any(
            [(b.view, b.block) for b in other.blocks] != [(b.view, b.block) for b in shard.blocks] for other in others
        ):
            raise FitError(f"{name} and {' '.join(twins)} are one tensor in the target, but are made up differently")
        fills = []
        for number, wanted in enumerate(shard.blocks):
            cover = self._cover(wanted, state)
            covers = [self._cover(other.blocks[number], state) for other in others]
            differing = tuple(other for other in covers if other.key != cover.key)
            fills.append(Fill(held, cover, differing, Share(wanted.view, wanted.block)))
        if fills:
            return fills
        nothing = self._any_cover(name, state)
        return [Fill(held, nothing, (), Share(nothing.view, None))]

    def _any_cover(self, name: str, state: str) -> Cover:
        """That of a logical tensor of which this rank holds nothing."""
        elsewhere = self.shards.get(Key(name, ""))
        if elsewhere is not None:
            return self._cover(elsewhere.blocks[0], state)
        return self.source.cover(self.holder(self.shards[Key(name, "value")].tensors[0]), state)

    def _cover(self, wanted: Wanted, state: str) -> Cover:
        cover = self.source.cover(self.holder(wanted.name), state)
        if cover.spec.shape != wanted.view.tensor:
            raise FitError(
                f"{cover.key} has shape {list(cover.spec.shape)}, but the program makes it {list(wanted.view.tensor)}"
            )
        return cover


def share_out(catalog: Catalog, targets: Targets, wish: Wish) -> Shares:
    """What the tensors of the job at `wish` are made of.

    FitError where the program does not fit the checkpoint's names and shapes or leaves a size open; UsageError for the
    program of a checkpoint that has none.
    """
    program, config, flags = chosen(catalog, wish)
    logical = {name: spec.shape for name, tensor in catalog.tensors.items() if (spec := tensor.states.get("value"))}
    exporter = _exporter(catalog, program, logical, wish, list(_held(targets, wish)), config, {**flags, **wish.flags})
    sharing = Sharing(catalog, exporter, wish.mesh, wish.coordinates)
    job = sharing.share(_states(catalog, targets))
    return Shares(catalog, sharing.shards, job, sharing.holder)


def _exporter(
    catalog: Catalog,
    program: Program,
    logical: Mapping[str, Shape],
    wish: Wish,
    held: Sequence[Known],
    config: Mapping[str, int],
    flags: Mapping[str, bool],
) -> Exporter:
    return export(
        program,
        logical,
        mesh=wish.mesh,
        sizes=wish.sizes,
        config=config,
        flags=flags,
        cuts=wish.cuts,
        placements=wish.placements,
        ties=catalog.ties,
        job=held,
    )


def _held(targets: Targets, wish: Wish) -> Iterator[Known]:
    """The job's tensors, whose shapes help to find sizes; under their names without wrappers too."""
    for slot in (slot for slot in targets.slots if slot.state == "value"):
        for name in dict.fromkeys(spelling for own in slot.names for spelling in (own, stripped(own))):
            for start, coordinate in wish.coordinates.items():
                if name.startswith(start):
                    shape, dtype = slot.shape, dtype_name(slot.dtype)
                    yield Known(name.removeprefix(start), shape, dtype, coordinate)


def _states(catalog: Catalog, targets: Targets) -> list[str]:
    """States that the target asks for: with an optimizer, all there are."""
    asked = dict.fromkeys(["value", *(slot.state for slot in targets.slots)])
    held = dict.fromkeys(state for tensor in catalog.tensors.values() for state in tensor.states)
    return [state for state in held if state in asked or targets.optimizers]
