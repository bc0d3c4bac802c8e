from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.gloo import spawn
from tests.train import exchange_jobs as jobs
from tests.train.handmade import Cut, columns, flat, make, whole
from ucp.checkpoint import Checkpoint


def checkpoint(folder: Path, cut: Cut = whole) -> Checkpoint:
    torch.manual_seed(5)
    shapes = [(13, 7), (1, 5), (3,), (), (5, 4, 3), (120, 200), (64, 3)]
    states = {f"t{i}": {"value": torch.randn(s), "m": torch.randn(s).bfloat16()} for i, s in enumerate(shapes)}
    return Checkpoint(*make(str(folder), states, cut=cut))


@pytest.mark.parametrize(
    ("cut", "world", "memory", "messages"),
    [
        (whole, 2, 256 << 20, False),
        (flat(3), 3, 4 << 10, True),
        pytest.param(columns(2), 4, 4 << 10, False, marks=pytest.mark.slow),
        pytest.param(columns(2), 4, 64 << 10, True, marks=pytest.mark.slow),
    ],
)
def test_any_layout_gets_what_it_wants(tmp_path: Path, cut: Cut, world: int, memory: int, messages: bool) -> None:
    source = checkpoint(tmp_path, cut)
    for found in spawn(jobs.mixed, world, source, 4, memory, messages):
        assert [got.wrong for got in found] == [[]] * 4


@pytest.mark.parametrize(
    "cut", ["all", "columns", *(pytest.param(cut, marks=pytest.mark.slow) for cut in ("rows", "elements"))]
)
@pytest.mark.parametrize(
    ("world", "messages"),
    [(2, False), pytest.param(4, True, marks=pytest.mark.slow), pytest.param(8, False, marks=pytest.mark.slow)],
)
def test_the_job_reads_each_byte_once(tmp_path: Path, cut: str, world: int, messages: bool) -> None:
    source = checkpoint(tmp_path, flat(3))
    found = spawn(jobs.same, world, source, cut, 64 << 10, messages)
    assert [got.wrong for got in found] == [[]] * world
    assert sum(got.read for got in found) == source.catalog.nbytes
    if cut == "all":
        assert max(got.read for got in found) <= source.catalog.nbytes / world + (64 << 10) / 2
        assert min(got.received for got in found) >= source.catalog.nbytes * (world - 1) / world - (64 << 10)


def test_rows_that_one_rank_wants_alone_are_not_sent(tmp_path: Path) -> None:
    source = Checkpoint(*make(str(tmp_path), {"w": {"value": torch.randn(16, 5)}}))
    for got in spawn(jobs.same, 2, source, "rows", 1 << 20, True):
        assert (got.wrong, got.read, got.received) == ([], 160, 0)


def test_damage_that_one_rank_finds_is_raised_by_all(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, flat(2))
    path = tmp_path / "rank1.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    for said in spawn(jobs.loaded_whole, 3, source):
        assert said.startswith("CorruptError: ")
        assert "rank1.bin" in said


def test_replicas_are_compared_by_the_rank_that_reads_them(tmp_path: Path) -> None:
    source = jobs.with_replica(checkpoint(tmp_path), same=True)
    assert spawn(jobs.loaded_whole, 2, source) == ["nothing"] * 2
    broken = jobs.with_replica(checkpoint(tmp_path), same=False)
    for said in spawn(jobs.loaded_whole, 2, broken):
        assert said.startswith("ConflictError: ")
        assert "t5[value]: the replica in copy.bin differs" in said


def test_a_rank_that_cannot_read_keeps_nobody_waiting(tmp_path: Path) -> None:
    source = checkpoint(tmp_path)
    for said in spawn(jobs.one_cannot_read, 3, source):
        assert said.startswith("StorageError: rank0.bin: no such disk")


def test_numbers_beyond_the_targets_dtype_are_told_by_all(tmp_path: Path) -> None:
    source = Checkpoint(*make(str(tmp_path), {"w": {"value": torch.tensor([1.0, 1e30])}}))
    for said in spawn(jobs.narrowed, 2, source):
        assert said.startswith("FitError: w[value]: 1e+30 is beyond torch.float16")


def test_ranks_that_load_different_checkpoints_are_told(tmp_path: Path) -> None:
    one = Checkpoint(*make(str(tmp_path / "one"), {"w": {"value": torch.ones(3)}}))
    two = Checkpoint(*make(str(tmp_path / "two"), {"w": {"value": torch.zeros(3)}}))
    for said in spawn(jobs.different, 2, [one, two], None):
        assert said.startswith("ConflictError: rank 0 loads ")
        assert "together=False" in said
    assert spawn(jobs.different, 2, [one, two], False) == ["[1.0, 1.0, 1.0]", "[0.0, 0.0, 0.0]"]


def test_one_rank_may_load_alone_and_groups_among_themselves(tmp_path: Path) -> None:
    source = checkpoint(tmp_path)
    alone, nothing = spawn(jobs.only_rank_0, 2, source)
    assert alone == source.catalog.nbytes
    assert nothing == 0
    found = spawn(jobs.in_pairs, 4, source)
    assert [sum(pair) for pair in (found[:2], found[2:])] == [source.catalog.nbytes] * 2
    assert all(found)
