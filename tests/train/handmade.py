"""Checkpoints of raw bytes with a catalog made by hand: a source whose layout a test can choose freely."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor as TorchTensor

from ucp.catalog import Catalog, Checksum, ParamGroup, Scalar, Source, Tensor
from ucp.layout import Box, FlatRange, Mesh, Shape, numel
from ucp.plan import Extent, Fragment, Key, TensorSpec
from ucp.run.crc import crc
from ucp.store import Store, open_store

States = Mapping[str, TorchTensor]
Cut = Callable[[Shape], "list[Box | FlatRange]"]


def whole(shape: Shape) -> list[Box | FlatRange]:
    return [Box.whole(shape)]


def flat(ranks: int) -> Cut:
    """As ZeRO cuts: every rank holds a run of elements, the first ones a bit more."""

    def cut(shape: Shape) -> list[Box | FlatRange]:
        size = numel(shape)
        edges = [size * i // ranks for i in range(ranks + 1)]
        return [FlatRange(a, b - a) for a, b in itertools.pairwise(edges) if a < b]

    return cut


def columns(ranks: int) -> Cut:
    """As tensor parallelism cuts: boxes along the last dim."""

    def cut(shape: Shape) -> list[Box | FlatRange]:
        if not shape:
            return [Box((), ())]
        edges = [shape[-1] * i // ranks for i in range(ranks + 1)]
        pairs = itertools.pairwise(edges)
        return [Box((*(0,) * (len(shape) - 1), a), (*shape[:-1], b - a)) for a, b in pairs if a < b]

    return cut


def raw(tensor: TorchTensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def spec_of(tensor: TorchTensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def pick(tensor: TorchTensor, region: Box | FlatRange) -> TorchTensor:
    if isinstance(region, FlatRange):
        return tensor.reshape(-1)[region.start : region.stop]
    return tensor[tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))]


def make(
    url: str,
    tensors: Mapping[str, States],
    *,
    cut: Cut = whole,
    kinds: Mapping[str, str] | None = None,
    steps: Mapping[str, float] | None = None,
    ties: Mapping[str, str] | None = None,
    groups: Iterable[tuple[Iterable[str], Mapping[str, Any]]] = (),
    state: Mapping[str, Any] | None = None,
) -> tuple[Catalog, Store]:
    """Write every fragment to the object of its rank and describe it all; fragments are 7 odd bytes apart."""
    store = open_store(url)
    objects: dict[str, bytearray] = {}
    fragments: dict[Key, tuple[Fragment, ...]] = {}
    for name, states in tensors.items():
        for kind, tensor in states.items():
            spec = spec_of(tensor)
            found = []
            for rank, region in enumerate(cut(spec.shape)):
                data = objects.setdefault(f"rank{rank}.bin", bytearray())
                data += b"\xff" * 7
                part = pick(tensor, region)
                extent = Extent.contiguous(f"rank{rank}.bin", len(data), tuple(part.shape), spec.dtype)
                found.append(Fragment(region, extent))
                data += raw(part)
            fragments[Key(name, kind)] = tuple(found)
    for path, data in objects.items():
        store.put(path, bytes(data))
    catalog = Catalog(
        url=url,
        source=Source("handmade", "1", Mesh({"dp": max(1, len(objects))})),
        tensors={
            name: Tensor(
                name,
                (kinds or {}).get(name, "parameter"),  # type: ignore[arg-type]
                {kind: spec_of(tensor) for kind, tensor in states.items()},
                {"step": Scalar(steps[name], "float32")} if steps and name in steps else {},
            )
            for name, states in tensors.items()
        },
        fragments=fragments,
        step=7,
        ties=ties or {},
        param_groups=tuple(ParamGroup(tuple(names), options) for names, options in groups),
        state=state or {},
        checksums=tuple(
            Checksum(path, 0, len(data), "crc32", crc("crc32", memoryview(data))) for path, data in objects.items()
        ),
    )
    return catalog, store


class Counting(Store):
    """Passes reads on and counts their bytes."""

    def __init__(self, inner: Store) -> None:
        self.inner, self.url, self.bytes_read = inner, inner.url, 0

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        self.bytes_read += len(memoryview(buffer).cast("B"))
        self.inner.read_into(path, offset, buffer)

    def entry(self, path: str) -> Any:
        return self.inner.entry(path)

    def entries(self, prefix: str = "") -> Any:
        return self.inner.entries(prefix)

    def children(self, path: str = "") -> list[str]:
        return self.inner.children(path)

    def create(self, path: str, size: int) -> Any:
        return self.inner.create(path, size)

    def put(self, path: str, data: Any, *, if_absent: bool = False) -> None:
        self.inner.put(path, data, if_absent=if_absent)

    def delete(self, path: str) -> None:
        self.inner.delete(path)

    def child(self, path: str) -> Store:
        return self.inner.child(path)
