"""What the ranks of `bench.resume` do: build a trainer, load the checkpoint into it, and account for the load alone.

    python -m bench.resume_ranks REQUEST.json      prints the results as JSON, one per rank

Model, engine and optimizer are there before the clock starts; all ranks start together.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ucp
from bench.model import Decoder, build_model, param_groups
from tests.support.gloo import spawn

RUN_LIMIT = 900.0
"""Seconds a run may take before its ranks are killed."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to load: `how` is ``stock`` or ``ucp``. With `check`, ranks also say what they hold afterwards."""

    how: str
    root: str
    stage: int
    layers: int
    ranks: int
    check: bool = False


@dataclass(frozen=True, slots=True)
class Loaded:
    """One rank's load: seconds, CPU seconds, bytes read, growth of its peak resident set, CRCs of what it holds."""

    wall: float
    cpu: float
    read: int
    peak: int
    held: dict[str, int]


def main() -> None:
    request = Request(**json.loads(Path(sys.argv[1]).read_text()))
    model: nn.Module | None = None
    if request.how == "stock":
        from tests.support.engine import prepare_process

        prepare_process()
        model = build_model(request.layers, dtype=torch.bfloat16, seed=1)
    found = spawn(load_one, request.ranks, request, model, timeout=RUN_LIMIT, method="fork")
    json.dump([asdict(loaded) for loaded in found], sys.stdout)


def load_one(_rank: int, _world: int, request: Request, model: nn.Module | None) -> Loaded:
    """Build what `request` asks for, load into it, and measure."""
    load, held = _stock(request, model) if model is not None else _fsdp(request)
    distributed.barrier()
    _forget_peak()
    before, read, cpu, started = _status("VmRSS"), _read(), time.process_time(), time.perf_counter()
    load()
    wall, cpu, read = time.perf_counter() - started, time.process_time() - cpu, _read() - read
    peak = _status("VmHWM") - before
    distributed.barrier()
    crcs = {name: zlib.crc32(tensor.contiguous().numpy().data) for name, tensor in held()} if request.check else {}
    return Loaded(wall, cpu, read, peak, crcs)


Held = Callable[[], Iterator[tuple[str, Tensor]]]
"""Whole tensors in float32 by ``name[state]``, gathered over ranks one at a time (collective)."""


def _fsdp(request: Request) -> tuple[Callable[[], Any], Held]:
    """A module that is never whole on any rank, sharded by FSDP2 in float32, and a plain AdamW."""
    with torch.device("meta"):
        model = Decoder(request.layers)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    model.to_empty(device="cpu")
    optimizer = torch.optim.AdamW(param_groups(model), foreach=False)

    def held() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in model.named_parameters():
            for state, tensor in {"value": parameter, **optimizer.state[parameter]}.items():
                if isinstance(tensor, DTensor):
                    yield f"{name}[{state}]", tensor.full_tensor().detach()

    return lambda: ucp.load((model, optimizer), request.root), held


def _stock(request: Request, model: nn.Module) -> tuple[Callable[[], Any], Held]:
    """The engine that saved the checkpoint, with DeepSpeed's own loading."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from bench.ranks import build_engine

    engine = build_engine(model, stage=request.stage)

    def held() -> Iterator[tuple[str, Tensor]]:
        if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
            engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in engine.module.named_parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            yield f"{name}[value]", safe_get_full_fp32_param(parameter).view(shape).float()
            for state in ("exp_avg", "exp_avg_sq"):
                yield f"{name}[{state}]", safe_get_full_optimizer_state(parameter, state).view(shape)

    def load() -> None:
        path, _ = engine.load_checkpoint(request.root)
        assert path is not None, "DeepSpeed did not load its own checkpoint"

    return load, held


def _forget_peak() -> None:
    """Start the peak of the resident set anew (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _read() -> int:
    """Bytes that this process has read by system calls, from files and sockets."""
    return int(Path("/proc/self/io").read_text().split()[1])


if __name__ == "__main__":
    os.environ.pop("OMP_NUM_THREADS", None)
    main()
