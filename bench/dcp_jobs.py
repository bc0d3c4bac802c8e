"""What the ranks of `bench.dcp` do: save a model with its optimizer, and load it in another layout.

    python -m bench.dcp_jobs REQUEST.json

Prints one JSON list, an entry per rank. Module and optimizer are there before the clock starts; all start together.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import ucp
import ucp.train.load
from bench.model import param_groups
from bench.resume_ranks import RUN_LIMIT, Loaded, _forget_peak, _read, _status
from tests.support.gloo import spawn
from ucp.converter import converter, families

# Neither says what it exports or how it is typed.
dcp: Any = torch.distributed.checkpoint
MODELS: Any = AutoModelForCausalLM


@dataclass(frozen=True, slots=True)
class Request:
    """`what` is ``save``, ``fsdp`` or ``columns``; `how`, for loads, ``stock`` or ``ucp``. `root` is the folder.

    With `check`, ranks also say what they hold afterwards.
    """

    what: str
    root: str
    layers: int
    ranks: int
    how: str = ""
    check: bool = False


Held = Callable[[], Iterator[tuple[str, Tensor]]]
"""Tensors by name, gathered one at a time (collective)."""


def main() -> None:
    request = Request(**json.loads(Path(sys.argv[1]).read_text()))
    if request.what == "save":
        spawn(save, request.ranks, request, timeout=RUN_LIMIT, method="fork")
        return
    for family in families():
        converter(family)  # imported before the ranks are forked, as everything of torch is
    found = spawn(load, request.ranks, request, timeout=RUN_LIMIT, method="fork")
    json.dump([asdict(loaded) for loaded in found], sys.stdout)


def config_of(layers: int) -> LlamaConfig:
    """47M parameters a layer, and 131M of embeddings; rows of 8 KiB and more."""
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
    )


def _meta(layers: int) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = MODELS.from_config(config_of(layers))
    return model.float()


def _fsdp(layers: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A module that is never whole on any rank, sharded by FSDP2 in float32, and a plain AdamW."""
    model: Any = _meta(layers)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device="cpu")
    return model, torch.optim.AdamW(param_groups(model), foreach=False)


def save(rank: int, _: int, request: Request) -> None:
    """Save random numbers, and the model's configuration beside them."""
    model, optimizer = _fsdp(request.layers)
    values, states = get_state_dict(model, optimizer)
    torch.manual_seed(rank)
    moments: Any = [t for held in optimizer.state.values() for key, t in held.items() if key != "step"]
    for tensor in (*model.parameters(), *moments):
        with torch.no_grad():
            tensor.to_local().normal_()
    dcp.save({"model": values, "optim": states}, checkpoint_id=f"{request.root}/dcp")
    if rank == 0:
        config_of(request.layers).save_pretrained(request.root)


def load(_rank: int, _world: int, request: Request) -> Loaded:
    """Build what `request` asks for, load into it, and measure."""
    run, held = (_whole_job if request.what == "fsdp" else _columns)(request)
    distributed.barrier()
    _forget_peak()
    before, read, cpu, started = _status("VmRSS"), _read(), time.process_time(), time.perf_counter()
    run()
    wall, cpu, read = time.perf_counter() - started, time.process_time() - cpu, _read() - read
    peak = _status("VmHWM") - before
    distributed.barrier()
    crcs = {name: zlib.crc32(tensor.contiguous().numpy().data) for name, tensor in held()} if request.check else {}
    return Loaded(wall, cpu, read, peak, crcs)


def _whole_job(request: Request) -> tuple[Callable[[], Any], Held]:
    model, optimizer = _fsdp(request.layers)

    def stock() -> None:
        values, states = get_state_dict(model, optimizer)
        dcp.load({"model": values, "optim": states}, checkpoint_id=request.root)
        set_state_dict(model, optimizer, model_state_dict=values, optim_state_dict=states)

    def held() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in model.named_parameters():
            for state, tensor in {"value": parameter, **optimizer.state[parameter]}.items():
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                yield f"{name}[{state}]", whole.detach()

    return (stock if request.how == "stock" else lambda: ucp.load((model, optimizer), request.root)), held


def _columns(request: Request) -> tuple[Callable[[], Any], Held]:
    """The model alone, every matrix cut by columns: as tensor parallelism cuts what FSDP has cut by rows."""
    mesh = init_device_mesh("cpu", (request.ranks,))
    state = {
        name: distribute_tensor(torch.empty(tensor.shape), mesh, [Shard(1) if tensor.ndim > 1 else Replicate()])
        for name, tensor in _meta(request.layers).state_dict().items()
    }

    def held() -> Iterator[tuple[str, Tensor]]:
        yield from ((name, tensor.full_tensor()) for name, tensor in state.items())

    if request.how == "stock":
        return lambda: dcp.load({"model": state}, checkpoint_id=request.root), held
    return lambda: ucp.load(state, request.root), held


if __name__ == "__main__":
    main()
