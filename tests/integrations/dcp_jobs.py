"""What ranks do in the tests of the adapters for torch.distributed.checkpoint."""

from __future__ import annotations

import multiprocessing
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import ucp
from tests.support import dcp_jobs
from tests.support.dcp_jobs import Job, Truth
from ucp.integrations.dcp import Reader, Writer

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def build(layout: str, world: int, seed: int) -> Job:
    torch.manual_seed(seed)
    return dcp_jobs.LAYOUTS[layout](world)


def trained(layout: str, world: int, rank: int) -> Job:
    job = build(layout, world, 7)
    for step in range(dcp_jobs.STEPS):
        dcp_jobs.train_step(job, rank, step)
    return job


def state_of(job: Job, form: str) -> dict[str, Any]:
    """The state dict of a job, nested as `form` says."""
    if form == "nested":
        return dcp_jobs._nested(job)
    weights, states = get_state_dict(job.model, job.optimizer, options=FLAT)
    if form == "flat":
        return {"app": {"model": weights, "optimizer": states}, "epoch": 3}
    return {**weights, "optimizer": states, "train_state": {"step": torch.tensor(2, dtype=torch.int32)}}


def install(job: Job, state: dict[str, Any], form: str) -> None:
    """Give a job what was loaded into its state dict."""
    if form == "nested":
        set_state_dict(job.model, job.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
        return
    if form == "flat":
        weights, states = state["app"]["model"], state["app"]["optimizer"]
    else:
        weights = {key: value for key, value in state.items() if key not in ("optimizer", "train_state")}
        states = state["optimizer"]
    set_state_dict(job.model, job.optimizer, model_state_dict=weights, optim_state_dict=states, options=FLAT)


def check_same(one: Truth, other: Truth) -> None:
    assert one.keys() == other.keys()
    for name, states in one.items():
        for state, kept in states.items():
            assert kept == other[name][state], f"{name}[{state}]"


def save_and_load(rank: int, world: int, root: str, moves: list[tuple[str, str, str, str]]) -> None:
    """Save each job, with ucp or with torch alone, and load it with ucp into another."""
    for number, (saver, layout, other, form) in enumerate(moves):
        job, folder = trained(layout, world, rank), f"{root}/{number}"
        truth, groups = dcp_jobs.truth_of(job), dcp_jobs._groups(job)
        if saver == "ucp":
            dcp.save(state_of(job, form), storage_writer=Writer(folder))
            _check_opened(folder, truth)
        else:
            dcp.save(state_of(job, form), checkpoint_id=folder)
        target = build(other, world, 99)
        for group in target.optimizer.param_groups:
            group.update(lr=7.0, weight_decay=0.5)
        state = state_of(target, form)
        dcp.load(state, storage_reader=Reader(folder))
        install(target, state, form)
        check_same(truth, dcp_jobs.truth_of(target))
        assert dcp_jobs._groups(target) == groups
        assert [group["lr"] for group in target.optimizer.param_groups] == [1e-2, 4e-3]
        losses = [dcp_jobs.train_step(one, rank, 9) for one in (job, target)]
        assert abs(losses[0] - losses[1]) < 1e-5


def _check_opened(folder: str, truth: Truth) -> None:
    with ucp.open(folder) as ckpt:
        assert (ckpt.step, set(ckpt.names)) == (dcp_jobs.STEPS, set(truth))
        for name, states in truth.items():
            for state, kept in states.items():
                found = ckpt[name][state][...]
                assert (tuple(found.shape), str(found.dtype).removeprefix("torch.")) == (kept.shape, kept.dtype)
                assert found.reshape(-1).view(torch.uint8).numpy().tobytes() == kept.data, f"{name}[{state}]"


def save_async(rank: int, world: int, root: str, process: bool) -> None:
    """What is changed as soon as `async_save` returns is not in the checkpoint."""
    kind = dcp.state_dict_saver.AsyncCheckpointerType
    if process:  # ranks of tests are daemons, which may have no children
        multiprocessing.current_process()._config["daemon"] = False
    job = trained("fsdp2", world, rank)
    truth = dcp_jobs.truth_of(job)
    done = dcp.async_save(
        state_of(job, "nested"),
        storage_writer=Writer(f"{root}/ck"),
        async_checkpointer_type=kind.PROCESS if process else kind.THREAD,
    )
    with torch.no_grad():
        for parameter in job.model.parameters():
            parameter.zero_()
    done.result()
    torch.distributed.barrier()
    _check_opened(f"{root}/ck", truth)


def fail(rank: int, world: int, root: str) -> list[str]:
    """What all ranks hear where one of them cannot save or load, and that nothing counts as a checkpoint then."""
    job = trained("fsdp2", world, rank)
    state = state_of(job, "nested")
    heard = []
    state["extra"]["odd"] = object()
    heard.append(_raised(lambda: dcp.save(state, storage_writer=Writer(f"{root}/odd"))))
    state["extra"]["odd"] = (state["model"]["embed.weight"],)
    heard.append(_raised(lambda: dcp.save(state, storage_writer=Writer(f"{root}/odd"))))
    state["extra"].pop("odd")
    dcp.save(state, storage_writer=Writer(f"{root}/ck"))
    heard.append(_raised(lambda: dcp.save(state, storage_writer=Writer(f"{root}/ck"))))
    state["model"]["unheard_of"] = torch.zeros(2)
    heard.append(_raised(lambda: dcp.load(state, storage_reader=Reader(f"{root}/ck"))))
    state["model"].pop("unheard_of")
    if rank == 0:
        _damage(f"{root}/ck/shards/rank-00001-0.safetensors")
    torch.distributed.barrier()
    heard.append(_raised(lambda: dcp.load(state, storage_reader=Reader(f"{root}/ck"))))
    return heard


def _raised(call: Any) -> str:
    try:
        call()
    except BaseException as error:  # DCP's own exception derives from this
        return str(error)
    raise AssertionError("nothing was raised")


def _damage(path: str) -> None:
    with open(path, "r+b") as file:
        file.seek(-3, 2)
        byte = file.read(1)
        file.seek(-3, 2)
        file.write(bytes([byte[0] ^ 1]))
