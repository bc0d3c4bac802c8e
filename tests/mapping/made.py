"""Checkpoints by mesh coordinate, made of numpy arrays: what a reader hands to a program."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ucp.catalog import Catalog, ParamGroup, Scalar, Source, Tensor
from ucp.lang import parse
from ucp.layout import Box, FlatRange, Mesh, Shape
from ucp.mapping import Part, consolidate
from ucp.plan import Extent, Fragment, Key, TensorSpec
from ucp.run.cast import storage_dtype
from ucp.run.gather import read_region
from ucp.store import Store, open_store

Array = np.ndarray[Any, Any]
States = Mapping[str, Array]
Cut = Callable[[Shape], Iterable[Box | FlatRange]]


def whole(shape: Shape) -> list[Box | FlatRange]:
    return [Box.whole(shape)]


def zero(ranks: int) -> Cut:
    """As ZeRO cuts: flat runs."""

    def cut(shape: Shape) -> list[FlatRange]:
        size = int(np.prod(shape))
        edges = [size * i // ranks for i in range(ranks + 1)]
        return [FlatRange(a, b - a) for a, b in itertools.pairwise(edges) if a < b]

    return cut


def part(
    store: Store,
    coordinate: Mapping[str, int],
    tensors: Mapping[str, States | Array],
    *,
    cut: Cut = whole,
    low: Mapping[str, Array] | None = None,
    dtypes: Mapping[str, str] | None = None,
    **changes: Any,
) -> Part:
    """What one coordinate holds: every fragment in an object of its own, named for coordinate and tensor."""
    where = "".join(f"{axis}{index}" for axis, index in coordinate.items()) or "all"
    found: dict[str, Tensor] = {}
    fragments: dict[Key, tuple[Fragment, ...]] = {}
    objects: dict[str, tuple[int, str]] = {}

    def put(key: str, array: Array, region: Box | FlatRange, dtype: str) -> Fragment:
        if isinstance(region, FlatRange):
            data = array.reshape(-1)[region.start : region.stop]
        else:
            data = array[tuple(map(slice, region.start, region.stop))]
        path = Path(store.url) / key  # not put: making each of these durable takes longer than the tests
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"??" + data.tobytes())
        objects[key] = (2 + data.nbytes, store.entry(key).fingerprint)
        return Fragment(region, Extent.contiguous(key, 2, data.shape, dtype))

    witnesses: dict[str, tuple[TensorSpec, tuple[Fragment, ...]]] = {}
    for name, given in tensors.items():
        states = {"value": given} if isinstance(given, np.ndarray) else dict(given)
        specs = {}
        for state, array in states.items():
            dtype = (dtypes or {}).get(name, array.dtype.name)
            specs[state] = TensorSpec(array.shape, dtype)
            pieces = enumerate(cut(array.shape))
            fragments[Key(name, state)] = tuple(put(f"{where}/{name}/{state}/{n}", array, r, dtype) for n, r in pieces)
        found[name] = Tensor(name, "parameter", specs, {"step": Scalar(7, "int")})
        if low and name in low:
            pieces = enumerate(cut(low[name].shape))
            copies = tuple(put(f"{where}/{name}/low/{n}", low[name], r, "bfloat16") for n, r in pieces)
            witnesses[name] = (TensorSpec(low[name].shape, "bfloat16"), copies)
    groups = (ParamGroup(tuple(found), {"lr": 0.1}),)
    given = {"step": 5, "param_groups": groups, "objects": objects, "witnesses": witnesses, **changes}
    return coordinate, Catalog(store.url, Source("made", "1", Mesh({})), found, fragments, **given)


def read(catalog: Catalog, store: Store, name: str, state: str = "value") -> Array:
    """A whole state, through the engine."""
    cover = catalog.cover(name, state)
    raw = read_region(store, cover, FlatRange(0, cover.spec.size))
    return raw.view(storage_dtype(cover.spec.dtype)).reshape(cover.spec.shape)


def numbers(*shape: int, seed: int = 0) -> Array:
    """Different float32 numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype("<f4")


def put_together(
    folder: Path, program: str, shards: Mapping[tuple[tuple[str, int], ...], Mapping[str, Any]], **options: Any
) -> tuple[Catalog, Store]:
    """Consolidate the tensors of each coordinate under `program`; `mesh` is among the options."""
    store = open_store(str(folder))
    cut = options.pop("cut", whole)
    parts = [part(store, dict(coordinate), tensors, cut=cut) for coordinate, tensors in shards.items()]
    return consolidate(parts, parse(program), **options), store
