"""Run real Megatron-Core training on CPU: ``python -m tests.converters.megatron.write_job -``, jobs as JSON on stdin.

Megatron-Core is imported once and every job's ranks are forked from that process.
"""

from __future__ import annotations

import json
import sys

from tests.converters.megatron.write_support import as_job
from tests.support.gloo import spawn

RUN_LIMIT = 180.0
"""Seconds one job may take before its ranks are killed."""


def main() -> None:
    """Run the jobs in order."""
    jobs = [as_job(listed) for listed in json.load(sys.stdin)]
    # Imported before any rank is forked, so that ranks start with everything loaded.
    from tests.support import megatron_cpu

    megatron_cpu.patch()
    megatron_cpu.patch_optimizers()
    from tests.converters.megatron import write_training

    write_training.patch()
    for job in jobs:
        spawn(write_training.run, job.grid.world, job, timeout=RUN_LIMIT, method="fork")


if __name__ == "__main__":
    main()
