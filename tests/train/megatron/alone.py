"""Small scenes of one Megatron-Core rank: ``python -m tests.train.megatron.alone -``, a folder on stdin, JSON out.

Each scene is a function of a folder; what it returns, or the error that it ends in, is what the tests look at.
"""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support.gloo import spawn


def main() -> None:
    """Run all scenes on one rank."""
    folder = sys.stdin.read().strip()
    from tests.support import megatron_cpu

    megatron_cpu.patch()
    megatron_cpu.patch_optimizers()
    from tests.converters.megatron import write_training

    write_training.patch()
    (found,) = spawn(_run, 1, folder, timeout=240, method="fork")
    json.dump(found, sys.stdout)


def _run(rank: int, world: int, folder: str) -> dict[str, Any]:
    del rank, world
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.core.parallel_state import destroy_model_parallel

    from tests.converters.megatron.write_support import Job
    from tests.programs.megatron.models import LLAMA, MIXTRAL
    from tests.support.megatron import ONE
    from tests.train.megatron.ranks import Saving

    found: dict[str, Any] = {}
    for scene in SCENES:
        base = dataclasses.replace(MIXTRAL, grouped=True) if scene is grouped else LLAMA
        training = Saving(Job(dataclasses.replace(base, layers=2), ONE, folder, first=1), ())
        if scene is not grouped:
            training.steps(0, 1)
        try:
            found[scene.__name__] = scene(training, Path(folder) / scene.__name__)
        except Exception as error:
            # What is raised is what is asked for.
            found[scene.__name__] = f"{type(error).__name__}: {error}"
        destroy_model_parallel()
        destroy_num_microbatches_calculator()
    return found


def drifted(training: Any, folder: Path) -> Any:
    """The fp32 values in a dict are not those of the weights."""
    state = training._dicts()
    next(iter(state["optimizer"]["param_state"].values()))["param"].data.add_(1)
    return _save(state, folder)


def without_model(training: Any, folder: Path) -> Any:
    """Weights that the optimizer trains are in no model given."""
    half = {"model": training.chunks[0].decoder, "optimizer": training.optimizer}
    return _save(half, folder)


def other_size(training: Any, folder: Path) -> Any:
    """A checkpoint of another model fits nowhere, and changes nothing."""
    from ucp.errors import UcpError
    from ucp.train.load import load

    _save({"model": training.ddp}, folder)
    for layer in training.chunks[0].decoder.layers:
        layer.mlp.linear_fc2.weight = torch.nn.Parameter(torch.zeros(48, 80))
    weight = training.chunks[0].embedding.word_embeddings.weight
    weight.data.fill_(3)
    try:
        load({"model": training.chunks}, str(folder))
    except UcpError as error:
        return [str(error), bool((weight == 3).all())]
    return None


def without_optimizer(training: Any, folder: Path) -> Any:
    """The optimizer's fp32 values would undo in the next step what is loaded into the weights alone."""
    from ucp.errors import UcpError
    from ucp.train.load import load

    _save({"model": training.ddp, "optimizer": training.optimizer}, folder)
    weight = training.chunks[0].embedding.word_embeddings.weight
    kept = weight.detach().clone()
    weight.data.fill_(3)
    told = None
    try:
        load({"model": training.chunks}, str(folder), strict=False)
    except UcpError as error:
        told = f"{type(error).__name__}: {error}"
    unchanged = bool((weight == 3).all())
    load({"model": training.chunks, "optimizer": training.optimizer}, str(folder))
    return [told, unchanged, bool(torch.equal(weight, kept))]


def other_schedule(training: Any, folder: Path) -> Any:
    """A schedule of other settings, where Megatron-Core wants the same."""
    from ucp.train.load import load

    state = {"model": training.ddp, "scheduler": training.scheduler}
    _save(state, folder)
    training.scheduler.use_checkpoint_opt_param_scheduler = False
    training.scheduler.max_lr = 1.0
    load(state, str(folder))
    return None


def other_backend(training: Any, folder: Path) -> Any:
    """Our strategy does not read Megatron-Core's own files."""
    from megatron.core import dist_checkpointing

    from ucp.integrations.megatron import LoadStrategy

    training.save_dist(folder)
    dist_checkpointing.load(training._model_state(sharded=True), str(folder), LoadStrategy())
    return None


def not_there(training: Any, folder: Path) -> Any:
    """What is asked for and not there."""
    from megatron.core import dist_checkpointing

    from ucp.integrations.megatron import LoadStrategy, SaveStrategy

    folder.mkdir()
    state = training._model_state(sharded=True)
    del state["model"]["output_layer.weight"]
    dist_checkpointing.save(state, str(folder), SaveStrategy())
    dist_checkpointing.load(training._model_state(sharded=True), str(folder), LoadStrategy())
    return None


