"""What it costs to set everything against its digests while it is loaded, as a ratio within one run.

    python -m bench.digests [--folder DIR] [--mib N] [--rounds N] [--json FILE]

`ucp.load` and `ucp.open(...).state_dict()` read the same checkpoint with and without ``verify``, in turns, each first
in every other round, from the page cache: the fastest storage there is, where digests cost the most. A ratio is the
median over the rounds. CPU seconds are those of the process with all its threads, and steadier than the clock where the
machine does other work as well.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import ucp
from bench.make import CACHE
from bench.report import table

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds by the clock and of CPU."""

    wall: float
    cpu: float


@dataclass(frozen=True, slots=True)
class Pair:
    """One way to load one checkpoint in one round: with digests and without."""

    with_digests: Cost
    without: Cost


Found = dict[tuple[str, str, str], list[Pair]]
"""By what is loaded, the form it has, and how it is loaded."""


def shapes(mib: int) -> dict[str, Tensors]:
    """The same bytes in few large tensors and in many small ones."""
    numbers = torch.randn(mib << 18, generator=torch.Generator().manual_seed(0))
    large = {f"layers.{n}.weight": one.reshape(-1, 1024) for n, one in enumerate(numbers.chunk(4))}
    small = {f"layers.{n}.weight": one.clone() for n, one in enumerate(numbers.reshape(-1, 64 << 10))}
    return {f"{len(large)} tensors": large, f"{len(small)} tensors": small}


def ways(url: str, tensors: Tensors) -> dict[str, Callable[[bool], object]]:
    """The calls that are measured."""
    target = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    return {
        "ucp.load": lambda verify: ucp.load(target, url, verify=verify),
        "state_dict()": lambda verify: ucp.open(url, verify=verify).state_dict(),
    }


def timed(call: Callable[[bool], object], verify: bool) -> Cost:
    """One call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call(verify)
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def pair(call: Callable[[bool], object], *, first: bool) -> Pair:
    """Both kinds of one call; `first` says which takes the first turn."""
    one, other = timed(call, first), timed(call, not first)
    return Pair(one, other) if first else Pair(other, one)


def measure(folder: Path, *, mib: int, rounds: int) -> Found:
    """All of it; a first round, in which memory is new, does not count."""
    found: Found = {}
    for what, tensors in shapes(mib).items():
        for form in ("native", "universal"):
            url = folder / form
            ucp.save(tensors, str(url), step=1, form=form)
            for name, call in ways(str(url), tensors).items():
                pairs = [pair(call, first=bool(number % 2)) for number in range(rounds + 1)]
                found[what, form, name] = pairs[1:]
            shutil.rmtree(url)
    return found


def extra(pairs: list[Pair], kind: str) -> list[float]:
    """By how much more digests make it, in each round."""
    return [getattr(one.with_digests, kind) / getattr(one.without, kind) - 1 for one in pairs]


def report(found: Found) -> str:
    """Markdown."""
    rows = []
    for (what, form, name), pairs in found.items():
        row = [f"{name}, {what}, {form}"]
        for kind in ("wall", "cpu"):
            more = extra(pairs, kind)
            row.append(f"{statistics.median(more):+.1%} ({min(more):+.1%} to {max(more):+.1%})")
        rows.append([*row, f"{statistics.median(one.without.wall for one in pairs):.2f}"])
    return table(["", "wall", "CPU", "s without digests"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=CACHE / "digests")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    found = measure(asked.folder, mib=asked.mib, rounds=asked.rounds)
    print(report(found))
    if asked.json:
        rows = {", ".join(key): [extra(pairs, "wall"), extra(pairs, "cpu")] for key, pairs in found.items()}
        asked.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
