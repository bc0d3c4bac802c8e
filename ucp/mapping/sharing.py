"""Sharing out: what a process of a job holds of the tensors of a checkpoint, as a conversion program says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ucp.catalog import Catalog, ParamGroup, Scalar, Tensor
from ucp.errors import FitError
from ucp.lang.export import Exporter, Shard
from ucp.layout import Mesh
from ucp.plan import Key, TensorSpec


@dataclass(frozen=True)
class Sharing:
    """The tensors of `catalog` shared out as `exporter` says, to a process at `coordinates` of `mesh`.

    `coordinates` are by the start of names, dot included: a process that holds several virtual stages has several.
    `shards` are what it holds, by local name and state; what the tensors that are all padding here hold elsewhere is
    there under the state ''.
    """

    catalog: Catalog
    exporter: Exporter
    mesh: Mesh
    coordinates: Mapping[str, Mapping[str, int]]
    shards: dict[Key, Shard] = field(default_factory=dict)

    def holder(self, name: str) -> str:
        """The tensor of the catalog that holds the data of a logical one."""
        known = name in self.catalog.tensors or name in self.catalog.ties
        return self.catalog.resolve(name if known else self.exporter.aliases.get(name, name))

    def share(self, states: Sequence[str]) -> Catalog:
        """Find the shards of `states`; gives what is held here as a catalog of local names and shapes, no fragments.

        FitError where a tensor is put together of parts that differ in kind, dtype, numbers or hyper-parameters.
        """
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
        return replace(
            self.catalog,
            tensors=tensors,
            fragments={},
            views={},
            reductions={},
            witnesses={},
            ties={},
            param_groups=groups,
        )

    def _shards(self, state: str) -> Iterator[tuple[str, Shard]]:
        """What this rank holds, by the job's names."""
        for start, coordinate in self.coordinates.items():
            for shard in self.exporter.shards([coordinate], state=state):
                yield start + shard.name, shard

    def _find_siblings(self) -> None:
        """For tensors that are all padding here: what the same tensor holds elsewhere, under the state ''."""
        bare = {key.name for key, shard in self.shards.items() if not shard.blocks}
        elsewhere = self.exporter.shards(self.mesh.coordinates()) if bare else ()
        for shard in (shard for shard in elsewhere if shard.blocks):
            for start in self.coordinates:
                if start + shard.name in bare:
                    self.shards.setdefault(Key(start + shard.name, ""), shard)

    def parts(self, name: str) -> list[str]:
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
        parts = self.parts(name)
        held = [part for part in parts if state in self.catalog.tensors[part].states]
        if held and len(held) < len(parts):
            raise FitError(
                f"{name}[{state}]: the checkpoint holds it of {' '.join(held)} only, not of {' '.join(parts)}"
            )
        return bool(held)

    def _tensor(self, name: str, states: Sequence[str]) -> Tensor:
        parts = [self.catalog.tensors[part] for part in self.parts(name)]
        if len({part.kind for part in parts}) > 1:
            raise FitError(f"{name}: is made of tensors of different kinds, {_of(parts, lambda part: part.kind)}")
        specs = {}
        for state in states:
            if Key(name, state) in self.shards:
                specs[state] = TensorSpec(self.shards[Key(name, state)].shape, _dtype(f"{name}[{state}]", parts, state))
        scalars = _scalars(name, parts)
        undecided = next((part.undecided for part in parts if part.undecided is not None), None)
        return Tensor(name, parts[0].kind, specs, scalars, None, undecided)

    def _members(self, group: ParamGroup) -> list[str]:
        """What is made of the group's parameters, in the group's own order: optimizers number by position."""
        places: dict[str, int] = {}
        for place, name in enumerate(group.params):
            places.setdefault(self.catalog.ties.get(name, name), place)
        found: dict[str, int] = {}
        for key in self.shards:
            held = [places[part] for part in self.parts(key.name) if part in places] if key.state == "value" else []
            if held:
                found[key.name] = min(held)
        return sorted(found, key=found.__getitem__)

    def _check_groups(self, names: Iterable[str]) -> None:
        """FitError for a tensor whose parts are in groups with different options."""
        homes: dict[str, ParamGroup] = {}
        for group in self.catalog.param_groups:
            for part in group.params:
                homes.setdefault(self.catalog.ties.get(part, part), group)
        for name in names:
            options = [dict(homes[part].options) for part in self.parts(name) if part in homes]
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
