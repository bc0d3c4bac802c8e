"""Saving: how long training waits, and how long a save takes, beside torch's distributed checkpoints and the machine.

    python -m bench.save [--folder DIR] [--ranks N] [--layers N] [--width N] [--rounds N] [--json FILE]

A transformer's matrices and AdamW's moments, sharded by FSDP2, on gloo ranks; on a machine with GPUs one rank each, and
NCCL. Everything is done in turns, in the same processes: what counts is the slowest rank's time in each round.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from bench import save_jobs
from bench.make import CACHE
from bench.report import file_system, load, machine, spread, table
from bench.save_jobs import Request, Round
from tests.support.gloo import spawn

# It does not say what it exports.
gpu_ranks: Any = torch.multiprocessing


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure saves.")
    parser.add_argument("--folder", type=Path, default=CACHE)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    room = given.folder / "save"
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir(parents=True)
    request = Request(str(room), given.layers, given.width, given.rounds)
    before = load()
    if torch.cuda.is_available():
        gpu_ranks.spawn(save_jobs.on_gpu, (given.ranks, request), nprocs=given.ranks)
        found = [json.loads((room / f"{rank}.json").read_text()) for rank in range(given.ranks)]
    else:
        found = spawn(save_jobs.run, given.ranks, request, timeout=3600, method="fork")
    shutil.rmtree(room, ignore_errors=True)
    print(page(found, room.parent, before))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


def page(found: Sequence[Sequence[Round]], folder: Path, before: float) -> str:
    """Markdown of the rounds of all ranks."""
    rounds = [{name: max(rank[name] for rank in one) for name in one[0]} for one in zip(*found, strict=True)]
    nbytes = sum(rank[0]["bytes"] for rank in found)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    head = (
        f"{len(found)} ranks ({where}), {nbytes / 1e6:,.0f} MB of state; {machine()}, {file_system(folder)}; "
        f"load before {before:.1f}, {len(rounds) - 1} rounds after a first one."
    )
    return "\n\n".join([head, _stalls(rounds), _blocking(rounds, nbytes), _training(rounds)])


def _stalls(rounds: Sequence[Round]) -> str:
    rows = []
    for name in ("copy", "ucp stall", "dcp stall", "dcp cached stall"):
        ratios = [
            f"{statistics.median(one[f'{name}{kind}'] / one[f'copy{kind}'] for one in rounds[1:]):.2f}"
            for kind in ("", " CPU")
        ]
        seconds = [spread([one[f"{name}{kind}"] for one in rounds[1:]], digits=3) for kind in ("", " CPU")]
        rows.append([name, seconds[0], ratios[0], seconds[1], ratios[1], f"{rounds[0][name]:.3f}"])
    return table(["what training waits for", "s", "x copy", "CPU s", "x copy", "first s"], rows)


def _blocking(rounds: Sequence[Round], nbytes: float) -> str:
    rows = []
    for name in ("disk", "ucp save", "dcp save", "ucp in background", "dcp in background"):
        ratio = statistics.median(one[name] / one["disk"] for one in rounds[1:])
        speed = nbytes / 1e9 / statistics.median(one[name] for one in rounds[1:])
        rows.append([name, spread([one[name] for one in rounds[1:]]), f"{ratio:.2f}", f"{speed:.2f}"])
    return table(["until it is durable", "s", "x disk", "GB/s"], rows)


def _training(rounds: Sequence[Round]) -> str:
    rows = []
    for name in ("quiet step", "ucp step", "dcp step"):
        ratio = statistics.median(one[name] / one["quiet step"] for one in rounds)
        rows.append([name, spread([one[name] for one in rounds], 1e-3), f"{ratio:.2f}"])
    return table(["a training step meanwhile", "ms", "x quiet"], rows)


if __name__ == "__main__":
    main()
