"""What a DeepSpeed MoE job holds, told by its engine itself: every tensor whole, experts by their global number."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.utils import groups
from torch import Tensor, distributed

from tests.support.moe_case import MoeCase

_STACK = re.compile(r"(.*\.moe)\.experts\.w[123]")
_LOCAL = re.compile(r"(.*\.deepspeed_moe\.experts\.deepspeed_experts\.)(\d+)(\..*)")


def gather(engine: Any, case: MoeCase, world: int) -> dict[str, Tensor]:
    """Every tensor of the job, experts by their global number, whole, on every rank (collective)."""
    local = {**_optimized(engine, case), **_module_state(engine)}
    mine = {key: one for own, value in local.items() for key, one in _global(engine, own, value.detach())}
    everywhere: list[Any] = [None] * world
    distributed.all_gather_object(everywhere, mine)
    union: dict[str, Tensor] = {}
    for held in everywhere:
        for key, value in held.items():
            if not torch.equal(union.setdefault(key, value), value):
                raise AssertionError(f"ranks differ in {key}")
    union = _stacked(union)
    for key, value in union.items():
        kind, _, name = key.partition("/")
        if kind == "lowp":
            assert torch.equal(union[f"param/{name}"].to(value.dtype), value), name
    return union


def _global(engine: Any, key: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What this rank's tensor is in the whole: experts have their global numbers, stacked ones are taken apart."""
    name = key.partition("/")[2]
    match, stack = _LOCAL.fullmatch(key), _STACK.fullmatch(name)
    if match is not None:
        path = match[1].partition("/")[2].removesuffix(".deepspeed_moe.experts.deepspeed_experts.")
        layer = engine.module.get_submodule(path)
        first = groups._get_expert_parallel_rank(layer.expert_group_name) * layer.num_local_experts
        yield f"{match[1]}{first + int(match[2])}{match[3]}", value.clone().contiguous()
    elif stack is not None:
        layer = engine.module.get_submodule(stack[1])
        first = groups._get_expert_parallel_rank(layer.ep_group_name) * layer.num_local_experts
        for index, one in enumerate(value):
            yield f"{key}|{first + index}", one.clone().contiguous()
    else:
        yield key, value.clone().contiguous()


def _stacked(union: dict[str, Tensor]) -> dict[str, Tensor]:
    """AutoEP's experts put together again, in order of their numbers."""
    found: dict[str, Tensor] = {key: value for key, value in union.items() if "|" not in key}
    stacks: dict[str, dict[int, Tensor]] = {}
    for key in union.keys() - found.keys():
        name, _, number = key.partition("|")
        stacks.setdefault(name, {})[int(number)] = union[key]
    return {**found, **{name: torch.stack([held[n] for n in sorted(held)]) for name, held in stacks.items()}}


def _optimized(engine: Any, case: MoeCase) -> dict[str, Tensor]:
    optimizer = engine.optimizer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    if case.stage == 0 and not case.grad_accum_fp32:
        return _unpartitioned(engine, names)
    if case.stage == 3:
        return _gathered(engine)
    found: dict[str, Tensor] = {}
    ordinary = hasattr(optimizer, "single_partition_of_fp32_groups")
    partitions = optimizer.single_partition_of_fp32_groups if ordinary else optimizer.fp32_groups_flat_partition
    members = optimizer.round_robin_bit16_groups if ordinary else optimizer.bf16_groups
    for index, partition in enumerate(partitions):
        state = optimizer.optimizer.state[partition]
        held = {"param": partition, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        for kind, mine in held.items():
            flat, start = _join(mine, optimizer.real_dp_process_group[index]), 0
            for parameter in members[index]:
                found[f"{kind}/{names[id(parameter)]}"] = flat[start : start + parameter.numel()].view(parameter.shape)
                start += parameter.numel()
    return found


def _gathered(engine: Any) -> dict[str, Tensor]:
    """ZeRO-3: the ranks that share a parameter have ceil(n / ranks) elements each, one after the other."""
    optimizer = engine.optimizer
    found: dict[str, Tensor] = {}
    for index, members in enumerate(optimizer.fp16_groups):
        flat = optimizer.fp32_partitioned_groups_flat[index]
        state, start = optimizer.optimizer.state[flat], 0
        for parameter in members:
            length = parameter.ds_tensor.numel()
            name = engine.param_names[parameter]
            for kind, held in {"param": flat, **state}.items():
                if kind != "step":
                    whole = _join(held[start : start + length], parameter.ds_process_group)
                    found[f"{kind}/{name}"] = whole[: parameter.ds_numel].view(parameter.ds_shape)
            start += length
    return found


def _join(partition: Tensor, group: Any) -> Tensor:
    parts = [torch.empty_like(partition) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, partition.detach().contiguous(), group=group)
    return torch.cat(parts)


def _unpartitioned(engine: Any, names: dict[int, str]) -> dict[str, Tensor]:
    optimizer = engine.optimizer
    base = getattr(optimizer, "optimizer", optimizer)
    found: dict[str, Tensor] = {}
    low = getattr(optimizer, "fp16_groups", None)
    for index, group in enumerate(base.param_groups):
        for at, owner in enumerate(group["params"]):
            name = names[id(owner if low is None else low[index][at])]
            found[f"param/{name}"] = owner.detach().float()
            for kind in ("exp_avg", "exp_avg_sq"):
                found[f"{kind}/{name}"] = base.state[owner][kind]
    return found


def _module_state(engine: Any) -> dict[str, Tensor]:
    module = engine.module
    held: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            held[f"{'lowp' if parameter.requires_grad else 'frozen'}/{name}"] = parameter.data.clone()
    saved = module.state_dict().keys()
    return {**held, **{f"buffer/{name}": value for name, value in module.named_buffers() if name in saved}}


def describe(engine: Any, case: MoeCase) -> dict[str, Any]:
    """What the job is and where it stands, beside its tensors; this rank's names of parameters."""
    optimizer = engine.optimizer
    base = getattr(optimizer, "optimizer", optimizer)
    return {
        "case": case.to_json(),
        "tag": case.tag,
        "deepspeed": deepspeed.__version__,
        "wrapper": type(optimizer).__name__,
        "global_steps": engine.global_steps,
        "names": [name for name, _ in engine.module.named_parameters()],
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in base.param_groups],
    }
