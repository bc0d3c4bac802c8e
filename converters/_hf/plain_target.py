"""A catalog laid out as plain safetensors files with all states, and an index that is the root."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ucp.catalog import Catalog
from ucp.errors import FitError, UsageError
from ucp.plan import Digests, Task

from .joined import kind_of
from .options import cast_to, dtype_of, rounds
from .plain import DETAILS, FAMILY, INDEX
from .small import left_out
from .split import Item, file_names, file_task, split

STEM = "tensors"
_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class PlainFiles:
    """Plain files to be written."""

    tasks: tuple[Task, ...]
    index: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    root: str = STEM + INDEX
    family: str = FAMILY

    def finish(self, digests: Mapping[str, Digests]) -> Iterator[tuple[str, bytes]]:
        """The index."""
        del digests
        yield self.root, (json.dumps(self.index, indent=2, sort_keys=True) + "\n").encode()


def make_target(catalog: Catalog, *, shard_bytes: int, states: str, dtype: str | None) -> PlainFiles:
    """Lay `catalog` out; see `ucp.converters.safetensors.Safetensors.target`."""
    if states not in ("all", "value"):
        raise UsageError(f"{FAMILY}: states is all or value, not {states!r}")
    items = list(_items(catalog, whole=states == "all", dtype=dtype_of(dtype)))
    files = split(items, shard_bytes)
    names = file_names(f"{STEM}.safetensors", len(files))
    kept = sorted({item.cover.key.state for item in items} - {"value"})
    _check_names(catalog, kept)
    index = {
        "metadata": {
            "total_size": sum(item.spec.nbytes for item in items),
            DETAILS: _details(catalog, kept, numbers=states == "all"),
        },
        "weight_map": {item.name: name for name, held in zip(names, files, strict=True) for item in held},
    }
    rounded = [item for item in items if rounds(item.cover.spec.dtype, item.dtype)]
    return PlainFiles(
        tuple(file_task(name, held, _METADATA) for name, held in zip(names, files, strict=True)),
        index,
        tuple(left_out(catalog, ("value", *kept), numbers=states != "all")),
        tuple(f"rounded: {len(rounded)} tensors, such as {item.name}, to {item.dtype}" for item in rounded[:1]),
    )


def _items(catalog: Catalog, *, whole: bool, dtype: str | None) -> Iterator[Item]:
    for name, tensor in catalog.tensors.items():
        for state, spec in tensor.states.items():
            if state == "value":
                written = cast_to(spec.dtype, dtype)
                yield Item(name, catalog.cover(name, state), written, catalog.witness(name))
            elif whole:
                yield Item(f"{state}/{name}", catalog.cover(name, state), spec.dtype)


def _check_names(catalog: Catalog, states: Sequence[str]) -> None:
    """FitError for tensors whose names would be taken for states of others."""
    for name in catalog.tensors:
        head, slash, _ = name.partition("/")
        if slash and head in states:
            raise FitError(f"{catalog.url}: {name} would be read as a state {head!r}", hint="write states=value")
    for state in states:
        if "/" in state:
            raise FitError(
                f"{catalog.url}: a state cannot be named {state!r} in these files", hint="write states=value"
            )


def _details(catalog: Catalog, states: Sequence[str], *, numbers: bool) -> dict[str, Any]:
    scalars = {
        name: {state: [scalar.value, scalar.dtype] for state, scalar in tensor.scalars.items()}
        for name, tensor in catalog.tensors.items()
        if tensor.scalars and numbers
    }
    kinds = {
        name: tensor.kind
        for name, tensor in catalog.tensors.items()
        if "value" in tensor.states and tensor.kind != kind_of(tensor.states["value"].dtype)
    }
    return {
        "states": list(states),
        "scalars": scalars,
        "kinds": kinds,
        "ties": dict(catalog.ties),
        "step": catalog.step,
    }
