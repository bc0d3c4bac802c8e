"""What the ranks of a DeepSpeed job do.  Imports DeepSpeed; used inside a job's own process only."""

from __future__ import annotations

import importlib
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import load_file, save_file

from tests.support import engine as engines
from tests.support import truth as truths
from tests.support.case import Case
from tests.support.client_state import client_state
from tests.support.deepspeed_resume import Resume
from tests.support.engine import Job, Result
from tests.support.gloo import spawn


def run(case: Case, out: Path, *, timeout: float) -> None:
    """Run the case with forked ranks and write everything into `out`."""
    if case.launcher in _MODULES:
        importlib.import_module(_MODULES[case.launcher])
    engines.prepare_process()
    spawn(_train_and_save, case.world, case, str(out), timeout=timeout, method="fork")


def _train_and_save(rank: int, world: int, case: Case, out: str) -> None:
    folder = Path(out)
    truth, record, before, after = _LAUNCHERS[case.launcher](case, rank, world, folder)
    if rank == 0:
        save_file(truth, folder / "truth.safetensors")
        write_record(folder, {**record, "losses_before": before, "losses_after": after})


def _run_engine(case: Case, rank: int, world: int, folder: Path) -> Result:
    job = engines.build_job(case, rank, world)
    before = engines.train(job, 0, case.steps)
    save(job, folder / "ckpt")
    truth, record = truths.gather(job), describe(job)
    return truth, record, before, engines.train(job, case.steps, case.more_steps)


def _run_pipeline(case: Case, rank: int, world: int, folder: Path) -> Result:
    from tests.support import pipeline

    job = pipeline.build_job(case, rank, world)
    before = pipeline.train(job, 0, case.steps)
    save(job, folder / "ckpt")
    truth, record = pipeline.union(truths.gather(job), describe(job))
    return truth, record, before, pipeline.train(job, case.steps, case.more_steps)


def _run_trainer(case: Case, rank: int, world: int, folder: Path) -> Result:
    from tests.support import trainer

    return trainer.run(case, rank, world, folder, describe)


def _run_accelerate(case: Case, rank: int, world: int, folder: Path) -> Result:
    from tests.support import accelerated

    return accelerated.run(case, rank, world, folder, describe)


_MODULES = {
    "pipeline": "tests.support.pipeline",
    "trainer": "tests.support.trainer",
    "accelerate": "tests.support.accelerated",
}
_LAUNCHERS: dict[str, Callable[[Case, int, int, Path], Result]] = {
    "engine": _run_engine,
    "pipeline": _run_pipeline,
    "trainer": _run_trainer,
    "accelerate": _run_accelerate,
}


def run_resume(request: Resume, out: Path, *, timeout: float) -> None:
    """Load as the request says with forked ranks; write ``state.safetensors`` and ``case.json`` into `out`."""
    engines.prepare_process()
    spawn(_load_and_train, request.case.world, request, str(out), timeout=timeout, method="fork")


def _load_and_train(rank: int, world: int, request: Resume, out: str) -> None:
    folder = Path(out)
    job = engines.build_job(request.case, rank, world, load_universal=request.universal)
    if request.module_state is not None:
        load_module(job, Path(request.module_state))
    states = {"load_optimizer_states": False} if request.weights_only else {}
    path, client = job.engine.load_checkpoint(request.root, tag=request.tag, **states)
    if path is None:
        raise FileNotFoundError(f"DeepSpeed found no checkpoint to load under {request.root}")
    repair_loaded(job, request)
    if request.finish is not None:
        finish(request.finish)(job.engine, request.root)
    state = truths.gather(job)
    record = describe(job)
    losses = engines.train(job, request.first_step, request.steps)
    if rank == 0:
        save_file(state, folder / "state.safetensors")
        described = {key: repr(value) for key, value in client.items()}
        write_record(folder, {**record, "losses": losses, "client_state": described})


def repair_loaded(job: Job, request: Resume) -> None:
    """Undo what stock DeepSpeed's loaders do to an optimizer, as far as the request asks for it."""
    base = job.base_optimizer
    if request.reset_groups is not None:
        for group, values in zip(base.param_groups, request.reset_groups, strict=True):
            group.update(values)
    if request.separate_steps:
        for state in base.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()


def finish(name: str) -> Any:
    """The function that ``package.module:name`` names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def load_module(job: Job, path: Path) -> None:
    """Copy the file's tensors into the module's parameters and buffers of the same name."""
    module = job.engine.module
    values = load_file(str(path))
    own: dict[str, torch.Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, value in values.items():
        sharded = hasattr(own[name], "ds_id")
        with torch.no_grad(), deepspeed.zero.GatheredParameters([own[name]], modifier_rank=0, enabled=sharded):
            own[name].data.copy_(value)


def save(job: Job, root: Path) -> None:
    """Save through the engine, with the case's options."""
    case = job.case
    options = {"exclude_frozen_parameters": True} if case.exclude_frozen else {}
    job.engine.save_checkpoint(str(root), tag=case.tag, client_state=client_state(case), **options)
    if case.gather_16bit:
        job.engine.save_16bit_model(str(root.parent / "save16"), "pytorch_model.bin")


def describe(job: Job) -> dict[str, Any]:
    """Everything about the job's state that is not a tensor, at this moment."""
    engine, optimizer, case = job.engine, job.optimizer, job.case
    module = engine.module
    return {
        "case": case.to_json(),
        "root": case.root,
        "tag": case.tag,
        "layout": {"world": case.world, "dp": case.data_parallel, "pp": case.pipeline_stages, "stage": case.stage},
        "versions": {
            "deepspeed": deepspeed.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "optimizer": type(optimizer).__name__,
        "base_optimizer": type(job.base_optimizer).__name__,
        "global_steps": engine.global_steps,
        "skipped_steps": engine.skipped_steps,
        "loss_scale": loss_scale(job),
        "lrs": [group["lr"] for group in job.base_optimizer.param_groups],
        "groups": groups(job),
        "steps": truths.parameter_steps(job),
        "names": [name for name, _ in module.named_parameters(remove_duplicate=False)],
        "shared": shared_names(module),
        "scheduler": engine.lr_scheduler.state_dict()["last_epoch"] if engine.lr_scheduler is not None else None,
    }


def loss_scale(job: Job) -> float | None:
    """The current fp16 loss scale; None where the dtype needs none."""
    if job.case.dtype != "fp16":
        return None
    config = getattr(job.optimizer, "loss_scale_config", job.optimizer)
    return float(getattr(config, "cur_scale", None) or config.loss_scale)


def groups(job: Job) -> list[dict[str, Any]]:
    """Each optimizer group as its parameter names and its hyper-parameters that JSON can hold."""
    kept = (int, float, bool, str, list, tuple, type(None))
    return [
        {"names": names, "hyper": {k: v for k, v in group.items() if k != "params" and isinstance(v, kept)}}
        for names, group in zip(job.groups, job.base_optimizer.param_groups, strict=True)
    ]


def shared_names(module: torch.nn.Module) -> dict[str, str]:
    """Names that are a second name of another parameter (tied weights)."""
    first: dict[int, str] = {}
    shared = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            shared[name] = first[id(parameter)]
        first.setdefault(id(parameter), name)
    return shared


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write ``case.json``."""
    (folder / "case.json").write_text(json.dumps(record, indent=1))
