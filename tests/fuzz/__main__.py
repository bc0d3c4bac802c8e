"""Fuzz readers: ``python -m tests.fuzz [--seconds N] [--keep N] [TARGET ...]``; by default each target in turn.

Needs atheris (the extra ``fuzz``), which counts what of the bytecode of ``ucp`` an input reached. An input that breaks
a rule is kept in ``tests/fuzz/corpus/TARGET`` as ``found-…``, where the ordinary tests run it from then on.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz.memory import ViolationError
from tests.fuzz.target import CORPUS, Target
from tests.fuzz.targets import TARGETS

_MOST_BYTES = 1 << 16
_LARGEST_KEPT = 1 << 12
_COUNTED = 150
_STAT = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
_COVERED = re.compile(r"\bcov: (\d+)")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the readers.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=" ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default: 60)")
    parser.add_argument("--keep", type=int, default=0, help="how many new inputs to add to each corpus")
    options = parser.parse_args()
    unknown = sorted(set(options.targets) - TARGETS.keys())
    if unknown:
        parser.error(f"no target {unknown[0]!r}; known: {' '.join(TARGETS)}")
    names = options.targets or list(TARGETS)
    return max([_run(TARGETS[name], options.seconds, options.keep) for name in names])


def _run(target: Target, seconds: int, keep: int) -> int:
    """Fuzz one target in a process of its own; 1 if it found something."""
    kept = CORPUS / target.name
    largest = max(path.stat().st_size for path in target.inputs)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        new = Path(folder, "new")
        new.mkdir()
        options = (
            f"-max_total_time={seconds}",
            f"-max_len={min(_MOST_BYTES, 4 * largest)}",
            f"-artifact_prefix={kept}/found-",
            "-timeout=20",
            "-rss_limit_mb=3000",
            "-print_final_stats=1",
        )
        before = set(kept.glob("found-*"))
        command = [sys.executable, "-m", "tests.fuzz.engine", target.name, str(kept), *options, str(new), str(kept)]
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        done = subprocess.run(
            command, stderr=subprocess.PIPE, text=True, errors="replace", env=environment, check=False
        )
        _strictly(target, sorted(new.iterdir()), kept)
        found = sorted(set(kept.glob("found-*")) - before)
        _keep(sorted(new.iterdir()), kept, keep)
    runs, covered = _STAT.search(done.stderr), _COVERED.findall(done.stderr)
    print(
        f"{target.name}: {runs[1] if runs else '?'} runs, {covered[-1] if covered else '?'} places, {len(found)} found"
    )
    if found or done.returncode or not runs:
        print(done.stderr[-20_000:], file=sys.stderr)
        return 1
    return 0


def _strictly(target: Target, inputs: list[Path], kept: Path) -> None:
    """Count the work of what was reached, which the engine cannot; the first input that takes too much is kept."""
    for path in target.inputs:
        target.warm(path.read_bytes())
    for path in random.Random(0).sample(inputs, min(_COUNTED, len(inputs))):
        data = path.read_bytes()
        try:
            target.watched(data)
        except ViolationError as error:
            print(f"FOUND {target.name}: {error}")
            (kept / f"found-{path.name[:12]}").write_bytes(data)
            return


def _keep(inputs: list[Path], kept: Path, most: int) -> None:
    small = [path for path in inputs if path.stat().st_size <= _LARGEST_KEPT]
    for path in random.Random(0).sample(small, min(most, len(small))):
        (kept / path.name[:16]).write_bytes(path.read_bytes())


if __name__ == "__main__":
    sys.exit(main())
