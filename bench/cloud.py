"""Throughput of stores in object storage, as a ratio to the bare client, obstore, in the same run.

    python -m bench.cloud s3://bucket/folder [--rounds N] [--large MIB] [--small COUNT] [--kinds KIND,…] [--json FILE]

The server and the credentials are those of the environment, as for `ucp`. Large objects are read into one buffer and
written in blocks of 4 MiB, as checkpoints are; the bare client reads the same parts, with as many threads, and throws
them away, and uploads the same object from memory. Small objects are read and written whole by as many threads. Both
take turns, each first in every other round; a ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import obstore

from bench.report import table
from ucp.store import open_store
from ucp.store.cloud.client import Client
from ucp.store.cloud.ranges import PART_BYTES
from ucp.store.cloud.store import CloudStore

_BLOCK = 4 << 20
_SMALL_BYTES = 64 << 10
_OBJECTS = 4
_PARTS_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Work:
    """What moves: `_OBJECTS` objects of `large` bytes, `small` of 64 KiB."""

    store: CloudStore
    client: Client
    data: memoryview
    buffer: memoryview
    small: int

    def key(self, path: str) -> str:
        """Name in the bucket."""
        return self.store.address.key(path)

    def put_large(self) -> int:
        for number in range(_OBJECTS):
            with self.store.create(f"large/{number}", len(self.data)) as writer:
                for at in range(0, len(self.data), _BLOCK):
                    writer.write_at(at, self.data[at : at + _BLOCK])
        return _OBJECTS * len(self.data)

    def put_large_bare(self) -> int:
        for number in range(_OBJECTS):
            obstore.put(
                self.client.once,
                self.key(f"large/{number}"),
                self.data,
                chunk_size=PART_BYTES,
                max_concurrency=_PARTS_AT_ONCE,
            )
        return _OBJECTS * len(self.data)

    def get_large(self) -> int:
        for number in range(_OBJECTS):
            self.store.read_into(f"large/{number}", 0, self.buffer)
        return _OBJECTS * len(self.data)

    def get_large_bare(self) -> int:
        starts = range(0, len(self.data), PART_BYTES)
        for number in range(_OBJECTS):
            key = self.key(f"large/{number}")

            def part(start: int, key: str = key) -> int:
                end = min(start + PART_BYTES, len(self.data))
                return len(obstore.get_range(self.client.once, key, start=start, end=end))

            with ThreadPoolExecutor(self.client.concurrency) as pool:
                assert sum(pool.map(part, starts)) == len(self.data)
        return _OBJECTS * len(self.data)

    def put_small(self) -> int:
        return self._all(lambda number: self.store.put(f"small/{number}", self.data[:_SMALL_BYTES]))

    def put_small_bare(self) -> int:
        data = self.data[:_SMALL_BYTES]
        return self._all(lambda number: obstore.put(self.client.once, self.key(f"small/{number}"), data))

    def get_small(self) -> int:
        return self._all(lambda number: self.store.read(f"small/{number}"))

    def get_small_bare(self) -> int:
        return self._all(lambda number: obstore.get(self.client.once, self.key(f"small/{number}")).bytes())

    def _all(self, move: Callable[[int], object]) -> int:
        with ThreadPoolExecutor(self.client.concurrency) as pool:
            for _ in pool.map(move, range(self.small)):
                pass
        return self.small * _SMALL_BYTES


KINDS = ("put_large", "get_large", "put_small", "get_small")


@dataclass(frozen=True, slots=True)
class Speed:
    """Bytes per second, and CPU seconds of this process per GB."""

    speed: float
    cpu: float


def timed(move: Callable[[], int]) -> Speed:
    """Run `move` once."""
    wall, cpu = time.perf_counter(), time.process_time()
    moved = move()
    return Speed(moved / (time.perf_counter() - wall), (time.process_time() - cpu) / moved * 1e9)


def measure(work: Work, rounds: int, kinds: Sequence[str] = KINDS) -> dict[str, list[tuple[Speed, Speed]]]:
    """For each kind and round what ucp did and what the bare client did; a first round warms up and does not count."""
    found: dict[str, list[tuple[Speed, Speed]]] = {kind: [] for kind in kinds}
    for kind in kinds:
        getattr(work, kind.replace("get", "put"))()
    for number in range(rounds + 1):
        for kind in kinds:
            ours, bare = (partial(timed, getattr(work, kind)), partial(timed, getattr(work, f"{kind}_bare")))
            if number % 2:
                first, second = ours(), bare()
                pair = (first, second)
            else:
                second, first = bare(), ours()
                pair = (first, second)
            if number:
                found[kind].append(pair)
    return found


def report(found: dict[str, list[tuple[Speed, Speed]]]) -> str:
    """Markdown."""
    rows = []
    for kind, pairs in found.items():
        ratios = [ours.speed / bare.speed for ours, bare in pairs]
        row = [kind.replace("_", " "), f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"]
        for column in zip(*pairs, strict=True):
            row.append(f"{statistics.median(entry.speed for entry in column) / 1e6:.0f}")
            row.append(f"{statistics.median(entry.cpu for entry in column):.2f}")
        rows.append(row)
    return table(["", "ratio", "ucp MB/s", "CPU-s/GB", "obstore MB/s", "CPU-s/GB"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", type=int, default=128, help="MiB of each of four large objects")
    parser.add_argument("--small", type=int, default=400, help="objects of 64 KiB")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    kinds = asked.kinds.split(",")
    store = open_store(f"{asked.url.rstrip('/')}/ucp-bench-{os.getpid()}")
    assert isinstance(store, CloudStore), "no object storage"
    data = np.random.default_rng(0).integers(0, 256, asked.large << 20, np.uint8).data
    buffer = memoryview(bytearray(len(data)))
    try:
        found = measure(Work(store, store.client, data, buffer, asked.small), asked.rounds, kinds)
        assert "get_large" not in kinds or buffer == data, "what was read is not what was written"
    finally:
        for entry in store.entries():
            store.delete(entry.path)
    print(report(found))
    if asked.json:
        rows = {kind: [[ours.speed, bare.speed] for ours, bare in pairs] for kind, pairs in found.items()}
        asked.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
