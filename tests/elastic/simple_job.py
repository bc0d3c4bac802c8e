"""A job without ucp, for the cluster, the killer and the ledger: ranks add numbers, rank 0 keeps the sum in a file.

``simple_job.py STEPS [skip] [fast]``: with ``skip``, a job that resumes leaves out the first sample of its first step;
with ``fast``, it does not wait between steps.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from ucp.demo.elastic.phases import Phases
from ucp.demo.elastic.records import Recorder

SAMPLES = 12
PACE = 0.05
KEPT = 5
TIMEOUT = timedelta(seconds=20)


def main() -> None:
    phases, records = Phases.from_environment(), Recorder.from_environment()
    phases.reach("start")
    distributed.init_process_group("gloo", timeout=TIMEOUT)
    folder = Path(os.environ["UCP_DEMO_FOLDER"])
    try:
        train(folder, int(sys.argv[1]), "skip" in sys.argv, phases, records)
    except RuntimeError as error:
        print(error, flush=True)
        os._exit(1)
    distributed.destroy_process_group()


def train(folder: Path, until: int, skips: bool, phases: Phases, records: Recorder) -> None:
    rank, world = distributed.get_rank(), distributed.get_world_size()
    (state,) = shared([begin(folder) if rank == 0 else None])
    epoch, done = state["epoch"], state["step"]
    records.start(epoch=epoch, rank=rank, world=world, mesh={"dp": world}, dp=rank)
    phases.reach("recovery")
    history = [*state["history"], [epoch, done]]
    records.resume(step=done, tier="storage" if done else "none", reconfigured=False, history=history, parts={})
    for step in range(done + 1, until + 1):
        phases.wait(epoch, step, world)
        mine = list(range(rank, SAMPLES, world))
        if skips and done and step == done + 1 and rank == 0:
            mine.pop(0)
        phases.reach("forward")
        loss = sum(1 / (step + sample) for sample in mine)
        total = torch.tensor([loss])
        distributed.all_reduce(total)
        phases.reach("optimizer")
        records.step(step=step, samples=[step * SAMPLES + sample for sample in mine], loss=loss)
        distributed.barrier()
        if rank == 0 and step % KEPT == 0:
            keep(folder, {"epoch": epoch, "step": step, "history": history})
        time.sleep(0 if "fast" in sys.argv else PACE)
    records.end(step=until, history=history)
    distributed.barrier()


def begin(folder: Path) -> dict[str, Any]:
    """The state to go on from, with the number of this epoch, which is taken."""
    file = folder / "state.json"
    kept = json.loads(file.read_text()) if file.exists() else {"step": 0, "history": []}
    epochs = folder / "epoch"
    epoch = int(epochs.read_text()) + 1 if epochs.exists() else 1
    epochs.write_text(str(epoch))
    return {**kept, "epoch": epoch}


def keep(folder: Path, state: dict[str, Any]) -> None:
    new = folder / f"state.{os.getpid()}"
    new.write_text(json.dumps(state))
    new.rename(folder / "state.json")


def shared(objects: list[Any]) -> list[Any]:
    distributed.broadcast_object_list(objects)
    return objects


if __name__ == "__main__":
    main()
