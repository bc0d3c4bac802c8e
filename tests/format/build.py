"""Checkpoints for the tests: numpy arrays become a source catalog, which the real engine writes as a universal one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ucp.catalog import Catalog, Scalar, Source, Tensor
from ucp.format.universal import CONVERTER
from ucp.layout import Box, Mesh
from ucp.plan import Extent, Fragment, Key, TensorSpec
from ucp.run.integrity import Ledger, Spans
from ucp.run.worker import write_object
from ucp.store import LocalStore, Store

States = Mapping[str, np.ndarray]


def dtype_name(array: np.ndarray) -> str:
    return array.dtype.name


def source(folder: Path, tensors: Mapping[str, States], **changes: Any) -> tuple[Catalog, LocalStore]:
    """A catalog whose tensors lie in one raw file per state."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Tensor] = {}
    fragments: dict[Key, tuple[Fragment, ...]] = {}
    for i, (name, states) in enumerate(tensors.items()):
        specs = {state: TensorSpec(array.shape, dtype_name(array)) for state, array in states.items()}
        for j, (state, array) in enumerate(states.items()):
            (folder / f"{i}-{j}.raw").write_bytes(array.tobytes())
            extent = Extent.contiguous(f"{i}-{j}.raw", 0, array.shape, specs[state].dtype)
            fragments[Key(name, state)] = (Fragment(Box.whole(array.shape), extent),)
        found[name] = Tensor(name, "parameter", specs, {"step": Scalar(7, "int")})
    origin = Source("test", "1", Mesh({"dp": 2}), {"zero": 1})
    catalog = Catalog(str(folder), origin, found, fragments, step=7)
    return replace(catalog, **changes), LocalStore(str(folder))


def write(catalog: Catalog, store: Store, destination: Path, **options: Any) -> LocalStore:
    """Write `catalog` in the universal form with the real worker."""
    target = CONVERTER.target(catalog, store, **options)
    found = LocalStore(str(destination))
    digests = {
        task.object: write_object(store, found, task, ledger=Ledger(Spans(())), advance=lambda _: None)[0]
        for task in target.tasks
    }
    for path, data in target.finish(digests):
        found.put(path, data)
    return found


def universal(
    folder: Path, tensors: Mapping[str, States], *, shard_bytes: int | None = None, **changes: Any
) -> LocalStore:
    """A universal checkpoint of `tensors` in ``folder/universal``."""
    catalog, store = source(folder / "source", tensors, **changes)
    options = {} if shard_bytes is None else {"shard_bytes": shard_bytes}
    return write(catalog, store, folder / "universal", **options)
