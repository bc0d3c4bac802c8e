"""What the ranks of a `tests.support.deepspeed_live` job do.  Imports DeepSpeed; used in a job's own process only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import save_file

import ucp
from tests.support import deepspeed_ranks, engine, fsdp2_live, pipeline, truth
from tests.support.deepspeed_live import Live
from tests.support.engine import Job
from tests.support.fsdp2_live import Fsdp2
from tests.support.gloo import spawn
from tests.support.model import build_model, group_names, local_batch, param_groups
from tests.support.optimizers import build_optimizer
from ucp.integrations.deepspeed import async_save, attach, resume
from ucp.train.save import save


@dataclass(slots=True)
class Life:
    """A job going on, an `engine.Job` or an `Fsdp2`: `step` counts the batches that it has seen."""

    job: Any
    folder: Path
    step: int = 0
    losses: list[float] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    records: dict[str, Any] = field(default_factory=dict)


def run(live: Live, out: Path, *, timeout: float) -> None:
    """Run the job with forked ranks; files go to `out`."""
    engine.prepare_process()
    spawn(_live, live.case.world, live, str(out), timeout=timeout, method="fork")


def _live(rank: int, world: int, live: Live, out: str) -> None:
    made = fsdp2_live.build(live.case, rank, world) if live.fsdp2 else build(live, rank, world)
    life = Life(made, Path(out))
    for name, *arguments in live.actions:
        _ACTIONS[name](life, *arguments)
    if rank == 0:
        record = {"losses": life.losses, "reports": life.reports, "records": life.records}
        deepspeed_ranks.write_record(life.folder, record)


def build(live: Live, rank: int, world: int) -> Job:
    """The case's engine with the job's own configuration."""
    case = live.case
    if case.launcher == "pipeline":
        return pipeline.build_job(case, rank, world)
    deepspeed.init_distributed("gloo", verbose=False)
    model = build_model(seed=case.seed, tied=case.tied, frozen=case.frozen, unused=case.unused)
    optimizer = build_optimizer(case.optimizer, param_groups(model, groups=case.groups))
    names = group_names(model, case.groups)
    made, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=engine.scheduler_factory if case.scheduler else None,
        config=merged(engine.engine_config(case), live.config),
    )
    return Job(case, made, names, rank, world)


def merged(config: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """`config` with `more` over it, sections entry by entry."""
    return {**config, **{k: merged(config.get(k, {}), v) if isinstance(v, dict) else v for k, v in more.items()}}


def _train(life: Life, count: int) -> None:
    life.losses += _trainer(life.job)(life.job, life.step, count)
    life.step += count


def _trainer(job: Any) -> Callable[[Any, int, int], list[float]]:
    if isinstance(job, Fsdp2):
        return fsdp2_live.train
    return pipeline.train if job.case.launcher == "pipeline" else engine.train


def _at(life: Life, step: int) -> None:
    """Go on with the data of this step."""
    life.step = step


def _save(life: Life, url: str, options: dict[str, Any] | None = None) -> None:
    save(_target(life), url, **(options or {}))


def _async_save(life: Life, url: str) -> None:
    """Save while training goes on; it is committed when the job ends."""
    life.reports.append({"pending": url})
    handle = async_save(life.job.engine, url)
    _train(life, 1)
    handle.result()


def _load(life: Life, url: str, options: dict[str, Any] | None = None) -> None:
    report = ucp.load(_target(life), url, **(options or {}))
    life.reports.append({"text": str(report), "notes": report.notes, "not_loaded": report.not_loaded})


def _target(life: Life) -> Any:
    return life.job.engine if isinstance(life.job, Job) else life.job.state


def _state(life: Life, name: str) -> None:
    if isinstance(life.job, Fsdp2):
        _keep(life, name, fsdp2_live.gather(life.job))
        return
    tensors, made = truth.gather(life.job), life.job.engine
    counters = {key: getattr(made, key) for key in ("micro_steps", "global_samples")}
    record = {**deepspeed_ranks.describe(life.job), **counters}
    if life.job.case.launcher == "pipeline":
        tensors, record = pipeline.union(tensors, record)
    _keep(life, name, tensors)
    life.records[name] = record


def _keep(life: Life, name: str, tensors: dict[str, torch.Tensor]) -> None:
    if life.job.rank == 0:
        save_file(tensors, life.folder / f"{name}.safetensors")


def _stock_save(life: Life, root: str, tag: str | None = None) -> None:
    """The engine's own call, which is DeepSpeed's where ucp is not attached."""
    client = {"epoch": 3, "seen": torch.arange(3), "words": ["a", "b"]}
    life.job.engine.save_checkpoint(root, tag=tag, client_state=client)


def _stock_load(life: Life, root: str) -> None:
    path, client = life.job.engine.load_checkpoint(root)
    life.reports.append({"path": path, "client": {key: repr(value) for key, value in (client or {}).items()}})


def _attach(life: Life) -> None:
    """Let the engine's own calls work through ucp."""
    attach(life.job.engine)


def _resume(life: Life, url: str, tag: str | None = None) -> None:
    found = resume(life.job.engine, url, tag=tag)
    client = {key: repr(value) for key, value in found.client_state.items()}
    life.reports.append({"path": found.url, "client": client, "text": str(found.report)})


def _asked(life: Life, name: str) -> None:
    """What DeepSpeed's own calls tell of states, of some parameters."""
    told = {}
    for own, parameter in life.job.engine.module.named_parameters():
        if own in ("norm.weight", "blocks.1.qkv.weight"):
            told[f"param/{own}"] = safe_get_full_fp32_param(parameter)
            for kind in ("exp_avg", "exp_avg_sq"):
                told[f"{kind}/{own}"] = safe_get_full_optimizer_state(parameter, kind)
    _keep(life, name, {key: value.contiguous() for key, value in told.items()})


def _half_step(life: Life) -> None:
    """One micro batch of several: the gradients wait."""
    inputs, labels = local_batch(life.step, rank=life.job.rank, world=life.job.world)
    life.job.engine.backward(life.job.engine(inputs, labels))
    life.job.engine.step()


def _refused(life: Life, action: str, *arguments: Any) -> None:
    """The action must raise an error of ucp's; its words are kept."""
    try:
        _ACTIONS[action](life, *arguments)
    except ucp.UcpError as error:
        life.reports.append({"error": type(error).__name__, "message": str(error)})
    else:
        raise AssertionError(f"{action} was not refused")


def _nudge(life: Life) -> None:
    """Change the weights in place, as an optimizer step would."""
    for parameter in life.job.engine.module.parameters():
        with torch.no_grad():
            parameter.data.mul_(1.5)


_ACTIONS: dict[str, Callable[..., None]] = {
    "train": _train,
    "at": _at,
    "save": _save,
    "async_save": _async_save,
    "load": _load,
    "state": _state,
    "stock_save": _stock_save,
    "stock_load": _stock_load,
    "refused": _refused,
    "nudge": _nudge,
    "attach": _attach,
    "resume": _resume,
    "asked": _asked,
    "half_step": _half_step,
}
