"""Where DeepSpeed's optimizers keep the values they train: fp32 masters, flat and cut over ranks by ZeRO.

Facts are from deepspeed/runtime: zero/stage_1_and_2.py, zero/stage3.py, bf16_optimizer.py, fp16/fused_optimizer.py and
fp16/unfused_optimizer.py. An optimizer is told by the names of its classes: importing those modules compiles operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from ucp.errors import FitError
from ucp.train.held import FlatRun, Held, flat_held

Masters = dict[int, "Master"]
"""By ``id`` of the module's parameter."""


@dataclass(frozen=True, slots=True)
class Master:
    """A parameter's value as it is trained: all of `tensor`, or of flat memory what `placed` says."""

    tensor: torch.Tensor
    placed: Held | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """What an engine's optimizer keeps: `masters`, flat or not, by parameter, and the flat ones of each of its groups.

    `groups` lists the masters that torch's optimizer trains, by its groups. `refresh` makes the module's low-precision
    weights from the masters; all ranks call it together.
    """

    masters: Masters
    groups: Sequence[Sequence[torch.Tensor]]
    refresh: Callable[[], None]


def kept_by(optimizer: Any) -> Kept | None:
    """What DeepSpeed's wrapper keeps; None for an optimizer that trains the module's own parameters, and for none.

    FitError for a wrapper whose way of keeping values is not known here.
    """
    if optimizer is None or isinstance(optimizer, torch.optim.Optimizer):
        return None
    classes = [kind.__name__ for kind in type(optimizer).__mro__]
    for name, take in _KINDS.items():
        if name in classes:
            return take(optimizer)
    if "DummyOptim" in classes or "DeepSpeedZeRoOffload" in classes:
        return None
    raise FitError(f"DeepSpeed's {type(optimizer).__name__} is not known: where it keeps what it trains is not guessed")


def base_optimizer(optimizer: Any) -> torch.optim.Optimizer | None:
    """The torch optimizer under DeepSpeed's wrapper, if any; None where nothing is trained."""
    base = optimizer if isinstance(optimizer, torch.optim.Optimizer) else getattr(optimizer, "optimizer", None)
    return base if isinstance(base, torch.optim.Optimizer) else None


def partitioned(parameter: torch.Tensor) -> Master:
    """A parameter that ZeRO-3 cut over ranks and that no optimizer trains: its part, in the module's own dtype."""
    part = _part(parameter).detach()
    rank = distributed.get_rank(group=_group(parameter, None))
    run = (rank * part.numel(), 0, max(0, min(part.numel(), _numel(parameter) - rank * part.numel())))
    return Master(part, flat_held(_shape(parameter), part, [run] if run[2] else []))


def _zero12(optimizer: Any) -> Kept:
    """One flat fp32 partition per group, in the order of `round_robin_bit16_groups` with gaps for alignment."""
    masters: Masters = {}
    flats = optimizer.single_partition_of_fp32_groups
    offsets = getattr(optimizer, "round_robin_bit16_offsets", None)
    for number, (flat, members) in enumerate(zip(flats, optimizer.round_robin_bit16_groups, strict=True)):
        starts = offsets[number] if offsets is not None else list(_starts(members))
        first = distributed.get_rank(group=optimizer.real_dp_process_group[number]) * flat.numel()
        masters.update(_in_partition(members, starts, flat, first))

    def refresh() -> None:
        optimizer.update_lp_params()
        _link(optimizer)

    return Kept(masters, [[flat] for flat in flats], refresh)


def _bf16(optimizer: Any) -> Kept:
    """As ZeRO-1, without gaps."""
    masters: Masters = {}
    flats = optimizer.fp32_groups_flat_partition
    for number, (flat, members) in enumerate(zip(flats, optimizer.bf16_groups, strict=True)):
        first = distributed.get_rank(group=optimizer.real_dp_process_group[number]) * flat.numel()
        masters.update(_in_partition(members, list(_starts(members)), flat, first))

    def refresh() -> None:
        optimizer.update_lp_params()
        _link(optimizer)

    return Kept(masters, [[flat] for flat in flats], refresh)


def _link(optimizer: Any) -> None:
    """Let DeepSpeed's ``safe_get_*`` and ``safe_set_*`` calls see states that may be new tensors."""
    optimizer._link_all_hp_params()
    optimizer._hp_optimizer_states_linked = False
    if all(flats[0] in optimizer.optimizer.state for flats in _trained(optimizer)):
        optimizer._lazy_init_hp_params_optimizer_state()


def _trained(optimizer: Any) -> list[list[torch.Tensor]]:
    return [list(group["params"]) for group in optimizer.optimizer.param_groups]


