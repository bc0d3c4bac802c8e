"""Reads the fragments of a catalog with numpy alone and compares them with the truth of a case, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import safe_open

from ucp.catalog import Catalog
from ucp.layout import FlatRange, itemsize
from ucp.plan import Cover, Extent, Fragment, Key, TensorSpec

_BITS = {1: "u1", 2: "<u2", 4: "<u4", 8: "<u8"}


def read_extent(root: Path, extent: Extent) -> np.ndarray:
    """The extent's elements as unsigned integers of the same width, in its shape."""
    data = np.memmap(root / extent.object, np.uint8, "r")
    first, stop = extent.span
    raw = np.array(data[first:stop])
    strides = [stride * extent.itemsize for stride in extent.strides]
    return np.ndarray(extent.shape, _BITS[extent.itemsize], raw.tobytes(), strides=strides).copy()


def read_fragments(
    root: Path, spec: TensorSpec, fragments: Iterable[Fragment], *, over: np.ndarray | None = None
) -> np.ndarray:
    """The tensor's bits from all `fragments`, or those that they have in the place of the ones of `over`.

    AssertionError if they do not hold every element exactly once; over others, any of them at most once.
    """
    flat = np.zeros(spec.size, _BITS[itemsize(spec.dtype)]) if over is None else over.reshape(-1).copy()
    seen = np.zeros(spec.size, bool)
    where = np.arange(spec.size).reshape(spec.shape)
    for fragment in fragments:
        assert fragment.extent.dtype == spec.dtype
        values = read_extent(root, fragment.extent)
        region = fragment.region
        if isinstance(region, FlatRange):
            index = np.arange(region.start, region.stop)
        else:
            index = where[tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))].reshape(-1)
        assert not seen[index].any(), f"{fragment} holds elements that another one holds"
        seen[index] = True
        flat[index] = values.reshape(-1)
    assert over is not None or seen.all(), f"elements {np.flatnonzero(~seen)[:5]} are nowhere"
    return flat.reshape(spec.shape)


def read_state(root: Path, catalog: Catalog, name: str, state: str) -> np.ndarray:
    """Bits of one state; all replicas are read and must agree."""
    key = Key(catalog.resolve(name), state)
    spec = catalog.tensors[key.name].states[state]
    return _all_equal(root, key, spec, catalog.fragments[key])


def read_witness(root: Path, catalog: Catalog, name: str) -> np.ndarray:
    """Bits of the low-precision copy; all replicas are read and must agree."""
    spec, fragments = catalog.witnesses[catalog.resolve(name)]
    return _all_equal(root, Key(name, "witness"), spec, fragments)


def _all_equal(root: Path, key: Key, spec: TensorSpec, fragments: tuple[Fragment, ...]) -> np.ndarray:
    Cover.of(key, spec, fragments)
    replicas = sorted({fragment.replica for fragment in fragments}) or [0]
    assert replicas[0] == 0
    first = read_fragments(root, spec, [f for f in fragments if f.replica == 0])
    for replica in replicas[1:]:
        other = read_fragments(root, spec, [f for f in fragments if f.replica == replica], over=first)
        assert np.array_equal(first, other), f"{key}: replicas differ"
    return first


def load_truth(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Truth by key: dtype and bits."""
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    found = {}
    with safe_open(str(path), "pt") as file:
        for key in file.keys():  # noqa: SIM118, the handle is no mapping
            tensor = file.get_tensor(key)
            bits = tensor.contiguous().reshape(-1).view(integers[tensor.element_size()]).numpy()
            bits = bits.reshape(tensor.shape).view(_BITS[tensor.element_size()])
            found[key] = (str(tensor.dtype).removeprefix("torch."), bits)
    return found


def differences(root: Path, catalog: Catalog, truth: Mapping[str, tuple[str, np.ndarray]]) -> list[str]:
    """Everything in which the catalog's states differ from the truth; every state of every tensor must be in it."""
    wrong: list[str] = []
    expected: set[tuple[str, str]] = set()
    for key, (dtype, bits) in truth.items():
        kind, _, name = key.partition("/")
        if kind == "lowp":
            wrong += _witness_differs(root, catalog, name, dtype, bits)
            continue
        state = "value" if kind in ("param", "frozen", "buffer") else kind
        if name not in catalog.tensors:
            wrong.append(f"{key}: no such tensor")
            continue
        expected.add((name, state))
        wrong += _state_differs(root, catalog, name, state, dtype, bits)
        known = {"param": "parameter", "frozen": "frozen", "buffer": "buffer"}.get(kind, catalog.tensors[name].kind)
        if catalog.tensors[name].kind != known:
            wrong.append(f"{key}: read as {catalog.tensors[name].kind}")
    have = {(name, state) for name, tensor in catalog.tensors.items() for state in tensor.states}
    return wrong + [f"{name}[{state}]: not in the truth" for name, state in sorted(have - expected)]


def _state_differs(root: Path, catalog: Catalog, name: str, state: str, dtype: str, bits: np.ndarray) -> list[str]:
    spec = catalog.tensors[name].states.get(state)
    if spec is None:
        return [f"{name}: no state {state}"]
    if spec != TensorSpec(bits.shape, dtype):
        return [f"{name}[{state}]: {spec}, not {bits.shape} {dtype}"]
    same = np.array_equal(read_state(root, catalog, name, state), bits)
    return [] if same else [f"{name}[{state}]: other values"]


def _witness_differs(root: Path, catalog: Catalog, name: str, dtype: str, bits: np.ndarray) -> list[str]:
    if catalog.resolve(name) not in catalog.witnesses:
        return [f"{name}: no low-precision copy"]
    spec, _ = catalog.witnesses[catalog.resolve(name)]
    if spec != TensorSpec(bits.shape, dtype):
        return [f"{name}: copy is {spec}, not {bits.shape} {dtype}"]
    return [] if np.array_equal(read_witness(root, catalog, name), bits) else [f"{name}: the copy has other values"]
