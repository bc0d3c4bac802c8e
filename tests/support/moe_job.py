"""Run real DeepSpeed MoE jobs and resumes of them in a fresh process.

``python -m tests.support.moe_job -`` reads a list of jobs from standard input: ``{"case": …, "out": folder}`` trains
and saves; with ``"root"`` it loads that save root and trains on.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.deepspeed_job import RUN_LIMIT, job_environment, run_module
from tests.support.moe_case import MoeCase


def run_jobs(jobs: Mapping[Path, MoeCase]) -> None:
    """Run the jobs one after the other; each folder gets ``ckpt/``, ``truth.safetensors`` and ``case.json``."""
    listing = [{"case": case.to_json(), "out": str(out)} for out, case in jobs.items()]
    run_module(__name__, json.dumps(listing), timeout=60.0 + RUN_LIMIT * len(listing))


def resume(requests: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """Run resumes: keys ``case``, ``root``, ``tag``, ``universal``, ``finish``, ``first``; a folder for each.

    RuntimeError with DeepSpeed's traceback if any fails.
    """
    folders = [out / str(number) for number in range(len(requests))]
    listing = [
        {**request, "case": request["case"].to_json(), "root": str(request["root"]), "out": str(folder)}
        for request, folder in zip(requests, folders, strict=True)
    ]
    run_module(__name__, json.dumps(listing), timeout=60.0 + RUN_LIMIT * len(listing))
    return folders


def main() -> None:
    """Run the jobs on standard input."""
    os.environ.update(job_environment())
    # Imported before any rank is forked, so that ranks start with everything loaded.
    from tests.support import moe_ranks

    for job in json.load(sys.stdin):
        case, out = MoeCase.from_json(job["case"]), Path(job["out"])
        out.mkdir(parents=True)
        if "root" not in job:
            moe_ranks.run(case, out, timeout=RUN_LIMIT)
            continue
        moe_ranks.run_resume(
            case,
            job["root"],
            out,
            tag=job.get("tag"),
            universal=job.get("universal", True),
            finish=job.get("finish", False),
            first=job.get("first", case.steps),
            timeout=RUN_LIMIT,
        )


if __name__ == "__main__":
    main()
