"""Runs the script of the page on Megatron under torchrun, on the CPU; kills the rank that its order names."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from typing import Any

from tests.elastic.frameworks.megatron_job import tell


def main() -> None:
    order = json.loads(sys.argv[1])
    from tests.elastic.frameworks import megatron_model  # makes Megatron-Core run here
    from ucp.elastic import Run, options

    del megatron_model
    options._SHARED_MEMORY = order["root"]
    done = Run.step

    def step(run: Any, number: int, state: Any, **more: Any) -> None:
        done(run, number, state, **more)
        tell(run, order, step=number, position=state["feed"].position, tier=run.report.tier, mesh=dict(run.mesh.axes))
        if [run.epoch, run.rank, number] == order["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)

    Run.step = step  # type: ignore[method-assign, assignment]
    os.chdir(order["folder"])
    runpy.run_path(order["script"], run_name="__main__")


if __name__ == "__main__":
    main()
