"""The job of the elastic demo, as a user would write one: ``torchrun … -m ucp.demo.elastic.job URL``."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch
from torch import Tensor

from ucp.demo.elastic.model import Kind, Text, Trained, build
from ucp.demo.elastic.phases import Phases
from ucp.demo.elastic.records import Recorder
from ucp.demo.elastic.settings import Settings
from ucp.elastic import Batch, Feed, Local, Memory, Policy, Run, keep, prefer


def main(arguments: list[str] | None = None) -> None:
    """Train to the end, or until something kills this process."""
    settings = Settings.parsed(sys.argv[1:] if arguments is None else arguments)
    torch.set_num_threads(1)
    phases, records = Phases.from_environment(), Recorder.from_environment()
    phases.watch_saves()
    phases.reach("start")
    batch = Batch(settings.samples, settings.micro)
    with _run(settings, batch) as run:
        _train(run, settings, Feed(Text(), batch, seed=settings.seed), phases, records)


def _train(run: Run, settings: Settings, feed: Feed, phases: Phases, records: Recorder) -> None:
    place = run.seat[0] if run.active else -1
    mesh = dict(run.mesh.axes)
    records.start(epoch=run.epoch, rank=run.rank, world=run.world, mesh=mesh, dp=place, spare=run.spare)
    if run.spare:
        return  # leaving the run waits for the others
    feed.place(*run.seat)
    trained = _build(run, settings)
    history: list[list[int]] = []
    state = {
        "model": trained.model,
        "optimizer": trained.optimizer,
        "lr_scheduler": trained.scheduler,
        "sampler": feed,
        "history": history,
    }
    phases.reach("recovery")
    found = run.resume(state)
    history.append([run.epoch, run.done])
    records.resume(history=history, **_told(found))
    first = run.done + 1
    for step in run.steps(settings.steps):
        phases.wait(run.epoch, step, run.world)
        began = time.monotonic()
        loss = _step(trained, feed, phases)
        records.step(step=step, samples=list(feed.samples), loss=loss)
        run.step(step, state)
        if run.rank == 0 and step == first:
            records.recovered(parts=dict(run.report.parts))
        time.sleep(max(0.0, settings.pace - (time.monotonic() - began)))
    records.end(step=settings.steps, history=history)


def _step(trained: Trained, feed: Feed, phases: Phases) -> float:
    """One optimizer step; the sum of the losses of this rank's samples."""
    total = 0.0
    for (tokens, labels), weight in feed.step():
        phases.reach("forward")
        loss: Tensor = trained.model(tokens, labels)
        (loss * weight).backward()  # type: ignore[no-untyped-call]
        total += loss.item() * len(tokens)
    phases.reach("optimizer")
    trained.optimizer.step()
    trained.optimizer.zero_grad()
    trained.scheduler.step()
    return total


def _run(settings: Settings, batch: Batch) -> Run:
    """The run, with the tiers that `settings` want."""
    memory, disk = settings.memory, settings.disk
    return Run(
        settings.url,
        layouts=_policy(settings),
        batch=batch,
        memory=Memory(every=memory, copies=settings.copies, busy="wait") if memory else None,
        local=Local(settings.disk_root, every=disk, copies=settings.copies, busy="wait") if disk else None,
        job=os.environ.get("TORCHELASTIC_RUN_ID"),
        every=settings.every or None,
        keep_latest=3,
        timeout=settings.timeout,
    )


def _policy(settings: Settings) -> Policy:
    preferred = settings.preferred()
    sizes: dict[str, Any] = {} if preferred is not None else dict(settings.kept())
    return keep(**sizes) if preferred is None else prefer(preferred)


def _build(run: Run, settings: Settings) -> Trained:
    kind: Kind = "ddp" if settings.kind == "ddp" else "fsdp"
    return build(run.device_mesh("cpu"), kind=kind, dtype=getattr(torch, settings.dtype), layers=settings.layers)


def _told(found: Any) -> dict[str, Any]:
    """What there is to record of a resume."""
    if found is None:
        return {"step": 0, "tier": "none", "reconfigured": False, "parts": {}}
    return {
        "step": found.step,
        "tier": found.tier,
        "reconfigured": found.reconfigured,
        "parts": dict(found.seconds),
    }


if __name__ == "__main__":
    main()
