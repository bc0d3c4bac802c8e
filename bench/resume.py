"""Time to resume: DeepSpeed loading its own checkpoint, against `ucp.load` straight from the same folder into FSDP2.

    python -m bench.resume [--millions 240] [--rounds 5] [--stages 1,3] [--folder DIR] [--json FILE]

Four ranks on gloo. The clock runs from the call to its return, after model, engine and optimizer are built; the
checkpoint is in the page cache. A last, unmeasured load of both compares what the ranks hold, tensor by tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.make import CACHE, REPOSITORY, Made, made
from bench.measure import warm
from bench.report import file_system, machine, spread, table
from tests.support.deepspeed_job import job_environment

STOCK, UCP = "engine.load_checkpoint", "ucp.load into FSDP2"
_HOW = {STOCK: "stock", UCP: "ucp"}
_MB, _MIB = 1e6, 2**20

Ranks = list[dict[str, Any]]
"""What each rank says of its load; see `bench.resume_ranks.Loaded`."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Loads of one checkpoint by name, one list of ranks per round; `compared` tensors were equal in both."""

    made: Made
    runs: dict[str, list[Ranks]]
    compared: int

    def walls(self, name: str) -> list[float]:
        """Seconds until the last rank was done, per round."""
        return [max(rank["wall"] for rank in ranks) for ranks in self.runs[name]]


def run(made: Made, *, rounds: int) -> Outcome:
    """Load with both, in turn, `rounds` times; then compare what they load."""
    runs: dict[str, list[Ranks]] = {name: [] for name in _HOW}
    for number in range(rounds):
        for name, rounds_of_it in runs.items():
            ranks = _load(made, name)
            rounds_of_it.append(ranks)
            wall = max(rank["wall"] for rank in ranks)
            print(f"zero{made.stage} round {number + 1}: {name} {wall:.2f} s", flush=True)
    return Outcome(made, runs, _compare(made))


def _load(made: Made, name: str, *, check: bool = False) -> Ranks:
    """One load in fresh processes, from a warm page cache."""
    request = {
        "how": _HOW[name],
        "root": str(made.root),
        "stage": made.stage,
        "layers": made.layers,
        "ranks": made.ranks,
        "check": check,
    }
    warm(made.files)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(request, file)
        file.flush()
        command = [sys.executable, "-m", "bench.resume_ranks", file.name]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=job_environment(), capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        raise RuntimeError(f"{name}: {done.stderr[-4000:]}")
    found: Ranks = json.loads(done.stdout.splitlines()[-1])
    return found


def _compare(made: Made) -> int:
    """Load with both once more and compare every master weight and moment on every rank; how many there are."""
    stock, ours = ([rank["held"] for rank in _load(made, name, check=True)] for name in _HOW)
    assert len(stock[0]) == 3 * made.tensors, f"DeepSpeed holds {len(stock[0])} tensors of {3 * made.tensors}"
    differing = {key for a, b in zip(stock, ours, strict=True) for key in {*a, *b} if a.get(key) != b.get(key)}
    assert not differing, f"{len(differing)} tensors differ, such as {min(differing)}"
    return len(stock[0])


def page(outcome: Outcome) -> str:
    """Markdown of one outcome."""
    made = outcome.made
    head = f"### ZeRO-{made.stage}, {made.ranks} ranks, {made.parameters / 1e6:.1f}M parameters"
    rows = [_row(outcome, name) for name in outcome.runs]
    columns = ["load", "wall s", "x DeepSpeed", "CPU s, all ranks", "read MB, all ranks", "most of one", "peak MiB"]
    value = ratio(outcome)
    verdict = f"Target: at most 1 x DeepSpeed's time; {value:.2f} measured, {'met' if value <= 1 else '**not met**'}."
    compared = f"All {outcome.compared} tensors that both loaded are equal, bit for bit."
    return "\n\n".join([head, table(columns, rows), compared, verdict])


def _row(outcome: Outcome, name: str) -> list[str]:
    rounds = outcome.runs[name]
    stock = outcome.walls(STOCK)
    return [
        name,
        spread(outcome.walls(name)),
        f"{statistics.median(a / b for a, b in zip(outcome.walls(name), stock, strict=True)):.2f}",
        spread([sum(rank["cpu"] for rank in ranks) for ranks in rounds]),
        f"{max(sum(rank['read'] for rank in ranks) for ranks in rounds) / _MB:,.0f}",
        f"{max(rank['read'] for ranks in rounds for rank in ranks) / _MB:,.0f}",
        f"{max(rank['peak'] for ranks in rounds for rank in ranks) / _MIB:,.0f}",
    ]


def ratio(outcome: Outcome) -> float:
    """Median over rounds of our time against DeepSpeed's in the same round."""
    pairs = zip(outcome.walls(UCP), outcome.walls(STOCK), strict=True)
    return statistics.median(ours / stock for ours, stock in pairs)


def _document(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "machine": machine(),
        "outcomes": [
            {
                "stage": outcome.made.stage,
                "parameters": outcome.made.parameters,
                "runs": outcome.runs,
                "tensors_compared": outcome.compared,
            }
            for outcome in outcomes
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure time to resume side by side with DeepSpeed's own loading.")
    parser.add_argument("--millions", type=float, default=240, help="parameters of the model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stages", type=lambda text: [int(n) for n in text.split(",")], default=[1, 3])
    parser.add_argument("--folder", type=Path, default=CACHE, help="where checkpoints are kept")
    parser.add_argument("--json", type=Path, help="write every single measurement there")
    given = parser.parse_args()
    folder = given.folder.absolute()
    os.environ.pop("OMP_NUM_THREADS", None)
    print(f"{machine()}, {file_system(folder)}")
    outcomes = []
    for stage in given.stages:
        checkpoint = made(stage=stage, millions=given.millions, ranks=4, folder=folder)
        outcomes.append(run(checkpoint, rounds=given.rounds))
        print("\n" + page(outcomes[-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(_document(outcomes), indent=1))


if __name__ == "__main__":
    main()
