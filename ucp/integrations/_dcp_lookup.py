"""What a checkpoint holds under the keys of a job's state dict, whichever way the job nests it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, KeysView, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)

from ucp.catalog import Catalog, Scalar
from ucp.errors import FitError
from ucp.integrations._dcp_keys import MODEL, OPTIMIZER, Path, below, leaves, splits
from ucp.train.names import stripped
from ucp.training import USUAL_NAMES
from ucp.tree import Tree

KEEP = frozenset("amsgrad capturable decoupled_weight_decay differentiable foreach fused maximize".split())
"""Options of torch's own optimizers that optimizers of other frameworks have no word for."""

_SECTION = re.compile(r"(?:^|\.)(state|param_groups)\.")


@dataclass(frozen=True, slots=True)
class Weight:
    """State `state` of tensor `name` of the catalog."""

    name: str
    state: str


@dataclass(frozen=True, slots=True)
class Number:
    """A number kept per parameter."""

    scalar: Scalar


@dataclass(frozen=True, slots=True)
class Value:
    """Part of the training state, or an option of an optimizer's group."""

    tree: Tree


@dataclass(frozen=True, slots=True)
class Kept:
    """An option that the source knows nothing of: the job keeps its own."""


Found = Weight | Number | Value | Kept


@dataclass(frozen=True)
class Lookup:
    """Finds keys in `catalog`. `model` and `optimizer` are what comes before names, where the caller says so."""

    catalog: Catalog
    model: str | None = None
    optimizer: str | None = None

    def find(self, key: str) -> Found | None:
        """What lies under `key`; None if there is nothing.

        FitError where there are two readings of it, and for optimizer states that nobody can place.
        """
        found: list[Found] = []
        for one in [*self._weights(key), *self._optimizers(key)]:
            if one not in found:
                found.append(one)
        if len(found) > 1:
            raise FitError(
                f"{self.catalog.url}: {key!r} may mean {' or '.join(sorted(map(_told, found)))}",
                hint='say what comes before the names: Reader(url, model="model.", optimizer="optim.")',
            )
        return found[0] if found else next(self._around(key), None)

    def _weights(self, key: str) -> Iterator[Found]:
        for prefix in self._prefixes(key, self.model, MODEL):
            name = self._name(key[len(prefix) :])
            if name is not None and "value" in self.catalog.tensors[name].states:
                yield Weight(name, "value")

    @staticmethod
    def _prefixes(key: str, said: str | None, usual: re.Pattern[str]) -> list[str]:
        if said is not None:
            return [said] if key.startswith(said) else []
        match = usual.match(key)
        return ["", match[0]] if match else [""]

    def _optimizers(self, key: str) -> Iterator[Found]:
        for match in _SECTION.finditer(key):
            prefix = key[: match.start(1)]
            if prefix != self.optimizer if self.optimizer is not None else prefix and not OPTIMIZER.fullmatch(prefix):
                continue
            rest = key[match.end() :]
            yield from self._states(key, rest) if match[1] == "state" else self._options(rest)

    def _states(self, key: str, rest: str) -> Iterator[Found]:
        for before, state in splits(rest):
            name = self._name(before)
            if name is None:
                continue
            tensor = self.catalog.tensors[name]
            if state in tensor.states and state != "value":
                yield Weight(name, state)
            elif state in tensor.scalars:
                yield Number(tensor.scalars[state])
            elif tensor.undecided is not None:
                raise tensor.lacks(state, self.catalog.url)
            return
        if rest.partition(".")[0].isdecimal() and self.catalog.param_groups:
            raise FitError(
                f"{self.catalog.url}: {key!r} is the state of a parameter that has a number instead of a name",
                hint="make the state dict with torch.distributed.checkpoint.state_dict.get_optimizer_state_dict",
            )

    def _options(self, rest: str) -> Iterator[Found]:
        number, _, option = rest.partition(".")
        groups = self.catalog.param_groups
        if number.isdecimal() and option and int(number) < len(groups):
            yield from self._option(int(number), option)
            return
        for before, option in splits(rest):
            name = self._name(before)
            owners = [n for n, held in enumerate(self._members) if name in held] if name is not None else []
            if owners:
                yield from self._option(owners[0], option)
                return

    def _option(self, number: int, option: str) -> Iterator[Found]:
        group = self.catalog.param_groups[number]
        if option == "params":
            yield Value(list(group.params))
            return
        tree = next(below(dict(group.options), option), _NOTHING)
        if tree is not _NOTHING:
            yield Value(tree)
        elif option in KEEP:
            yield Kept()

    def _around(self, key: str) -> Iterator[Found]:
        state = self.catalog.state
        yield from map(Value, below(dict(state), key))
        # Readers keep what has a name of ours at the top, wherever the job had it.
        parts = key.split(".")
        for start in range(min(2, len(parts))):
            usual = USUAL_NAMES.get(parts[start], "")
            if usual in state:
                yield from map(Value, below(state[usual], ".".join(parts[start + 1 :])))

    def _name(self, text: str) -> str | None:
        """The canonical name of a tensor that a job calls `text`, wrappers left out where that is clear."""
        catalog = self.catalog
        text = catalog.ties.get(text, text)
        if text in catalog.tensors:
            return text
        close = self._stripped.get(stripped(text), set())
        return next(iter(close)) if len(close) == 1 else None

    @cached_property
    def _stripped(self) -> Mapping[str, set[str]]:
        found: dict[str, set[str]] = defaultdict(set)
        for name in self.catalog.tensors:
            found[stripped(name)].add(name)
        for alias, name in self.catalog.ties.items():
            found[stripped(alias)].add(name)
        return found

    @cached_property
    def _members(self) -> list[set[str]]:
        ties = self.catalog.ties
        return [{ties.get(name, name) for name in group.params} for group in self.catalog.param_groups]

    def paths(self) -> Iterator[Path]:
        """The paths under which a job that asks for everything would find it: ``{"model": …, "optim": …}``."""
        model = _level(self.model, "model.")
        optimizer = _level(self.optimizer, "optim.")
        catalog = self.catalog
        for name in [*catalog.tensors, *catalog.ties]:
            tensor = catalog.tensors[catalog.resolve(name)]
            if "value" in tensor.states:
                yield (*model, name)
        for name, tensor in catalog.tensors.items():
            for state in dict.fromkeys([*tensor.states, *tensor.scalars]):
                if state != "value":
                    yield (*optimizer, "state", name, state)
        for number, group in enumerate(catalog.param_groups):
            for option in dict.fromkeys([*group.options, "params"]):
                yield (*optimizer, "param_groups", number, str(option))
        for path, _ in leaves((), dict(catalog.state)):
            yield path


