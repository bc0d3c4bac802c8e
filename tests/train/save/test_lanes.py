"""Saves of one lane do not wait for those of another; abandoned ones are waited for by nobody."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import ucp
from tests.support.gloo import spawn
from ucp.store import OPENERS, LocalStore
from ucp.train.save.engine import _ENGINES, abandon_saves, engine_of
from ucp.train.save.forms import form_of

PATIENCE = 60.0


class Slow(LocalStore):
    """A folder that takes nothing before `gate` is opened."""

    gate = threading.Event()

    def create(self, path, size):
        assert self.gate.wait(PATIENCE)
        return super().create(path, size)


@pytest.fixture
def slow(tmp_path, monkeypatch):
    monkeypatch.setitem(OPENERS, "slow", lambda url: Slow(str(tmp_path / "slow")))
    Slow.gate.clear()
    yield "slow://there"
    Slow.gate.set()


def start(url: str, lane: str, state):
    return engine_of(None, lane).start(
        state, url, step=1, form=form_of("native"), wait=True, strict=True, overwrite=False
    )


def test_a_lane_does_not_wait_for_another_one(tmp_path, slow):
    state = {"w": torch.arange(6.0)}
    waiting = start(slow, "", state)
    fast = start(str(tmp_path / "fast"), "memory", state)
    assert fast.result(PATIENCE).step == 1
    assert not waiting.done()
    Slow.gate.set()
    assert waiting.result(PATIENCE).step == 1
    assert ucp.open(str(tmp_path / "fast"))["w"]["value"][:].tolist() == list(range(6))


def test_saves_of_a_lane_come_one_after_the_other(tmp_path):
    assert engine_of(None, "memory") is engine_of(None, "memory")
    assert engine_of(None, "memory") is not engine_of(None)


def _abandon(rank: int, world: int, folder: str) -> float:
    state = {"w": torch.arange(6.0) + 0}
    ucp.save(state, f"{folder}/first")
    if rank == 0:
        ucp.async_save(state, f"{folder}/second", on_error="warn")  # the other one never comes
    began = time.monotonic()
    abandon_saves()
    assert not _ENGINES
    return time.monotonic() - began


def test_abandoned_saves_are_waited_for_by_nobody(tmp_path):
    assert max(spawn(_abandon, 2, str(tmp_path))) < PATIENCE
    assert not (tmp_path / "second" / "ucp.json").exists()
