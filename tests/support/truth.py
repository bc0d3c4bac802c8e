"""The state a live engine really holds, gathered over ranks: what a reader of its checkpoint must find.

Keys are ``<kind>/<parameter name>``: ``param`` (fp32 master), the optimizer's own state names (``exp_avg``, ...),
``frozen``, ``buffer`` (persistent ones) and ``lowp`` (the module's working copy of a trained parameter).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, distributed

from tests.support.engine import Job

Truth = dict[str, Tensor]


def gather(job: Job) -> Truth:
    """Every tensor of the job's state, whole, on every rank (collective).

    With ZeRO the values come from DeepSpeed's own gathering calls and, where partitions are flat, from the partitions
    themselves; the two must agree.  Round-robin order and universally loaded engines use the partitions alone, because
    there the calls answer wrongly; the working copy then proves the result (`check_working_copy`).
    """
    optimized = _optimized(job)
    truth = {**optimized, **_module_state(job)}
    check_working_copy(truth)
    return {key: value.detach().cpu().contiguous().clone() for key, value in truth.items()}


def parameter_steps(job: Job) -> dict[str, float]:
    """The optimizer's step count of every parameter that has one."""
    steps = {}
    base = job.base_optimizer
    for names, group in zip(job.groups, base.param_groups, strict=True):
        parameters = group["params"]
        owners = parameters * len(names) if len(parameters) == 1 else parameters
        if job.case.stage == 3:
            owners = [_sub_group_tensor(job, name) for name in names]
        for name, owner in zip(names, owners, strict=True):
            step = base.state[owner].get("step")
            if step is not None:
                steps[name] = float(step)
    return steps


def check_working_copy(truth: Truth) -> None:
    """Raise AssertionError unless every master value rounds exactly to the module's working copy."""
    for key, working in truth.items():
        kind, _, name = key.partition("/")
        if kind == "lowp":
            rounded = truth[f"param/{name}"].to(working.dtype)
            assert torch.equal(rounded, working), f"{name}: the gathered value is not the one the module computes with"


def _named(job: Job) -> dict[str, Tensor]:
    return dict(job.engine.module.named_parameters())


def _optimized(job: Job) -> Truth:
    optimizer = job.optimizer
    if job.case.stage == 3:
        return _from_calls(job)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        offsets = optimizer.round_robin_bit16_offsets
        found = _from_partitions(
            job, optimizer.single_partition_of_fp32_groups, optimizer.round_robin_bit16_groups, offsets
        )
    elif hasattr(optimizer, "fp32_groups_flat_partition"):
        found = _from_partitions(job, optimizer.fp32_groups_flat_partition, optimizer.bf16_groups, None)
    else:
        return _unpartitioned(job)
    if not job.case.round_robin and not job.engine.load_universal_checkpoint():
        _assert_same(found, _from_calls(job))
    return found


def _from_calls(job: Job) -> Truth:
    """ZeRO 1 to 3 through DeepSpeed's safe_get_* calls (deepspeed/utils/tensor_fragment.py)."""
    optimizer = job.optimizer
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        # DeepSpeed links the states of all groups after the first group's first step, when the others have none yet.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    kinds = _state_kinds(job)
    truth = {}
    for name, parameter in _named(job).items():
        if not parameter.requires_grad:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)
        truth[f"param/{name}"] = safe_get_full_fp32_param(parameter).view(shape).float()
        for kind in kinds:
            truth[f"{kind}/{name}"] = safe_get_full_optimizer_state(parameter, kind).view(shape)
    return truth


def _state_kinds(job: Job) -> list[str]:
    """Names of the states that have one value per parameter element, the same list on every rank."""
    kinds = {
        kind
        for owner, state in job.base_optimizer.state.items()
        for kind, value in state.items()
        if torch.is_tensor(value) and value.shape == owner.shape and value.ndim > 0
    }
    everywhere: list[Any] = [None] * job.world
    distributed.all_gather_object(everywhere, kinds)
    return sorted(set().union(*everywhere))