class Keys(Mapping[str, TensorStorageMetadata | BytesStorageMetadata]):
    """``Metadata.state_dict_metadata`` of a checkpoint: knows every key that `lookup` finds, and lists one spelling."""

    def __init__(self, lookup: Lookup) -> None:
        self.lookup = lookup
        self._found: dict[str, Found | None] = {}

    @cached_property
    def paths(self) -> dict[str, Path]:
        """The listed keys, with their paths."""
        paths = {".".join(map(str, path)): path for path in self.lookup.paths()}
        return {key: path for key, path in paths.items() if self._is_clear(key)}

    def _is_clear(self, key: str) -> bool:
        with suppress(FitError):
            return self.find(key) is not None
        return False

    def find(self, key: str) -> Found | None:
        """What lies under `key`."""
        if key not in self._found:
            self._found[key] = self.lookup.find(key)
        return self._found[key]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.find(key) is not None

    def __getitem__(self, key: str) -> TensorStorageMetadata | BytesStorageMetadata:
        found = self.find(key)
        if found is None:
            raise KeyError(key)
        if not isinstance(found, Weight):
            # Whether the job has a number or a tensor of it is seen when it is delivered.
            return BytesStorageMetadata()
        spec = self.lookup.catalog.tensors[found.name].states[found.state]
        size = torch.Size(spec.shape)
        # One chunk, for planners to ask for boxes of the whole tensor: where it was cut is the engine's affair.
        whole = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
        return TensorStorageMetadata(TensorProperties(getattr(torch, spec.dtype)), size, [whole])

    def keys(self) -> KeysView[str]:
        """None: from those that a job does not ask for, torch's planner would guess that torch 2.3 wrote them."""
        return dict[str, Any]().keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)


def _level(prefix: str | None, usual: str) -> Path:
    text = (usual if prefix is None else prefix).removesuffix(".")
    return (text,) if text else ()


def _told(found: Found) -> str:
    return f"{found.name}[{found.state}]" if isinstance(found, Weight) else "a part of an optimizer"


_NOTHING = object()
