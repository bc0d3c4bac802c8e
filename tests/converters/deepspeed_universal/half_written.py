"""Offer stock DeepSpeed a universal folder file by file, and see from when on it loads it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.case import Case
from tests.support.deepspeed_job import job_environment, run_module


def run(case: Case, complete: Path, partial: Path, order: Sequence[str]) -> dict[str, list[int]]:
    """Copy the files of `complete` to `partial` in the given order.

    Gives the numbers of files with which DeepSpeed loads, by tag and by ``latest_universal``; `case` has one rank.
    """
    job = {"case": case.to_json(), "complete": str(complete), "partial": str(partial), "order": list(order)}
    partial.mkdir()
    run_module(__name__, json.dumps(job), timeout=240)
    found: dict[str, list[int]] = json.loads((partial / "loaded.json").read_text())
    return found


def main() -> None:
    """Do what the job on standard input says."""
    os.environ.update(job_environment())
    job = json.load(sys.stdin)
    from tests.support import engine as engines
    from tests.support.gloo import spawn

    engines.prepare_process()
    (loaded,) = spawn(_rank, 1, job, timeout=200, method="fork")
    (Path(job["partial"]) / "loaded.json").write_text(json.dumps(loaded))


def _rank(rank: int, world: int, job: dict[str, Any]) -> dict[str, list[int]]:
    from tests.support.engine import build_job

    engine = build_job(Case.from_json(job["case"]), rank, world, load_universal=True).engine
    complete, partial, order = Path(job["complete"]), Path(job["partial"]), job["order"]
    tag = (complete / "latest_universal").read_text()
    loaded: dict[str, list[int]] = {"tag": [], "latest": []}
    for count in range(len(order) + 1):
        if count:
            path = order[count - 1]
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(complete / path, partial / path)
        for how, name in (("tag", tag), ("latest", None)):
            if _loads(engine, partial, name):
                loaded[how].append(count)
    return loaded


def _loads(engine: Any, root: Path, tag: str | None) -> bool:
    try:
        path, _ = engine.load_checkpoint(str(root), tag=tag)
    except Exception as refusal:
        print(f"{type(refusal).__name__}: {refusal}", file=sys.stderr)
        return False
    return path is not None


if __name__ == "__main__":
    main()
