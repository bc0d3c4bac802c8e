"""Run real DeepSpeed jobs: train, save, record the truth, train on.

    python -m tests.support.deepspeed_job jobs.json

`jobs.json` is a list of ``{"case": {...}, "out": folder}``.  DeepSpeed is imported once and every job's ranks are
forked from that process.  Each folder gets ``ckpt/`` (the save root), ``truth.safetensors`` and ``case.json``; it
appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.case import Case

RUN_LIMIT = 180.0
"""Seconds one job may take before its ranks are killed."""

REPOSITORY = Path(__file__).resolve().parents[2]


def job_environment() -> dict[str, str]:
    """Environment of a process that runs DeepSpeed on CPU."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.setdefault("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "universal-checkpoint-tests" / "ops"))
    environment["TOKENIZERS_PARALLELISM"] = "false"
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    # A warning of DeepSpeed's is no failure of ours.
    environment.pop("PYTHONWARNINGS", None)
    return environment


def run_jobs(jobs: Mapping[Path, Case], *, timeout: float | None = None) -> None:
    """Run the jobs in one fresh process, each into its folder; RuntimeError with the process's words if one fails."""
    listing = json.dumps([{"case": case.to_json(), "out": str(out)} for out, case in jobs.items()])
    run_module("tests.support.deepspeed_job", listing, timeout=timeout or 60.0 + RUN_LIMIT * len(jobs))


def run_module(module: str, stdin: str, *, timeout: float) -> str:
    """Run ``python -m module -`` with `stdin` in a fresh process; its standard output."""
    done = subprocess.run(
        [sys.executable, "-m", module, "-"],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=job_environment(),
        cwd=REPOSITORY,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{module} failed with code {done.returncode}:\n{done.stderr[-6000:]}")
    return done.stdout


def main(argv: list[str]) -> None:
    """Run the jobs listed in the file named by the first argument (``-`` is standard input)."""
    os.environ.update(job_environment())
    text = sys.stdin.read() if argv[1] == "-" else Path(argv[1]).read_text()
    # Imported before any rank is forked, so that ranks start with everything loaded.
    from tests.support import deepspeed_ranks

    for job in json.loads(text):
        case, out = Case.from_json(job["case"]), Path(job["out"])
        partial = out.with_name(out.name + f".partial-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            deepspeed_ranks.run(case, partial, timeout=RUN_LIMIT)
            os.replace(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def read_result(folder: Path) -> dict[str, Any]:
    """The job's ``case.json``."""
    result: dict[str, Any] = json.loads((folder / "case.json").read_text())
    return result


if __name__ == "__main__":
    main(sys.argv)
