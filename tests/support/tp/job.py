"""Run tensor-parallel DeepSpeed jobs in a fresh process: train and save, or load and train on.

`main` reads a list of ``{"case": …, "out": folder}`` from standard input; with ``root`` the job loads from there,
with ``load`` ucp does.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.deepspeed_job import job_environment, run_module
from tests.support.tp.case import TpCase

RUN_LIMIT = 180.0


def run_jobs(jobs: Mapping[Path, TpCase]) -> None:
    """Run the jobs, each into its folder: ``ckpt/``, ``truth.safetensors`` and ``case.json``."""
    _run([{"case": case.to_json(), "out": str(out)} for out, case in jobs.items()])


def run_resumes(
    resumes: Sequence[tuple[TpCase, Path]], out: Path, *, finish: str | None = None, universal: bool = True
) -> list[Path]:
    """Load each root in a job of the case; folders with ``state.safetensors`` and ``case.json``."""
    folders = [out / str(i) for i in range(len(resumes))]
    _run(
        [
            {"case": case.to_json(), "root": str(root), "out": str(folder), "finish": finish, "universal": universal}
            for (case, root), folder in zip(resumes, folders, strict=True)
        ]
    )
    return folders


def run_loads(loads: Sequence[tuple[TpCase, Path]], out: Path) -> list[Path]:
    """Load each root with ``ucp.load`` into the model of the case; folders as of `run_resumes`."""
    folders = [out / str(i) for i in range(len(loads))]
    _run(
        [
            {"case": case.to_json(), "load": str(root), "out": str(folder)}
            for (case, root), folder in zip(loads, folders, strict=True)
        ]
    )
    return folders


def _run(items: list[dict[str, Any]]) -> None:
    run_module(__name__, json.dumps(items), timeout=60.0 + RUN_LIMIT * len(items))


def main() -> None:
    """Run what standard input lists."""
    os.environ.update(job_environment())
    from tests.support.tp import ranks

    for item in json.loads(sys.stdin.read()):
        case, out = TpCase.from_json(item["case"]), Path(item["out"])
        partial = out.with_name(out.name + f".partial-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            if "load" in item:
                ranks.run_load(case, item["load"], partial, timeout=RUN_LIMIT)
            elif "root" in item:
                limits = {"timeout": RUN_LIMIT, "universal": item["universal"]}
                ranks.run_resume(case, item["root"], item["finish"], partial, **limits)
            else:
                ranks.run(case, partial, timeout=RUN_LIMIT)
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


if __name__ == "__main__":
    main()
