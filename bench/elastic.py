"""Recovery from a killed process and a lost node, from each tier of ucp, and by torch's DCP; writes docs/elastic.md.

    python -m bench.elastic [--out docs/elastic.md] [--json FILE] [--size SIZE] [--rounds N]
        [--only memory,local,storage,dcp] [--folder DIR]

The same job runs under torchrun on three nodes, torchrun's agents on this machine: saved to memory and storage, to
local disk and storage, to storage alone, and with ``dcp.save`` to the same storage. In the same two steps of each, a
worker is killed, and a node with all it holds; a little later another node comes. ``--out`` puts the tables between the
marks in that page.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.elastic_jobs import NODES, Request
from bench.elastic_nodes import RENDEZVOUS, watch
from bench.elastic_times import EVENTS, Cost, Recovery, cost, recoveries
from bench.report import file_system, load, machine, spread, table

BEGIN, END = "<!-- figures of python -m bench.elastic -->", "<!-- end of figures -->"
HOWS = ("memory", "local", "storage", "dcp")
STEPS = {"steps": 76, "often": 5, "seldom": 10, "rank_dies": 28, "node_dies": 49, "node_comes": 56}
SIZES = {"quick": (2, 128), "small": (6, 256), "usual": (8, 384), "full": (16, 512)}
"""Layers and width of the model."""
_PARTS = ("detect", "rendezvous", "start", "load", "resume")
_INNER = ("agree", "build", "plan", "read", "reshard")


@dataclass(frozen=True, slots=True)
class Run:
    """What one job came to. `held` are the most bytes in the nodes' memory."""

    how: str
    recoveries: Sequence[Recovery]
    cost: Cost
    held: int


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--size", choices=SIZES, default="usual")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default=",".join(HOWS))
    parser.add_argument("--folder", type=Path, help="where storage and local disks are; a temporary folder")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended
    before, runs = load(), list[Run]()
    disk = file_system(asked.folder or Path(tempfile.gettempdir()))
    for how in [how for _ in range(asked.rounds) for how in asked.only.split(",")]:
        started = time.monotonic()
        runs.append(one(how, asked.size, asked.folder))
        print(f"{how}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        text = page(runs, request_of(how, asked.size, ""), before, disk)
        if asked.json:
            asked.json.write_text(json.dumps([asdict(run) for run in runs], indent=1))
        if asked.out:
            asked.out.write_text(put_between(asked.out.read_text(), text))
    print(text)


def request_of(how: str, size: str, root: str) -> Request:
    """The job, the same for all but for `how`."""
    layers, width = SIZES[size]
    return Request(how, root, layers, width, 12, **STEPS)


def one(how: str, size: str, folder: Path | None) -> Run:
    """Run a job in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="ucp-elastic-", dir=folder) as root:
        request = request_of(how, size, root)
        seen = watch(request, Path(root))
        return Run(how, recoveries(request, seen), cost(request, seen), seen.held)


def put_between(text: str, figures: str) -> str:
    """`text` with `figures` between its marks."""
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise ValueError(f"the page has no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n\n{figures}\n\n{END}{after}"


def page(runs: Sequence[Run], request: Request, before: float, storage: str) -> str:
    """Markdown of all runs."""
    first = runs[0].cost
    head = (
        f"{len(NODES)} nodes of one rank each, for a while {len(NODES) - 1}; a transformer of {request.layers} layers, "
        f"FSDP2, AdamW, {first.bytes / 1e6:,.0f} MB of state in float32. Memory and local disk every "
        f"{request.often} steps, storage (a folder on {storage}, dropped from the page cache at each kill) every "
        f"{request.seldom}. torchrun waits {RENDEZVOUS['last_call_timeout']} s for more nodes, and counts one as lost "
        f"after {RENDEZVOUS['keep_alive_max_attempt']} s of silence. {machine()}; "
        f"processes that wanted to run: {before:.0f} before, {load():.0f} at the end. "
        f"{_rounds(runs)}"
    )
    return "\n\n".join(filter(None, [head, _recovered(runs), _told(runs), _costs(runs, request)]))


def _rounds(runs: Sequence[Run]) -> str:
    count = sum(run.how == runs[0].how for run in runs)
    return "One run of each." if count == 1 else f"{count} runs of each: median (least-most)."


def _groups(runs: Sequence[Run]) -> list[tuple[str, str, list[Recovery]]]:
    """Recoveries that are alike, with what they are of."""
    found: dict[tuple[str, str, str], list[Recovery]] = {}
    for run in runs:
        for recovery in run.recoveries:
            found.setdefault((recovery.event, run.how, recovery.tier), []).append(recovery)
    ordered = sorted(found, key=lambda key: (EVENTS.index(key[0]), HOWS.index(key[1])))
    return [(event, _from(how, tier), found[event, how, tier]) for event, how, tier in ordered]


def _from(how: str, tier: str) -> str:
    return "storage, by `dcp.load`" if how == "dcp" else tier


def _recovered(runs: Sequence[Run]) -> str:
    rows = []
    for event, source, found in _groups(runs):
        times = [spread([one.parts[part] for one in found], digits=1) for part in _PARTS]
        whole, again = (spread(values, digits=1) for values in ([o.whole for o in found], [o.again for o in found]))
        rows.append([event, source, *times, whole, str(statistics.median_high([o.steps_lost for o in found])), again])
    head = ["what happened", "recovered from", *_PARTS, "all of it, s", "steps lost", "until they are made up for, s"]
    return table(head, rows)


def _told(runs: Sequence[Run]) -> str:
    ours = [(event, source, found) for event, source, found in _groups(runs) if any(one.inner for one in found)]
    rows = [[event, source, *(_inner(found, part) for part in _INNER)] for event, source, found in ours]
    return table(["what happened", "recovered from", *_INNER], rows) if rows else ""


def _inner(found: Sequence[Recovery], part: str) -> str:
    values = [one.inner[part] for one in found if part in one.inner]
    return spread(values) if values else ""


def _costs(runs: Sequence[Run], request: Request) -> str:
    rows = []
    for how in dict.fromkeys(run.how for run in runs):
        found = [run for run in runs if run.how == how]
        costs = [run.cost for run in found]
        share = statistics.median(one.stall / (one.stall + request.often * one.train) for one in costs)
        rows.append(
            [
                "storage, by `dcp.save`" if how == "dcp" else how,
                spread([one.stall for one in costs], digits=3),
                spread([one.stall / one.copy for one in costs], digits=1),
                f"{share:.0%}",
                spread([one.step for one in costs]),
                f"{max(run.held / run.cost.bytes for run in found):.2f}",
                f"{statistics.median(one.sent for one in costs) * 1e-6:,.0f}",
            ]
        )
    head = ["saved to", "a step waits, s", "x bare copy", f"of the time, if every {request.often} steps"]
    return table([*head, "mean step, s", "memory held / state", "MB sent by a rank"], rows)


if __name__ == "__main__":
    main()