def plain_tensors(training: Any, folder: Path) -> Any:
    """Without a strategy named, and from nothing but what the checkpoint says of itself."""
    from megatron.core import dist_checkpointing

    from ucp.integrations.megatron import SaveStrategy

    folder.mkdir()
    dist_checkpointing.save(training._dicts(), str(folder), SaveStrategy())
    known = dist_checkpointing.load_tensors_metadata(str(folder))
    loaded = dist_checkpointing.load_plain_tensors(str(folder))
    held = training._states(training.chunks[0].embedding.word_embeddings.weight)
    key = "embedding.word_embeddings.weight"
    same = all(torch.equal(loaded[f"optimizer.state.{state}.{key}"].flatten(), held[state]) for state in held)
    rounded = torch.equal(loaded[key], training.chunks[0].embedding.word_embeddings.weight.detach())
    return [same, rounded, str(known[key].dtype), str(known[f"optimizer.state.param.{key}"].dtype), len(known)]


def buffers(training: Any, folder: Path) -> Any:
    """``dp_reshardable``: the optimizer's own buffers, as they are."""
    from megatron.core import dist_checkpointing

    from ucp.integrations.megatron import LoadStrategy, SaveStrategy

    folder.mkdir()
    told = {"distrib_optim_sharding_type": "dp_reshardable"}
    weight = training.chunks[0].output_layer.weight
    before = {state: tensor.clone() for state, tensor in training._states(weight).items()}
    state = training._model_state(sharded=True, metadata=told)
    state["optimizer"] = training.optimizer.sharded_state_dict(state["model"], metadata=told)
    dist_checkpointing.save(state, str(folder), SaveStrategy(), content_metadata=told)
    training.steps(1, 2)
    wanted = training._model_state(sharded=True, metadata=told)
    wanted["optimizer"] = training.optimizer.sharded_state_dict(wanted["model"], is_loading=True, metadata=told)
    loaded = dist_checkpointing.load(wanted, str(folder), LoadStrategy())
    training.optimizer.load_state_dict(loaded["optimizer"])
    return [torch.equal(held, before[state]) for state, held in training._states(weight).items()]


def objects(training: Any, folder: Path) -> Any:
    """Random streams of ranks, loss scales, and what layers keep beside tensors."""
    from megatron.core.optimizer.grad_scaler import DynamicGradScaler
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from ucp.train.load import load

    layer = training.chunks[0].decoder.layers[1].self_attention.linear_proj
    kept: list[Any] = [io.BytesIO(b"scales")]
    type(layer).get_extra_state, getter = lambda self: kept[0] if self is layer else None, type(layer).get_extra_state
    type(layer).set_extra_state, setter = (
        lambda self, value: kept.__setitem__(0, value) if self is layer else None,
        type(layer).set_extra_state,
    )
    scaler = DynamicGradScaler(1024.0, 1.0, 2.0, 0.5, 100, 2)
    for one in training._optimizers:
        one.grad_scaler = scaler
    tracker = get_cuda_rng_tracker()
    before = {name: state.clone() for name, state in tracker.get_states().items()}
    state = {"model": training.ddp, "optimizer": training.optimizer, "rng_tracker": tracker}
    try:
        _save(state, folder)
        kept[0], scaler._scale, scaler._growth_tracker = None, scaler._scale * 4, 7
        tracker.set_states({name: torch.zeros_like(one) for name, one in before.items()})
        kept[0] = io.BytesIO(b"others")
        load(state, str(folder))
    finally:
        type(layer).get_extra_state, type(layer).set_extra_state = getter, setter
    same = all(torch.equal(one, before[name]) for name, one in tracker.get_states().items())
    return [kept[0].read().decode(), float(scaler.scale), scaler._growth_tracker, same and len(before) > 0]


def grouped(training: Any, folder: Path) -> Any:
    """Experts that are one parameter, laid out in another way than what is stored of them."""
    from ucp.checkpoint import open_checkpoint
    from ucp.train.load import load

    held = {name: one.detach().clone() for name, one in training.chunks[0].named_parameters()}
    _save({"model": training.chunks[0].sharded_state_dict()}, folder)
    for parameter in training.chunks[0].parameters():
        parameter.data.zero_()
    state = {"model": training.chunks[0].sharded_state_dict()}
    load(state, str(folder))
    training.chunks[0].load_state_dict(state["model"])
    same = all(torch.equal(one, held[name]) for name, one in training.chunks[0].named_parameters())
    stored = open_checkpoint(str(folder)).catalog.tensors["decoder.layers.mlp.experts.experts.linear_fc1.weight"]
    return [same, stored.states["value"].shape]


def _save(state: Any, folder: Path) -> Any:
    from ucp.train.save import save

    return save(state, str(folder)).tensors


SCENES: tuple[Callable[[Any, Path], Any], ...] = (
    drifted,
    without_model,
    other_size,
    without_optimizer,
    other_schedule,
    other_backend,
    not_there,
    plain_tensors,
    buffers,
    objects,
    grouped,
)


if __name__ == "__main__":
    main()
