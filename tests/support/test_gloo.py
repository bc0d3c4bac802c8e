"""The rank starter itself: results, failures, hangs, and nothing left behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from torch import distributed

from tests.support.gloo import RankFailed, spawn


def total(rank, world, offset):
    value = torch.tensor([rank + offset])
    distributed.all_reduce(value)
    return rank, int(value)


def fail_on_one(rank, world, folder):
    (Path(folder) / f"{rank}.pid").write_text(str(os.getpid()))
    distributed.barrier()
    if rank == 1:
        raise ValueError("this rank is broken")
    time.sleep(600)


def die_silently(rank, world):
    if rank == 0:
        os._exit(3)
    time.sleep(600)


def test_ranks_talk_and_results_come_in_rank_order():
    assert spawn(total, 3, 10) == [(0, 33), (1, 33), (2, 33)]


def test_the_failing_rank_is_named_and_all_are_ended(tmp_path):
    with pytest.raises(RankFailed, match=r"rank 1 failed first(.|\n)*this rank is broken"):
        spawn(fail_on_one, 3, str(tmp_path))
    pids = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
    assert len(pids) == 3
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_rank_that_dies_without_a_word_is_reported():
    with pytest.raises(RankFailed, match="code 3"):
        spawn(die_silently, 2)


def test_a_hang_ends_at_the_time_limit():
    started = time.monotonic()
    with pytest.raises(RankFailed, match="timed out"):
        spawn(die_silently, 1 + 1, timeout=0.01)
    assert time.monotonic() - started < 30
