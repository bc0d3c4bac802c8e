"""Writes small checkpoints in DeepSpeed's format from known values, with torch and without DeepSpeed.

The layout is written from the framework's own description (deepspeed/runtime/zero/stage_1_and_2.py, stage3.py,
bf16_optimizer.py, runtime/engine.py) by concatenating, padding and cutting whole tensors; nothing of the reader is
used.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Fake:
    """A checkpoint to write: optimizer groups of named shapes, and how they are laid out."""

    groups: Sequence[Mapping[str, Sequence[int]]]
    dp: int = 2
    stage: int = 1
    dtype: torch.dtype = torch.bfloat16
    wrapper: str = "zero"
    """``zero``, ``elastic`` (lists of lean states) or ``bf16`` (BF16_Optimizer)."""
    states: Sequence[str] = ("exp_avg", "exp_avg_sq")
    alignment: int = 1
    frozen: Mapping[str, Sequence[int]] = field(default_factory=dict)
    buffers: Mapping[str, Sequence[int]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    plain_order: Sequence[str] = ()
    """Order of the first group as ``param_slice_mappings`` states it, if it is not that of the data."""
    step: float = 5.0
    model: Mapping[str, Any] = field(default_factory=dict)
    """Entries of the model file that are changed or added."""
    optim: Mapping[str, Any] = field(default_factory=dict)
    """Entries of every rank's optimizer_state_dict that are changed or added."""

    def with_(self, **changes: Any) -> Fake:
        """The same checkpoint with some fields changed."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Written:
    """What `write` wrote: the value of every tensor of the model by state, and the module's low-precision copies."""

    states: dict[str, dict[str, Tensor]]
    untrained: dict[str, Tensor]
    low: dict[str, Tensor]


def write(fake: Fake, folder: Path, *, seed: int = 0) -> Written:
    """Write the checkpoint's files into `folder`, a tag folder, and give what they hold."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    states = {
        name: {state: torch.randn(tuple(shape)) for state in ("value", *fake.states)}
        for group in fake.groups
        for name, shape in group.items()
    }
    untrained = {name: torch.randn(tuple(s)).to(fake.dtype) for name, s in fake.frozen.items()}
    untrained |= {name: torch.randn(tuple(s)) for name, s in fake.buffers.items()}
    low = {name: values["value"].to(fake.dtype) for name, values in states.items()}
    written = Written(states, untrained, low)
    with deepspeed_classes() as classes:
        for rank in range(fake.dp):
            inner = {**_optimizer(fake, states, rank, classes), **fake.optim}
            root = {"optimizer_state_dict": inner, "ds_config": {}, "ds_version": "0.19.8"}
            prefix = "bf16_" if fake.dtype == torch.bfloat16 else ""
            torch.save(root, folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        if fake.stage == 3:
            for rank in range(fake.dp):
                model = _model(fake, written, rank)
                torch.save(model, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        else:
            torch.save(_model(fake, written, 0), folder / "mp_rank_00_model_states.pt")
    return written


@contextlib.contextmanager
def deepspeed_classes() -> Iterator[types.SimpleNamespace]:
    """Stand-ins under the names of the framework's classes, importable while pickling."""
    made = types.SimpleNamespace()
    before = {}
    for path in ("utils.tensor_fragment.fragment_address", "runtime.fp16.loss_scaler.LossScaler"):
        module, _, name = f"deepspeed.{path}".rpartition(".")
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            full = ".".join(parts[:i])
            before.setdefault(full, sys.modules.get(full))
            sys.modules[full] = types.ModuleType(full)
        cls = type(name, (), {"__module__": module})
        setattr(sys.modules[module], name, cls)
        setattr(made, name, cls)
    try:
        yield made
    finally:
        for full, module_before in before.items():
            if module_before is None:
                del sys.modules[full]
            else:
                sys.modules[full] = module_before


def _optimizer(fake: Fake, states: Mapping[str, Values], rank: int, classes: types.SimpleNamespace) -> dict[str, Any]:
    scaler = classes.LossScaler()
    scaler.__dict__.update({"cur_scale": 1.0, "dynamic": False})
    common = {"loss_scaler": scaler, "dynamic_loss_scale": False, "overflow": False}
    if fake.stage == 3:
        return {**common, "zero_stage": 3, "partition_count": fake.dp, **_stage3(fake, states, rank)}
    return {**(common if fake.wrapper != "bf16" else {}), "clip_grad": 1.0, **_stage12(fake, states, rank, classes)}


def _stage3(fake: Fake, states: Mapping[str, Values], rank: int) -> dict[str, Any]:
    parts = [
        {s: torch.cat([_part(states[name][s], fake.dp, rank) for name in group]) for s in ("value", *fake.states)}
        for group in fake.groups
    ]
    return {
        "optimizer_state_dict": _base(fake, [{s: part[s] for s in fake.states} for part in parts]),
        "fp32_flat_groups": [part["value"] for part in parts],
    }


