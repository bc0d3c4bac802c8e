"""Real engines inside runs, in ranks that are forked after DeepSpeed is imported once.

``python -m tests.elastic.frameworks.deepspeed_checks -`` reads ``[jobs, file]``, where a job is the name of a function
here, a number of ranks and arguments, and writes what each rank gave to that file.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

from tests.elastic.frameworks.deepspeed_job import MICRO, SAMPLES, WIDTH, build_model, dataset, mean_loss
from tests.support.gloo import spawn
from ucp.elastic import Batch, Feed, Needs, Run, keep, prefer
from ucp.elastic.deepspeed import batch_config, micro_batches, train_batch
from ucp.elastic.options import shared_memory
from ucp.errors import FitError, UsageError

BATCH = Batch(SAMPLES, micro=MICRO)
PIPED = Batch(12, micro=3)


def begin(url: str, **options: Any) -> Run:
    """A run without memory; `main` removes its folders, as one that fails leaves them for the next start."""
    return Run(url, job=f"checks-{os.getppid()}-{Path(url).name}", memory=None, **options)


def make(stage: int, entries: dict[str, Any], mesh: tuple[int, int] | None = None, **changes: Any) -> Any:
    """An engine whose step subtracts the gradient."""
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    config = {**entries, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True, **changes}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mesh_param=mesh)
    return engine


def fed(run: Run, batch: Batch = BATCH) -> Feed:
    feed = Feed(dataset(), batch, seed=3)
    feed.place(*run.seat)
    return feed


def whole(engine: Any) -> list[float]:
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return [float(x) for parameter in engine.module.parameters() for x in parameter.detach().flatten()]


def gradients(rank: int, world: int, stage: int, folder: str) -> dict[str, Any]:
    """One step of SGD with a rate of 1."""
    with begin(f"{folder}/gradients-{stage}-{world}", layouts=keep(), batch=BATCH) as run:
        engine, feed = make(stage, batch_config(BATCH, world)), fed(run)
        before = whole(engine)
        run.resume((engine, feed))
        for step in run.steps(1):
            for (given, wanted), backward in micro_batches(engine, feed):
                backward(mean_loss(engine(given), wanted))
            run.step(step, (engine, feed))
        moved = [old - new for old, new in zip(before, whole(engine), strict=True)]
        return {"gradients": moved, "samples": engine.global_samples, "batch": engine.train_batch_size()}


def piped(rank: int, world: int, url: str, until: int, stages: int) -> dict[str, Any]:
    """A pipeline that goes on from what is at `url`."""
    needs = Needs(divides={"dp": [PIPED.samples // PIPED.micro]})
    with begin(url, layouts=keep(pp=stages), batch=PIPED, needs=needs, every=1) as run:
        deepspeed.init_distributed()  # takes the group of the run; a PipelineModule asks for it
        module = deepspeed.pipe.PipelineModule(
            list(build_model()), num_stages=stages, loss_fn=mean_loss, partition_method="uniform"
        )
        config = {**batch_config(PIPED, run.seat[1]), "zero_optimization": {"stage": 0}}
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        feed = fed(run, PIPED)
        state = {"engine": engine, "feed": feed}
        run.resume(state)
        losses = {}
        for step in run.steps(until):
            losses[step] = float(train_batch(engine, feed))
            run.step(step, state)
        return {"losses": losses, "samples": engine.global_samples, "position": feed.position}


def resume(run: Run, engine: Any, feed: Feed) -> None:
    run.resume((engine, feed))


def by_hand(run: Run, engine: Any, feed: Feed) -> None:
    for (given, wanted), weight in feed.step():
        engine.backward(mean_loss(engine(given), wanted) * weight)
        engine.step()
    run.step(1, (engine, feed))


def draw(run: Run, engine: Any, feed: Feed) -> None:
    for _ in micro_batches(engine, feed):
        pass


def twice(run: Run, engine: Any, feed: Feed) -> None:
    for (given, wanted), backward in micro_batches(engine, feed):
        backward(mean_loss(engine(given), wanted))
        backward(mean_loss(engine(given), wanted))


def early(run: Run, engine: Any, feed: Feed) -> None:
    for (given, wanted), backward in micro_batches(engine, feed):
        backward(mean_loss(engine(given), wanted))
        run.step(1, (engine, feed))


def refusals(rank: int, world: int, folder: str) -> dict[str, str]:
    """What is raised where gradients would not be those of the global batch, on two ranks."""
    told: dict[str, str] = {}

    @contextmanager
    def refused(name: str) -> Iterator[None]:
        try:
            yield
        except (UsageError, FitError) as error:
            told[name] = f"{error}; hint: {error.hint}"

    def in_run(name: str, engine_of: Callable[[], Any], work: Callable[..., None], **options: Any) -> None:
        with begin(f"{folder}/{name}", **{"layouts": keep(), "batch": BATCH, **options}) as run:
            engine = engine_of()
            with refused(name):
                work(run, engine, fed(run))

    entries = batch_config(BATCH, world)
    whole_batch = {"train_batch_size": 12, "gradient_accumulation_steps": 1}
    larger = {"train_micro_batch_size_per_gpu": 64, "gradient_accumulation_steps": 2}
    in_run("accumulation", lambda: make(1, whole_batch), resume)
    in_run("accumulation-in-step", lambda: make(1, whole_batch), draw, batch=None)
    in_run("size", lambda: make(1, larger), resume)
    in_run("sum", lambda: make(1, entries, gradient_allreduce_op="sum"), resume)
    in_run("unmanaged", lambda: make(1, entries, managed_gradient_accumulation=False), resume)
    in_run("tp", lambda: make(1, entries), resume, layouts=keep(tp=2), batch=None)
    in_run("placed", lambda: make(1, entries), misplaced, batch=None)
    in_run("by-hand", lambda: make(1, entries), by_hand)
    in_run("none", lambda: make(1, entries), draw)
    in_run("twice", lambda: make(1, entries), twice)
    in_run("early", lambda: make(1, entries), early, every=1)
    in_run("no-pipeline", lambda: make(1, entries), lambda run, engine, feed: train_batch(engine, feed))
    # Last: DeepSpeed keeps such a mesh for all engines that follow.
    in_run("sp", lambda: make(1, batch_config(BATCH, 1), mesh=(1, 2)), resume, layouts=keep(sp=2))
    with refused("spares"), begin(f"{folder}/spares", layouts=prefer({1: {"dp": 1}})):
        pass
    return told


def misplaced(run: Run, engine: Any, feed: Feed) -> None:
    feed.place(0, 1)
    for _ in micro_batches(engine, feed):
        pass


def pipeline_refusals(rank: int, world: int, folder: str) -> dict[str, str]:
    """What a pipeline of two stages cannot do."""
    told = {}
    uneven = Batch(10, micro=4)
    with begin(f"{folder}/uneven", layouts=keep(pp=2), batch=uneven) as run:
        deepspeed.init_distributed()
        module = deepspeed.pipe.PipelineModule([nn.Linear(WIDTH, 4), nn.Linear(4, 1)], num_stages=2, loss_fn=mean_loss)
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=batch_config(uneven, run.seat[1]))
        feed = fed(run, uneven)
        for name, work in [("uneven", train_batch), ("micro", lambda *both: next(micro_batches(*both)))]:
            try:
                work(engine, feed)
            except UsageError as error:
                told[name] = str(error)
    return told


def main() -> None:
    jobs, out = json.load(sys.stdin)
    try:
        found = [
            spawn(globals()[name], ranks, *given, method="fork", env={"GLOO_SOCKET_IFNAME": "lo"}, timeout=400)
            for name, ranks, given in jobs
        ]
    finally:
        for left in Path(shared_memory(), f"ucp-{os.geteuid()}").glob(f"checks-{os.getpid()}-*"):
            shutil.rmtree(left, ignore_errors=True)
    partial = Path(out).with_suffix(".partial")
    partial.write_text(json.dumps(found))
    os.replace(partial, out)


if __name__ == "__main__":
    main()
