"""Nodes are lost at random moments of saves: every checkpoint that there is then, is whole on those that are left."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.elastic.nodes import jobs
from tests.elastic.nodes.processes import files
from tests.support.gloo import forkserver
from ucp.elastic.nodes import NodeFolder, NodesStore
from ucp.elastic.nodes.folder import PARTIAL
from ucp.elastic.nodes.scrub import damaged
from ucp.format.native import NativeConverter
from ucp.layout import Box
from ucp.run.gather import read_region

WORLD = 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_what_is_a_checkpoint_is_whole_on_the_nodes_that_are_left(tmp_path: Path, seed: int) -> None:
    lot = random.Random(seed)
    victim = lot.randrange(WORLD)
    told = _run_and_kill(tmp_path, [victim], after=lot.randrange(2, 6), delay=lot.random() * 0.2)
    _check_what_is_left(tmp_path, told, {rank for rank in range(WORLD) if rank != victim}, f"seed {seed}")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_what_is_a_checkpoint_is_whole_after_all_are_killed_at_once(tmp_path: Path, seed: int) -> None:
    """Nothing is left of what was being written, once somebody starts there again."""
    lot = random.Random(seed)
    told = _run_and_kill(tmp_path, range(WORLD), after=lot.randrange(2, 6), delay=lot.random() * 0.2)
    _check_what_is_left(tmp_path, told, set(range(WORLD)), f"seed {seed}")


def _check_what_is_left(folder: Path, told: int, nodes: set[int], seed: str) -> None:
    base = folder / "nodes" / f"ucp-{os.geteuid()}" / "job"
    for rank in set(range(WORLD)) - nodes:
        shutil.rmtree(base / f"n{rank}")
    folders = {f"n{rank}": NodeFolder(str(base / f"n{rank}")) for rank in nodes}
    store = NodesStore(min(folders), folders, copies=2)
    store.tidy()
    assert not [name for rank in nodes for name in files(base / f"n{rank}") if PARTIAL in name]
    steps = [_checked(store.child(name.rstrip("/"))) for name in store.children() if _is_there(store, name)]
    assert steps, seed
    assert max(steps) in (told - 1, told), "no save that was over is lost"


def _is_there(store: NodesStore, name: str) -> bool:
    return store.exists(f"{name}ucp.json")


def _checked(store: NodesStore) -> int:
    """The step of a checkpoint all of whose bytes are what they should be."""
    catalog = NativeConverter().read(store)
    assert damaged(store, catalog.checksums) == ()
    assert catalog.step is not None
    for name, tensor in catalog.tensors.items():
        cover = catalog.cover(name, "value")
        found = read_region(store, cover, Box.whole(tensor.states["value"].shape)).view(np.float32)
        assert (found == catalog.step).all()
    return catalog.step


def _run_and_kill(folder: Path, victims: Sequence[int], *, after: int, delay: float) -> int:
    """Run ranks, kill some a while after the first of them began save number `after`; the last one that any began."""
    context = forkserver()
    pipes = [context.Pipe(duplex=False) for _ in range(WORLD)]
    ranks = [
        context.Process(
            target=jobs.save_until_the_end,
            args=(rank, WORLD, str(folder / "meet"), str(folder / "nodes"), pipes[rank][1]),
            daemon=True,
        )
        for rank in range(WORLD)
    ]
    last = 0
    try:
        for rank in ranks:
            rank.start()
        while last < after:
            assert pipes[victims[0]][0].poll(240)
            last = pipes[victims[0]][0].recv()
        time.sleep(delay)
        for victim in victims:
            ranks[victim].kill()
        for number, rank in enumerate(ranks):
            rank.join(240)
            assert rank.exitcode is not None, "nobody hangs"
            assert number in victims or rank.exitcode == 0
        for end, _ in pipes:
            while end.poll(0):
                last = max(last, end.recv())
    finally:
        for rank in ranks:
            if rank.pid is not None:
                rank.kill()
                rank.join()
    return last
