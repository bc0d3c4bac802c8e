"""Loading through a program: what a job's own tensors are made of, where the checkpoint holds logical ones.

The job sees a catalog of its own: its names, its local shapes. What fills them are blocks of logical tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from ucp.catalog import Catalog, ParamGroup, Scalar, Tensor
from ucp.errors import FitError
from ucp.lang import Program
from ucp.lang.export import Exporter, Shard, Wanted, export
from ucp.lang.held import Held
from ucp.layout import Box, Shape
from ucp.layout.block import NO_STEP, Block, View
from ucp.plan import Cover, Key, TensorSpec
from ucp.train.fit import dtype_name
from ucp.train.names import stripped
from ucp.train.targets import Targets
from ucp.train.transfer import Fill, Share
from ucp.train.wish import Wish, chosen


class Supply(Protocol):
    """What fills the tensors of a job."""

    def fills(self, tensor: torch.Tensor, name: str, state: str, twins: Sequence[str]) -> list[Fill]:
        """How to fill `tensor` with a state of source `name`, whose contents `twins` must share."""


@dataclass(frozen=True, slots=True)
class Whole:
    """The checkpoint's tensors are the job's."""

    catalog: Catalog

    def fills(self, tensor: torch.Tensor, name: str, state: str, twins: Sequence[str]) -> list[Fill]:
        """One fill, from the tensor of this name."""
        covers = tuple(self.catalog.cover(twin, state) for twin in twins)
        return [Fill(tensor, self.catalog.cover(name, state), covers)]


@dataclass(frozen=True)
class Shares:
    """Blocks of logical tensors for each state of each of the job's tensors.

    `catalog` is the job's: its names and local shapes, without fragments. `source` is the checkpoint's.
    """

    source: Catalog
    shards: Mapping[Key, Shard]
    catalog: Catalog
    holder: Callable[[str], str]

    def fills(self, tensor: torch.Tensor, name: str, state: str, twins: Sequence[str]) -> list[Fill]:
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
            fills.append(Fill(tensor, cover, differing, Share(wanted.view, wanted.block)))
        return fills or [_nothing(tensor, self._any_cover(name, state))]

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


def _geometry(shard: Shard) -> list[tuple[View, Block]]:
    return [(wanted.view, wanted.block) for wanted in shard.blocks]


def _nothing(tensor: torch.Tensor, cover: Cover) -> Fill:
    """A fill of no element: the whole tensor is padding."""
    ndim = len(cover.view.shape)
    empty = Block(Box((0,) * ndim, (0,) * ndim), (0,) * tensor.ndim, (NO_STEP,) * ndim)
    return Fill(tensor, cover, (), Share(cover.view, empty))


def share_out(catalog: Catalog, targets: Targets, wish: Wish) -> Shares:
    """What the tensors of the job at `wish` are made of.

    FitError where the program does not fit the checkpoint's names and shapes or leaves a size open; UsageError for the
    program of a checkpoint that has none.
    """
    program, config, flags = chosen(catalog, wish)
    logical = {name: spec.shape for name, tensor in catalog.tensors.items() if (spec := tensor.states.get("value"))}
    exporter = _exporter(catalog, program, logical, wish, list(_held(targets, wish)), config, {**flags, **wish.flags})

    def holder(name: str) -> str:
        return catalog.resolve(name if name in logical or name in catalog.ties else exporter.aliases.get(name, name))

    return _Sharing(catalog, exporter, wish, holder).shares(_states(catalog, targets))


def _exporter(
    catalog: Catalog,
    program: Program,
    logical: Mapping[str, Shape],
    wish: Wish,
    held: Sequence[Held],
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


def _held(targets: Targets, wish: Wish) -> Iterator[Held]:
    """The job's tensors, whose shapes help to find sizes; under their names without wrappers too."""
    for slot in (slot for slot in targets.slots if slot.state == "value"):
        for name in dict.fromkeys(spelling for own in slot.names for spelling in (own, stripped(own))):
            for start, coordinate in wish.coordinates.items():
                if name.startswith(start):
                    shape, dtype = tuple(slot.tensor.shape), dtype_name(slot.tensor.dtype)
                    yield Held(name.removeprefix(start), shape, dtype, coordinate)


def _states(catalog: Catalog, targets: Targets) -> list[str]:
    """States that the target asks for: with an optimizer, all there are."""
    asked = dict.fromkeys(["value", *(slot.state for slot in targets.slots)])
    held = dict.fromkeys(state for tensor in catalog.tensors.values() for state in tensor.states)
    return [state for state in held if state in asked or targets.optimizers]


