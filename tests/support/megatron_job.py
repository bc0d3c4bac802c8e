"""Run real Megatron-Core models on CPU: ``python -m tests.support.megatron_job -``, with the jobs as JSON on stdin.

Megatron-Core is imported once and every grid's ranks are forked from that process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.support.gloo import spawn
from tests.support.megatron import Grid, Model

RUN_LIMIT = 120.0
"""Seconds one grid may take before its ranks are killed."""


def main() -> None:
    """Make each model at one rank, then hold it on each grid."""
    request = json.load(sys.stdin)
    # Imported before any rank is forked, so that ranks start with everything loaded.
    from tests.support import megatron_cpu, megatron_ranks

    megatron_cpu.patch()
    for job in request["jobs"]:
        layers = job["model"]["expert_layers"]
        model = Model(**{**job["model"], "expert_layers": None if layers is None else tuple(layers)})
        folder = Path(request["folder"]) / model.name
        folder.mkdir(parents=True)
        for listed in job["grids"]:
            grid = Grid(**listed)
            spawn(megatron_ranks.hold, grid.world, model, grid, str(folder), timeout=RUN_LIMIT, method="fork")


if __name__ == "__main__":
    main()