def _part(value: Tensor, dp: int, rank: int) -> Tensor:
    """Rank's part of a ZeRO-3 parameter, padded with rubbish as the framework leaves uninitialised memory there."""
    size = -(-value.numel() // dp)
    padded = torch.full((size * dp,), float("nan"), dtype=value.dtype)
    padded[: value.numel()] = value.reshape(-1)
    return padded[rank * size : (rank + 1) * size].clone()


def _stage12(fake: Fake, states: Mapping[str, Values], rank: int, classes: types.SimpleNamespace) -> dict[str, Any]:
    masters, flats, pads, gaps, slices = [], [], [], [], []
    for group in fake.groups:
        names = list(group)
        gap = [-states[n]["value"].numel() % fake.alignment for n in names[:-1]] + [0]
        cut = {s: _flat(fake, [states[n][s] for n in names], gap) for s in ("value", *fake.states)}
        total = sum(states[n]["value"].numel() for n in names) + sum(gap)
        size = cut["value"].numel() // fake.dp
        mine = {s: flat[rank * size : (rank + 1) * size].clone() for s, flat in cut.items()}
        pad = min(max((rank + 1) * size - total, 0), size)
        lean = mine["value"] if fake.wrapper == "bf16" else mine["value"][: size - pad]
        masters.append(lean)
        flats.append({s: mine[s][: size - pad] if fake.wrapper == "elastic" else mine[s] for s in fake.states})
        pads.append(pad)
        gaps.append(gap)
        stated = {name: group[name] for name in fake.plain_order} if fake.plain_order else group
        slices.append(_slices(stated, gap, size, rank, classes))
    base = [{**s, "step": torch.tensor(fake.step)} for s in flats] if fake.wrapper == "elastic" else _base(fake, flats)
    found = {"base_optimizer_state": base, "single_partition_of_fp32_groups": masters, "group_paddings": pads}
    found |= {"partition_count": [fake.dp] * len(masters), "ds_version": "0.19.8", "param_slice_mappings": slices}
    if fake.wrapper != "bf16":
        found |= {"zero_stage": fake.stage, "param_alignment_paddings": gaps}
    return found


def _flat(fake: Fake, values: Sequence[Tensor], gaps: Sequence[int]) -> Tensor:
    pieces = [piece for v, gap in zip(values, gaps, strict=True) for piece in (v.reshape(-1), torch.zeros(gap))]
    flat = torch.cat(pieces)
    return torch.cat([flat, torch.full((-flat.numel() % (2 * fake.dp),), float("nan"))])


def _slices(
    group: Mapping[str, Sequence[int]], gaps: Sequence[int], size: int, rank: int, classes: types.SimpleNamespace
) -> OrderedDict[str, Any]:
    found: OrderedDict[str, Any] = OrderedDict()
    start = 0
    for (name, shape), gap in zip(group.items(), gaps, strict=True):
        numel = torch.Size(shape).numel()
        a, b = max(start, rank * size), min(start + numel, (rank + 1) * size)
        if a < b:
            found[name] = classes.fragment_address()
            found[name].__dict__.update({"numel": b - a, "start": a - rank * size})
        start += numel + gap
    return found


def _base(fake: Fake, flats: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    state = {i: {"step": torch.tensor(fake.step), **flat} for i, flat in enumerate(flats)}
    return {"state": state, "param_groups": [{"lr": 0.1 / (i + 1), "params": [i]} for i in range(len(flats))]}


def _model(fake: Fake, written: Written, rank: int) -> dict[str, Any]:
    whole = {**written.low, **written.untrained}
    module = OrderedDict(
        (name, torch.empty(0, dtype=v.dtype) if fake.stage == 3 and name not in fake.buffers else v)
        for name, v in whole.items()
    )
    module.update((alias, module[name]) for alias, name in fake.aliases.items())
    fragments = {n: written.untrained[n] for n in fake.frozen}
    if fake.stage == 3:
        fragments = {n: _part(v, fake.dp, rank) for n, v in fragments.items()}
    keeps_frozen = fake.stage >= 2
    return {
        "module": module,
        "buffer_names": list(fake.buffers),
        "optimizer": None,
        "param_shapes": [OrderedDict((n, torch.Size(s)) for n, s in group.items()) for group in fake.groups],
        "frozen_param_shapes": {n: torch.Size(s) for n, s in fake.frozen.items()} if keeps_frozen else None,
        "frozen_param_fragments": fragments if keeps_frozen else None,
        "shared_params": dict(fake.aliases) if rank == 0 else {},
        "lr_scheduler": None,
        "skipped_steps": 0,
        "global_steps": int(fake.step),
        "dp_world_size": fake.dp,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": "0.19.8",
        **fake.model,
    }
