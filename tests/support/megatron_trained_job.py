"""Train and save real Megatron-Core models on CPU: ``python -m tests.support.megatron_trained_job -``, jobs on stdin.

Megatron-Core is imported once and every job's ranks are forked from that process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.support.gloo import spawn
from tests.support.megatron import Grid, Model
from tests.support.megatron_trained import Job

RUN_LIMIT = 240.0
"""Seconds one job may take before its ranks are killed."""


def main() -> None:
    """Run each job."""
    request = json.load(sys.stdin)
    # Imported before any rank is forked, so that ranks start with everything loaded.
    from tests.support import megatron_cpu, megatron_trained_ranks

    megatron_cpu.patch()
    megatron_cpu.patch_optimizers()
    for listed in request["jobs"]:
        job = _job(listed)
        folder = Path(request["folder"]) / job.name
        folder.mkdir(parents=True)
        spawn(megatron_trained_ranks.run, job.grid.world, job, str(folder), timeout=RUN_LIMIT, method="fork")


def _job(listed: dict[str, Any]) -> Job:
    layers = listed["model"]["expert_layers"]
    model = Model(**{**listed["model"], "expert_layers": None if layers is None else tuple(layers)})
    return Job(**{**listed, "model": model, "grid": Grid(**listed["grid"]), "formats": tuple(listed["formats"])})


if __name__ == "__main__":
    main()
