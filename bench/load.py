"""Loading under another layout, beside torch's distributed checkpoint and beside reading alone.

    python -m bench.load [--folder DIR] [--ranks N] [--saved N] [--layers N] [--width N] [--rounds N] [--json FILE]

A decoder's matrices, saved by rows on some gloo ranks, are loaded on others as DDP, FSDP2, TP, HSDP and FSDP2+TP hold
them. All ways take turns in the same processes, with the files in the page cache; what counts is the slowest rank. What
was loaded is compared bit for bit. On a machine with GPUs there is one rank each, and NCCL.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import load_jobs
from bench.load_jobs import LAYOUTS, Found, Request
from bench.make import CACHE
from bench.measure import warm
from bench.report import file_system, load, machine, spread, table
from tests.support.gloo import spawn
from ucp.converter import converter, families

Ranks = Sequence[dict[str, dict[str, list[Found]]]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure loads under another layout.")
    parser.add_argument("--folder", type=Path, default=CACHE)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 4)
    parser.add_argument("--saved", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    room = given.folder.absolute() / "load"
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir(parents=True)
    request = Request(str(room), given.layers, given.width, given.rounds)
    for family in families():
        converter(family)  # imported before the ranks are forked, as everything of torch is
    before = load()
    _job("save", given.saved, request)
    warm(sorted((room / "dcp").glob("*.distcp")))
    found = _job("load", given.ranks, request)
    shutil.rmtree(room, ignore_errors=True)
    print(page(found, request, before, given.folder))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


def _job(what: str, ranks: int, request: Request) -> Ranks:
    if not torch.cuda.is_available():
        return spawn(getattr(load_jobs, what), ranks, request, timeout=3600, method="fork")
    torch.multiprocessing.spawn(load_jobs.on_gpu, (ranks, what, request), nprocs=ranks)  # type: ignore[attr-defined,no-untyped-call]
    return [json.loads(Path(request.root, f"{rank}.json").read_text()) for rank in range(ranks)]


def page(found: Ranks, request: Request, before: float, folder: Path) -> str:
    """Markdown: a table for each layout."""
    needed = 4 * sum(math.prod(shape) for shape in load_jobs.shapes(request).values())
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    head = (
        f"{len(found)} ranks ({where}), {needed / 1e6:,.0f} MB of weights; {machine()}, {file_system(folder)}; "
        f"load before {before:.1f}, {request.rounds} rounds."
    )
    return "\n\n".join([head, *(f"### {layout}\n\n{_table(found, layout, needed)}" for layout in LAYOUTS)])


def _table(found: Ranks, layout: str, needed: int) -> str:
    ranks = [rank[layout] for rank in found]
    walls = {way: [max(rank[way][i]["wall"] for rank in ranks) for i in range(len(ranks[0][way]))] for way in ranks[0]}
    rows = []
    for way, times in walls.items():
        rounds = [[rank[way][i] for rank in ranks] for i in range(len(times))]
        rows.append(
            [
                way,
                spread(times),
                f"{statistics.median(a / b for a, b in zip(walls['dcp.load'], times, strict=True)):.2f}",
                spread([sum(one["cpu"] for one in held) for held in rounds]),
                f"{max(sum(one['read'] for one in held) for held in rounds) / needed:.3f}",
                f"{max(sum(one['received'] for one in held) for held in rounds) / 1e6:,.0f}",
                f"{max(one['peak'] for held in rounds for one in held) / 2**20:,.0f}",
            ]
        )
    return table(["", "wall s", "x faster", "CPU s, all", "read / needed", "from others MB", "peak MiB"], rows)


if __name__ == "__main__":
    main()