@dataclass(frozen=True)
class _Sharing:
    """Making the job's catalog."""

    catalog: Catalog
    exporter: Exporter
    wish: Wish
    holder: Callable[[str], str]
    shards: dict[Key, Shard] = field(default_factory=dict)

    def shares(self, states: Sequence[str]) -> Shares:
        for name, shard in self._shards("value"):
            self.shards[Key(name, "value")] = shard
        self._find_siblings()
        names = [key.name for key in self.shards if key.state == "value"]
        for state in states:
            if state != "value" and any(self._has(name, state) for name in names):
                for name, shard in self._shards(state):
                    if self._has(name, state):
                        self.shards[Key(name, state)] = shard
        tensors = {name: self._tensor(name, states) for name in names}
        groups = tuple(ParamGroup(tuple(self._members(group)), group.options) for group in self.catalog.param_groups)
        self._check_groups(names)
        job = replace(
            self.catalog,
            tensors=tensors,
            fragments={},
            views={},
            reductions={},
            witnesses={},
            ties={},
            param_groups=groups,
        )
        return Shares(self.catalog, self.shards, job, self.holder)

    def _shards(self, state: str) -> Iterator[tuple[str, Shard]]:
        """What this rank holds, by the job's names."""
        for start, coordinate in self.wish.coordinates.items():
            for shard in self.exporter.shards([coordinate], state=state):
                yield start + shard.name, shard

    def _find_siblings(self) -> None:
        """For tensors that are all padding here: what the same tensor holds elsewhere, under the state ''."""
        bare = {key.name for key, shard in self.shards.items() if not shard.blocks}
        elsewhere = self.exporter.shards(self.wish.mesh.coordinates()) if bare else ()
        for shard in (shard for shard in elsewhere if shard.blocks):
            for start in self.wish.coordinates:
                if start + shard.name in bare:
                    self.shards.setdefault(Key(start + shard.name, ""), shard)

    def _logical(self, name: str) -> list[str]:
        """The logical tensors that a tensor of the job is made of."""
        shard = self.shards.get(Key(name, "")) or self.shards[Key(name, "value")]
        names = [wanted.name for wanted in shard.blocks] or shard.tensors
        if not names:
            raise FitError(f"{name}: has no elements, which leaves open what it would be made of")
        return list(dict.fromkeys(map(self.holder, names)))

    def _has(self, name: str, state: str) -> bool:
        """Whether the checkpoint holds `state`; FitError if only of some parts of the tensor."""
        if Key(name, "value") not in self.shards:
            return False
        parts = self._logical(name)
        held = [part for part in parts if state in self.catalog.tensors[part].states]
        if held and len(held) < len(parts):
            raise FitError(
                f"{name}[{state}]: the checkpoint holds it of {' '.join(held)} only, not of {' '.join(parts)}"
            )
        return bool(held)

    def _tensor(self, name: str, states: Sequence[str]) -> Tensor:
        parts = [self.catalog.tensors[part] for part in self._logical(name)]
        if len({part.kind for part in parts}) > 1:
            raise FitError(f"{name}: is made of tensors of different kinds, {_of(parts, lambda part: part.kind)}")
        specs = {}
        for state in states:
            if Key(name, state) in self.shards:
                specs[state] = TensorSpec(self.shards[Key(name, state)].shape, _dtype(f"{name}[{state}]", parts, state))
        scalars = _scalars(name, parts)
        undecided = next((part.undecided for part in parts if part.undecided is not None), None)
        return Tensor(name, parts[0].kind, specs, scalars, None, undecided)

    def _members(self, group: ParamGroup) -> Iterator[str]:
        held = {self.catalog.ties.get(name, name) for name in group.params}
        for key in self.shards:
            if key.state == "value" and not held.isdisjoint(self._logical(key.name)):
                yield key.name

    def _check_groups(self, names: Iterable[str]) -> None:
        """FitError for a tensor whose parts are in groups with different options."""
        homes: dict[str, ParamGroup] = {}
        for group in self.catalog.param_groups:
            for part in group.params:
                homes.setdefault(self.catalog.ties.get(part, part), group)
        for name in names:
            options = [dict(homes[part].options) for part in self._logical(name) if part in homes]
            if any(one != options[0] for one in options):
                raise FitError(f"{name}: its parts are in groups of the optimizer with different hyper-parameters")


def _dtype(label: str, parts: Sequence[Tensor], state: str) -> str:
    """The one dtype of the parts."""
    if len({part.states[state].dtype for part in parts}) > 1:
        raise FitError(f"{label}: its parts have different dtypes, {_of(parts, lambda part: part.states[state].dtype)}")
    return parts[0].states[state].dtype


def _of(parts: Sequence[Tensor], fact: Callable[[Tensor], str]) -> str:
    return ", ".join(f"{part.name} {fact(part)}" for part in parts)


def _scalars(name: str, parts: Sequence[Tensor]) -> dict[str, Scalar]:
    """The numbers per parameter, which all parts must share."""
    for part in parts[1:]:
        if repr(part.scalars) != repr(parts[0].scalars):
            told = _of(parts, lambda part: str({key: s.value for key, s in part.scalars.items()}))
            raise FitError(f"{name}: its parts have different numbers: {told}")
    return dict(parts[0].scalars)