def _from_partitions(
    job: Job, partitions: list[Tensor], groups: list[list[Tensor]], offsets: list[list[int]] | None
) -> Truth:
    """ZeRO 1/2 and BF16_Optimizer: join the ranks' flat partitions and cut them in the order they were flattened."""
    names = {id(parameter): name for name, parameter in _named(job).items()}
    kinds = _state_kinds(job)
    truth = {}
    for index, (partition, members) in enumerate(zip(partitions, groups, strict=True)):
        starts = list(_running_starts(members)) if offsets is None else offsets[index]
        state = job.base_optimizer.state[partition]
        for kind in ["param", *kinds]:
            flat = _join(partition if kind == "param" else state[kind], job)
            for parameter, start in zip(members, starts, strict=True):
                key = f"{kind}/{names[id(parameter)]}"
                truth[key] = flat[start : start + parameter.numel()].view(parameter.shape)
    return truth


def _running_starts(members: list[Tensor]) -> Iterator[int]:
    start = 0
    for member in members:
        yield start
        start += member.numel()


def _join(partition: Tensor, job: Job) -> Tensor:
    """The partitions of this rank's data-parallel group, in rank order (collective)."""
    group = job.engine.data_parallel_group
    parts = [torch.empty_like(partition) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, partition.detach().contiguous(), group=group)
    return torch.cat([part.detach() for part in parts])


def _unpartitioned(job: Job) -> Truth:
    """Stage 0: the plain torch optimizer, or a 16-bit wrapper with per-parameter or flat fp32 masters."""
    optimizer = job.optimizer
    masters: Any = getattr(optimizer, "fp32_groups", None) or getattr(optimizer, "fp32_groups_flat", None)
    flat = hasattr(optimizer, "fp32_groups_flat")
    parameters = _named(job)
    truth: Truth = {}
    for index, names in enumerate(job.groups):
        if flat:
            _cut_flat(job, truth, masters[index], [(name, parameters[name]) for name in names])
            continue
        owners = masters[index] if masters else [parameters[name] for name in names]
        for name, owner in zip(names, owners, strict=True):
            truth[f"param/{name}"] = owner.detach().float()
            for kind, value in job.base_optimizer.state[owner].items():
                if torch.is_tensor(value) and kind != "step":
                    truth[f"{kind}/{name}"] = value
    return truth


def _cut_flat(job: Job, truth: Truth, flat: Tensor, members: list[tuple[str, Tensor]]) -> None:
    state = {k: v for k, v in job.base_optimizer.state[flat].items() if torch.is_tensor(v) and v.shape == flat.shape}
    start = 0
    for name, parameter in members:
        for kind, values in {"param": flat, **state}.items():
            truth[f"{kind}/{name}"] = values.detach()[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()


def _module_state(job: Job) -> Truth:
    """Frozen parameters, working copies and persistent buffers, from the module itself."""
    module = job.engine.module
    truth = {}
    for name, parameter in _named(job).items():
        with deepspeed.zero.GatheredParameters([parameter], enabled=job.case.stage == 3):
            truth[f"{'lowp' if parameter.requires_grad else 'frozen'}/{name}"] = parameter.data.clone()
    persistent = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, child in module.named_modules()
        for name in child._buffers
        if name not in child._non_persistent_buffers_set
    }
    truth.update({f"buffer/{name}": value for name, value in module.named_buffers() if name in persistent})
    return truth


def _sub_group_tensor(job: Job, name: str) -> Tensor:
    """ZeRO-3: the flat fp32 tensor that holds this parameter's partition."""
    optimizer = job.optimizer
    group_id = optimizer.sub_group_to_group_id
    parameter = _named(job)[name]
    index = next(i for i in group_id if any(member is parameter for member in optimizer.fp16_groups[i]))
    tensor: Tensor = optimizer.fp32_partitioned_groups_flat[index]
    return tensor


def _assert_same(left: Truth, right: Truth) -> None:
    assert left.keys() == right.keys(), sorted(left.keys() ^ right.keys())
    for key, value in left.items():
        assert torch.equal(value, right[key].to(value.dtype)), f"{key}: DeepSpeed's own answer differs"
