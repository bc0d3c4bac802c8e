"""What the ranks of a tensor-parallel job do.  Imports DeepSpeed; used inside a job's own process only."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import save_file
from torch import Tensor, distributed

from tests.support import engine as engines
from tests.support import truth as truths
from tests.support.deepspeed_ranks import groups as described_groups
from tests.support.engine import Job
from tests.support.gloo import spawn
from tests.support.tp.case import TpCase


def _launcher(case: TpCase) -> Any:
    return importlib.import_module(f"tests.support.tp.{case.launcher}")


def _prepare(case: TpCase) -> None:
    module = _launcher(case)
    if case.launcher == "autotp":
        module.build_model(case)
        importlib.import_module("deepspeed.module_inject.layers")
    engines.prepare_process()


def run(case: TpCase, out: Path, *, timeout: float) -> None:
    """Train, save, record the truth, train on."""
    _prepare(case)
    spawn(_train_and_save, case.world, case, str(out), timeout=timeout, method="fork")


def _train_and_save(rank: int, world: int, case: TpCase, out: str) -> None:
    module, folder = _launcher(case), Path(out)
    job = module.build_job(case, rank, world)
    before = module.train(job, 0, case.steps)
    job.engine.save_checkpoint(str(folder / "ckpt"), tag=case.tag, client_state=module.client_state(case))
    truth, record = whole(module, job)
    after = module.train(job, case.steps, case.more_steps)
    if rank == 0:
        save_file(truth, folder / "truth.safetensors")
        (folder / "case.json").write_text(json.dumps({**record, "losses_before": before, "losses_after": after}))


def run_resume(case: TpCase, root: str, finish: str | None, out: Path, *, timeout: float, universal: bool) -> None:
    """Load with stock DeepSpeed, record what arrived, train on."""
    _prepare(case)
    spawn(_load_and_train, case.world, case, root, finish, str(out), universal, timeout=timeout, method="fork")


def _load_and_train(
    rank: int, world: int, case: TpCase, root: str, finish: str | None, out: str, universal: bool
) -> None:
    module, folder = _launcher(case), Path(out)
    job = module.build_job(case, rank, world, load_universal=universal)
    path, _ = job.engine.load_checkpoint(root)
    if path is None:
        raise FileNotFoundError(f"DeepSpeed found no checkpoint to load under {root}")
    if finish is not None:
        name, _, function = finish.partition(":")
        getattr(importlib.import_module(name), function)(job.engine, root)
    truth, record = whole(module, job)
    losses = module.train(job, case.steps, case.more_steps)
    if rank == 0:
        save_file(truth, folder / "state.safetensors")
        (folder / "case.json").write_text(json.dumps({**record, "losses": losses}))


def run_load(case: TpCase, root: str, out: Path, *, timeout: float) -> None:
    """Load with ``ucp.load`` into the bare module and a torch optimizer, by the source's own program."""
    _prepare(case)
    spawn(_load_alone, case.world, case, root, str(out), timeout=timeout, method="fork")


def _load_alone(rank: int, world: int, case: TpCase, root: str, out: str) -> None:
    import ucp
    from tests.support.model import param_groups

    launcher = _launcher(case)
    module = launcher.build_module(case, rank)
    optimizer = torch.optim.AdamW(param_groups(module, groups=2))
    tp = launcher.Group.rank
    strict = case.pp == 1
    place = {"mesh": {"tp": case.tp}, "coordinate": {"tp": tp}}
    ucp.load((module, optimizer), root, program="source", strict=strict, **place)
    held = {}
    for name, parameter in module.named_parameters():
        states = optimizer.state[parameter]
        held[name] = {"param": parameter.detach(), **{k: states[k] for k in ("exp_avg", "exp_avg_sq")}}
    own = {
        "place": (module._grid.get_pipe_parallel_rank(), tp),
        "cuts": launcher.cuts_of(module),
        "truth": {f"{state}/{name}": value for name, states in held.items() for state, value in states.items()},
    }
    everyone: list[Any] = [None] * world
    distributed.all_gather_object(everyone, own)
    if rank == 0:
        save_file(_wholes(everyone, apart=set())[0], Path(out) / "state.safetensors")
        rates = {group["lr"] for group in optimizer.param_groups}
        (Path(out) / "case.json").write_text(json.dumps({"rates": sorted(rates)}))


def whole(module: Any, job: Job) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every tensor whole, and what is no tensor (collective): parts of all ranks put together by how they were cut."""
    own = {
        "place": module.place(job),
        "cuts": module.cuts(job),
        "truth": _gather(job),
        "steps": truths.parameter_steps(job),
        "groups": described_groups(job),
    }
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, own)
    apart: set[str] = set()
    tensors, cuts = _wholes(everyone, apart)
    record = {
        "case": job.case.to_json(),
        "deepspeed": deepspeed.__version__,
        "global_steps": job.engine.global_steps,
        "steps": {name: step for rank in everyone for name, step in rank["steps"].items()},
        "groups": _joined_groups([rank["groups"] for rank in everyone]),
        "cuts": cuts,
        "apart": sorted(apart),
    }
    return tensors, record


def _gather(job: Job) -> truths.Truth:
    """What this rank holds, over its data-parallel group. The optimizer knows no parameters of no elements."""
    empty = {name: p for name, p in job.engine.module.named_parameters() if not p.numel() and not hasattr(p, "ds_id")}
    if not empty:
        return truths.gather(job)
    found = {**truths._optimized(job), **truths._module_state(job)}
    kinds = {key.partition("/")[0] for key in found} - {"lowp", "buffer", "frozen"}
    found |= {f"{kind}/{name}": torch.zeros(p.shape) for name, p in empty.items() for kind in kinds}
    return {key: value.detach().cpu().contiguous().clone() for key, value in found.items()}


def _wholes(everyone: list[Any], apart: set[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Whole tensors out of what all ranks hold, and how each was cut; `apart` gets keys that stages trained apart."""
    parts: dict[str, dict[int, Tensor]] = {}
    cuts: dict[str, Any] = {}
    for rank in sorted(everyone, key=lambda rank: rank["place"]):
        stage, tp = rank["place"]
        cuts = {**rank["cuts"], **cuts}
        for key, value in rank["truth"].items():
            held = parts.setdefault(key, {})
            if not torch.equal(held.setdefault(tp, value), value):
                # DeepSpeed keeps only a tied layer's tied weight in step between stages.
                assert stage and "position_embeddings" in key, key
                apart.add(key)
    return {key: _join(held, cuts.get(key.partition("/")[2])).contiguous() for key, held in parts.items()}, cuts


def _join(parts: dict[int, Tensor], cut: Any) -> Tensor:
    pieces = [parts[tp] for tp in sorted(parts)]
    if cut is None:
        assert all(torch.equal(pieces[0], piece) for piece in pieces), "a replicated tensor differs between ranks"
        return pieces[0].clone()
    dim, fused = cut
    count = fused if isinstance(fused, int) else len(fused)
    widths = [[piece.shape[dim] // count for piece in pieces]] * count if isinstance(fused, int) else fused
    starts = [0] * len(pieces)
    found = []
    for part in widths:
        for tp, width in enumerate(part):
            found.append(pieces[tp].narrow(dim, starts[tp], width))
            starts[tp] += width
    return torch.cat(found, dim)


def _joined_groups(described: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    first = described[0]
    for other in described:
        assert [group["hyper"] for group in other] == [group["hyper"] for group in first]
    return [
        {"names": list(dict.fromkeys(n for groups in described for n in groups[i]["names"])), "hyper": group["hyper"]}
        for i, group in enumerate(first)
    ]