def _fp16_fused(optimizer: Any) -> Kept:
    """One flat fp32 tensor per group, whole on every rank."""
    masters: Masters = {}
    for flat, members in zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True):
        masters.update(_in_partition(members, list(_starts(members)), flat, 0))

    def refresh() -> None:
        for flat, members in zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True):
            for parameter, start in zip(members, _starts(members), strict=True):
                parameter.data.copy_(flat.detach()[start : start + parameter.numel()].view(parameter.shape))

    return Kept(masters, [[flat] for flat in optimizer.fp32_groups_flat], refresh)


def _fp16_unfused(optimizer: Any) -> Kept:
    """An fp32 copy of each parameter."""
    pairs = [
        (parameter, master)
        for members, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        for parameter, master in zip(members, masters, strict=True)
    ]

    def refresh() -> None:
        for parameter, master in pairs:
            parameter.data.copy_(master.detach())

    masters = {id(parameter): Master(master) for parameter, master in pairs}
    return Kept(masters, optimizer.fp32_groups, refresh)


def _zero3(optimizer: Any) -> Kept:
    """A flat fp32 tensor per sub-group: of each of its parameters this rank's part, padding included."""
    _check_memory(optimizer)
    # Weights gathered for a forward pass are copies that nothing would refresh.
    optimizer._partition_all_parameters()
    masters: Masters = {}
    groups: list[list[torch.Tensor]] = [[] for _ in optimizer.optimizer.param_groups]
    for number, (flat, members) in enumerate(
        zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
    ):
        at = 0
        for parameter in members:
            length = _part(parameter).numel()
            first = distributed.get_rank(group=_group(parameter, optimizer)) * length
            real = max(0, min(length, _numel(parameter) - first))
            runs = [(first, at, real)] if real else []
            masters[id(parameter)] = Master(flat, flat_held(_shape(parameter), flat.detach(), runs))
            at += length
        groups[optimizer.sub_group_to_group_id[number]].append(flat)

    def refresh() -> None:
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        optimizer.invalidate_secondary_tensor()
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    return Kept(masters, groups, refresh)


def _check_memory(optimizer: Any) -> None:
    """FitError for what ZeRO-Infinity keeps in files, and for two optimizers that share the work."""
    if optimizer.swap_optimizer or optimizer.params_in_nvme_and_cpu:
        raise FitError(
            "DeepSpeed keeps a part of this job on NVMe, where it can be neither saved nor filled",
            hint="offload to cpu, or use engine.save_checkpoint, whose folders ucp reads",
        )
    if hasattr(optimizer, "backup_optimizer"):
        raise FitError("DeepSpeed splits this job's optimizer states over two optimizers", hint="set ratio to 1.0")
    if any(number >= len(optimizer.optimizer.param_groups) for number in optimizer.sub_group_to_group_id.values()):
        raise FitError(f"DeepSpeed joined the parameter groups of {type(optimizer.optimizer).__name__} in ZeRO-3")


_KINDS: dict[str, Callable[[Any], Kept]] = {
    "DeepSpeedZeroOptimizer_Stage3": _zero3,
    "DeepSpeedZeroOptimizer": _zero12,
    "BF16_Optimizer": _bf16,
    "FP16_Optimizer": _fp16_fused,
    "FP16_UnfusedOptimizer": _fp16_unfused,
}


def _starts(members: Sequence[torch.Tensor]) -> Iterator[int]:
    at = 0
    for member in members:
        yield at
        at += member.numel()


def _in_partition(
    members: Sequence[torch.Tensor], starts: Sequence[int], flat: torch.Tensor, first: int
) -> Iterator[tuple[int, Master]]:
    """Where each of a group's members lies in the partition that begins at element `first` of the whole group.

    Members of which it has nothing are listed too: they train with the group.
    """
    memory = flat.detach()
    for member, start in zip(members, starts, strict=True):
        low, high = max(start, first), min(start + member.numel(), first + flat.numel())
        runs: list[FlatRun] = [(low - start, low - first, high - low)] if low < high else []
        yield id(member), Master(flat, flat_held(tuple(member.shape), memory, runs))


def _part(parameter: Any) -> torch.Tensor:
    """The part of a parameter that this rank holds under ZeRO-3 (runtime/zero/partition_parameters.py, `ds_tensor`)."""
    part: torch.Tensor = parameter.ds_tensor
    if part.numel() != part.ds_numel or "NOT_AVAILABLE" in str(getattr(part, "status", "")):  # type: ignore[attr-defined]
        raise FitError(
            f"DeepSpeed does not hold its part of a parameter of shape {list(parameter.ds_shape)} in memory",
            hint="call engine.reload_states() first, and offload parameters to cpu, not to nvme",
        )
    return part


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(parameter.ds_shape)


def _numel(parameter: Any) -> int:
    return int(parameter.ds_numel)


def _group(parameter: Any, optimizer: Any) -> Any:
    """The ranks that a parameter is cut over."""
    return getattr(parameter, "ds_process_group", None) or getattr(optimizer, "dp_process_group", None)
