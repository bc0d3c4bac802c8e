"""What keeps checkpoints after they are written: managers, copies, mirrors, repairs and collectors, to be disturbed."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from unittest import mock

import ucp
from tests.commit.crashing import Story, cut_short
from tests.commit.places import State
from tests.commit.truth import forget_at_exit, opens, source, tensors
from ucp.errors import ContentError
from ucp.lifecycle.copy import copy
from ucp.lifecycle.gc import gc
from ucp.lifecycle.repair import repair
from ucp.lifecycle.shelf import Shelf
from ucp.lifecycle.sync import sync
from ucp.share.lease import put_shared
from ucp.store import open_store
from ucp.train.manager import CheckpointManager

Work = Callable[[str], object]


def newest(url: str) -> int | None:
    """The newest step of a run, all of whose complete checkpoints are whole."""
    found = None
    for saved in Shelf(url).contents().saved:
        found = opens(saved.url)
        assert found == saved.step
    return found


def train(steps: int, *, keep: int) -> Work:
    """A run that goes on where it is, up to step `steps`, and keeps the newest."""

    def work(url: str) -> None:
        with (
            mock.patch("ucp.train.save.engine._ENGINES", []),  # threads of another process are not in its forks
            CheckpointManager(url, keep_latest=keep) as manager,
        ):
            state = tensors(0)
            resumed = manager.resume(state)
            for step in range(resumed.step + 1 if resumed else 1, steps + 1):
                manager.save(step, tensors(step)).result()

    return work


@cache
def run_of(*steps: int) -> str:
    """The folder of a run with a checkpoint of each of `steps`."""
    folder = forget_at_exit(mkdtemp(prefix="ucp-run-"))
    shelf = Shelf(folder)
    for step in steps:
        shelf.record(step, {})
        ucp.save(tensors(step), shelf.where(step), step=step)
    return folder


def _mirrored(url: str) -> int | None:
    """2 if both checkpoints are there; whatever is there must be whole."""
    return 2 if [newest(url), *(saved.step for saved in Shelf(url).contents().saved)] == [2, 1, 2] else None


def _copy(step: int, **options: bool) -> Work:
    url = source(step)
    return _without_clock(lambda destination: copy(url, destination, workers=1, **options))


def _without_clock(work: Work) -> Work:
    """`work` that notes what it copied at its end, however long it takes."""

    def steady(url: str) -> None:
        with mock.patch("ucp.lifecycle.carry._FLUSH_SECONDS", float("inf")):
            work(url)

    return steady


def _damaged(url: str) -> None:
    """A copy of a checkpoint with a bit of a tensor flipped."""
    _copy(1)(url)
    store = open_store(url)
    for entry in list(store.entries("shards/")):
        data = bytearray(store.read(entry.path))
        data[-1] ^= 1
        store.put(entry.path, data)


def _repaired(url: str) -> int | None:
    """The step if it is whole, None if it still is found to be damaged."""
    try:
        return opens(url)
    except (AssertionError, ContentError):
        return None


def _collect(url: str) -> None:
    """Collect until there is nothing left: what one collection notes is removed by the next."""
    for _ in range(9):
        done = gc(url, grace=0, clock=lambda: 1000.0)
        if not done.removed and not done.condemned:
            return
    raise AssertionError(f"no end of it: {done}")


def _left_behind(url: str) -> None:
    """A run with a checkpoint, one that was cut short, one whose deletion was, and shared objects nobody needs."""
    folder = Path(run_of(1))
    store = open_store(url)
    for path in folder.rglob("*"):
        if path.is_file():
            store.put(path.relative_to(folder).as_posix(), path.read_bytes())
    shelf = Shelf(url)
    shelf.record(2, {})
    cut_short(lambda _: ucp.save(tensors(2), shelf.where(2), step=2), at=8)(url)
    store.put("step-00000000.json", store.read("step-00000001.json").replace(b'"step": 1', b'"step": 0'))
    store.put("step-00000000/shards/rank-00000-0-12345678.safetensors", b"left")
    for data in (b"one", b"two"):
        put_shared(store.child("shared"), data)


_OWN = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|\"crc32c\":\d+}$")
_TAG = re.compile(r"rank-\d+-\d+-([0-9a-f]{8})")


def _plain(state: State) -> State:
    """Without the names that every save draws anew."""
    tags = sorted({found[1] for path in state if (found := _TAG.search(path))})
    name = re.compile("|".join(tags) or "-")
    data = re.compile(b"|".join(tag.encode() for tag in tags) or b"-")
    return {name.sub("tag", path): _OWN.sub(b"own", data.sub(b"tag", found)) for path, found in state.items()}


def _without_ledger(state: State) -> State:
    """Without what the collector remembers, of which a run that is done again has more or less."""
    return {path: data for path, data in state.items() if "/shared/" not in f"/{path}" or not path.endswith(".json")}


def stories() -> list[Story]:
    """All of them."""
    copied, mirrored = source(1), run_of(1, 2)
    return [
        Story(
            "retention",
            train(4, keep=1),
            4,
            2,
            train(2, keep=1),
            newest,
            between=(3,),
            plain=_plain,
            again=train(5, keep=1),
            last=5,
        ),
        Story("cp", _copy(1), 1),
        Story(
            "cp --restart",
            _copy(2, restart=True),
            2,
            None,
            cut_short(_copy(1), at=12),
            forgotten=tuple(f"ckpt/{entry.path}" for entry in open_store(copied).entries("shards/")),
        ),
        Story("sync", _without_clock(lambda url: sync(mirrored, url, workers=1)), 2, look=_mirrored),
        Story("repair", lambda url: repair(url, copies=[copied], workers=1), 1, None, _damaged, _repaired),
        Story("gc", _collect, 1, 1, _left_behind, newest, plain=_without_ledger),
    ]
