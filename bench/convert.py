"""Conversion, side by side: `cp`, DeepSpeed's `ds_to_universal.py` and `ucp convert`, on a real checkpoint.

    python -m bench.convert [--millions 240] [--rounds 5] [--stages 1,3] [--folder DIR] [--json FILE]

In each round every command runs once, in turn, after the source has been read into the page cache. The fastest worker
counts of `ds_to_universal.py` are found in a first round, which is not counted for the others. At the end every tensor
of our result is compared with DeepSpeed's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import contenders, results
from bench.contenders import Contender
from bench.limits import Limits, limits_table, measure_limits
from bench.make import CACHE, Made, made
from bench.measure import Measurement, measure, warm
from bench.report import file_system, machine
from bench.same import compare


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was measured on one checkpoint. `startup` is each command's cost before it does anything, by its name."""

    made: Made
    tried: list[Contender]
    contenders: list[Contender]
    startup: dict[str, Measurement]
    interpreter: Measurement
    compared: int


def main() -> None:
    given = _arguments()
    folder = given.folder.absolute()
    # Whatever the caller's shell says, all commands run with the same, default number of threads.
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    room = folder / "room"
    print(f"{machine()}, {file_system(folder)}\n")
    limits = measure_limits(room, rounds=given.rounds)
    print(limits_table(limits), flush=True)
    outcomes = []
    for stage in given.stages:
        checkpoint = made(stage=stage, millions=given.millions, ranks=4, folder=folder)
        outcomes.append(run(checkpoint, room, rounds=given.rounds))
        print("\n" + results.page(outcomes[-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(_document(limits, outcomes), indent=1))


def run(made: Made, room: Path, *, rounds: int) -> Outcome:
    """Measure everything on one checkpoint, `rounds` times, in turn."""
    shutil.rmtree(room, ignore_errors=True)
    interpreter = measure([sys.executable, "-c", "pass"], output=room / "nothing")
    tried = [contenders.stock(made, room, workers) for workers in contenders.STOCK_WORKERS]
    for contender in tried:
        _once(contender, made)
    fastest = min(tried, key=lambda contender: contender.walls[0])
    raced = [
        *contenders.copies(made, room),
        dataclasses.replace(fastest, runs=[]),
        contenders.ucp(made, room, check=True),
        contenders.ucp(made, room, check=False),
    ]
    for number in range(rounds):
        for contender in raced:
            _once(contender, made)
            print(f"zero{made.stage} round {number + 1}: {contender.name} {contender.walls[-1]:.2f} s", flush=True)
    startup = {c.name: measure(c.startup, output=room / "nothing") for c in raced}
    _check_reports(raced)
    by_name = {contender.name: contender for contender in raced}
    compared = compare(by_name[contenders.UCP].output, by_name[fastest.name].output, tensors=made.tensors)
    compared += compare(by_name[contenders.UNCHECKED].output, by_name[fastest.name].output, tensors=made.tensors)
    shutil.rmtree(room)
    return Outcome(made, tried, raced, startup, interpreter, compared)


def _once(contender: Contender, made: Made) -> None:
    """One run into an empty place, from a warm page cache, with nothing of others' left to write back."""
    shutil.rmtree(contender.output, ignore_errors=True)
    contender.output.parent.mkdir(parents=True, exist_ok=True)
    warm(made.files)
    contender.run()
    if contender.name.startswith("cp"):
        shutil.rmtree(contender.output)


def _check_reports(raced: Sequence[Contender]) -> None:
    """What `ucp convert` says of itself must agree with what the kernel counted, start-up aside."""
    for contender in raced:
        if not contender.name.startswith("ucp"):
            continue
        for measured in contender.runs:
            said = contenders.reported(measured)
            read, written = said["bytes_read"] + said["bytes_checked"], said["bytes_written"]
            for word, counted, reported in (("read", measured.read, read), ("wrote", measured.written, written)):
                assert 0 <= counted - reported < _SLACK, f"{contender.name} {word} {counted}, but says {reported}"


_SLACK = 64 << 20
"""Bytes that start-up (imports), metadata of the source and the journal may add."""


def _document(limits: Limits, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "machine": machine(),
        "limits": limits,
        "outcomes": [
            {
                "checkpoint": {k: v for k, v in dataclasses.asdict(outcome.made).items() if k != "root"},
                "runs": {c.name: [_numbers(run) for run in c.runs] for c in (*outcome.tried, *outcome.contenders)},
                "startup": {name: _numbers(run) for name, run in outcome.startup.items()},
                "interpreter": _numbers(outcome.interpreter),
                "tensors_compared": outcome.compared,
            }
            for outcome in outcomes
        ],
    }


def _numbers(run: Measurement) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(run).items() if key != "stdout"}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure conversion side by side with cp and ds_to_universal.py.")
    parser.add_argument("--millions", type=float, default=240, help="parameters of the model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stages", type=lambda text: [int(n) for n in text.split(",")], default=[1, 3])
    parser.add_argument("--folder", type=Path, default=CACHE, help="where checkpoints are kept and results are written")
    parser.add_argument("--json", type=Path, help="write every single measurement there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
