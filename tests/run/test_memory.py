"""Memory of a conversion: what the plan promises per worker holds, however large the source, however it is strided."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucp.catalog import Catalog, Source, Tensor
from ucp.format.target import make_target
from ucp.layout import Box, FlatRange, Mesh, Shape, numel
from ucp.plan import Extent, Fragment, Key, Plan, TensorSpec
from ucp.run.convert import Conversion, carry_out
from ucp.run.destination import Wanted
from ucp.store import open_store

SLACK = 3 << 20
"""Catalog, plan, journal and manifest: kilobytes per tensor, not bytes of data."""

STATES = ("value", "exp_avg", "exp_avg_sq")


def flat(shape: Shape, dtype: str, file: str, start: int) -> Iterator[Fragment]:
    """Cut in two flat ranges."""
    half = numel(shape) // 2 + 1
    for a, n in ((0, half), (half, numel(shape) - half)):
        yield Fragment(FlatRange(a, n), Extent.contiguous(file, start + a * 8, (n,), dtype))


def columns(shape: Shape, dtype: str, file: str, start: int) -> Iterator[Fragment]:
    """Cut over dim 1, each part in C order."""
    part = shape[1] // 4
    for number in range(4):
        extent = Extent.contiguous(file, start + number * shape[0] * part * 8, (shape[0], part), dtype)
        yield Fragment(Box((0, number * part), (shape[0], part)), extent)


def transposed(shape: Shape, dtype: str, file: str, start: int) -> Iterator[Fragment]:
    """Whole, in Fortran order."""
    yield Fragment(Box.whole(shape), Extent(file, start, shape, (1, shape[0]), dtype))


def sparse_source(folder: Path, shape: Shape, count: int, *, lie, stored: str, low: str, replicas: int) -> Catalog:
    """A catalog of `count` tensors in files of zeros that take no room on the disk."""
    folder.mkdir()
    tensors, fragments, witnesses = {}, {}, {}
    room = 8 * numel(shape) + 4096
    for number in range(count):
        name, file = f"w{number}", f"{number}.bin"
        with (folder / file).open("wb") as handle:
            handle.truncate(room * 5)
        tensors[name] = Tensor(name, "parameter", dict.fromkeys(STATES, TensorSpec(shape, "float32")))
        for at, state in enumerate(STATES):
            held = list(lie(shape, stored, file, at * room))
            held += [Fragment(f.region, f.extent, n) for n in range(1, replicas + 1) for f in held]
            fragments[Key(name, state)] = tuple(held)
        witnesses[name] = (TensorSpec(shape, low), tuple(lie(shape, low, file, 3 * room)))
    return Catalog(str(folder), Source("test", "1", Mesh({})), tensors, fragments, witnesses=witnesses)


def peak(catalog: Catalog, destination: Path, *, workers: int) -> tuple[int, int]:
    """(most bytes allocated while converting, what the plan promises for one worker)."""
    source = open_store(catalog.url)
    target = make_target(catalog, source)
    plan = Plan.of(target.tasks)
    wanted = Wanted(target, "x")
    conversion = Conversion(catalog, target, plan, "universal", source, open_store(str(destination)), wanted, "new")
    tracemalloc.start()
    try:
        carry_out(conversion, workers=workers)
        return tracemalloc.get_traced_memory()[1], plan.cost.peak_bytes_per_worker
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("workers", [1, 3])
def test_memory_does_not_grow_with_the_checkpoint(tmp_path, workers):
    """60 MB in 3 tensors and 540 MB in 9: the same memory, within the promise."""
    for name, shape, count in (("small", (1024, 1664), 3), ("large", (2048, 2496), 9)):
        catalog = sparse_source(
            tmp_path / f"{name}-source", shape, count, lie=flat, stored="float32", low="bfloat16", replicas=0
        )
        used, promised = peak(catalog, tmp_path / name, workers=workers)
        assert used < workers * promised + SLACK, name
        assert promised < 32 << 20
    assert catalog.nbytes > 500 << 20


@pytest.mark.parametrize("lie", [flat, columns, transposed])
@pytest.mark.parametrize(("stored", "low"), [("float32", "float32"), ("float64", "bfloat16"), ("bfloat16", "float16")])
def test_memory_for_strided_sources_casts_replicas_and_copies(tmp_path, lie, stored, low):
    shape = (1024, 4096)
    catalog = sparse_source(tmp_path / "source", shape, 1, lie=lie, stored=stored, low=low, replicas=2)
    used, promised = peak(catalog, tmp_path / "new", workers=1)
    assert used < promised + SLACK
