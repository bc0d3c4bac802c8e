"""FullyShardedDataParallel, torch's first: flat parameters, of which a rank holds a run of elements, padding included.

Facts from torch/distributed/fsdp/_flat_param.py (``FlatParameter``, ``FlatParamHandle``): each wrapped module has one
flat parameter at most, of which ``_fqns``, ``_shapes`` and ``_shard_param_infos`` tell what lies where on this rank;
``_local_shard`` is the rank's memory in full precision once the module has run. With ``use_orig_params`` an optimizer
gets the original parameters, views of it that are empty where a rank holds nothing of them; else it gets the flat one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ucp.catalog import Kind
from ucp.errors import FitError, UsageError
from ucp.format.spreads import Spread
from ucp.layout import Shape
from ucp.layout.region import row_major_strides
from ucp.train.held import Held, flat_held
from ucp.train.meshes import FLAT, spread_over
from ucp.train.shards import local_tensor
from ucp.train.targets import Targets, take_module


def take(found: Targets, value: Any) -> bool:
    """Add what a module holds that has FSDP1 modules in it."""
    if not isinstance(value, nn.Module):
        return False
    flat = set()
    # A module may be reached by several paths: then all its tensors have several names.
    for prefix, child in value.named_modules(remove_duplicate=False):
        handle = child._handle if isinstance(child, FullyShardedDataParallel) else None
        if handle is not None:
            flat |= _take_handle(found, f"{prefix}." if prefix else "", child)
    _check_inside(value, flat)
    if not any(isinstance(child, FullyShardedDataParallel) for child in value.modules()):
        return False
    take_module(found, value, known=flat)
    return True


def _check_inside(module: nn.Module, known: set[int]) -> None:
    """UsageError for a part of what was wrapped: its parameters are runs of elements, and only the wrapper knows which.

    Both marks are those of torch/distributed/fsdp/_flat_param.py.
    """
    for name, parameter in module.named_parameters():
        marked = getattr(parameter, "_fsdp_flattened", False) or getattr(parameter, "_is_flat_param", False)
        if marked and id(parameter) not in known:
            raise UsageError(f"{name}: FSDP1 flattened it", hint="give the module that FullyShardedDataParallel made")


def _take_handle(found: Targets, prefix: str, module: Any) -> set[int]:
    """Add the tensors of one flat parameter; ids of the parameters that they are the contents of."""
    handle = module._handle
    _show_shard(prefix, handle)
    flat, spread = handle.flat_param, _spread(module)
    originals = flat._params if handle._use_orig_params else [flat] * len(flat._fqns)
    for number, (parameter, below) in enumerate(zip(originals, _names(flat), strict=True)):
        names = [f"{prefix}{name}".replace("_fsdp_wrapped_module.", "") for name in below]
        kind: Kind = "parameter" if parameter.requires_grad else "frozen"
        found.add(names, "value", parameter, placed=_held(names[0], handle, number), kind=kind, spread=spread)
    return {id(parameter) for parameter in (flat, *(flat._params or ()), *(flat._shared_params or ()))}


def _spread(module: Any) -> tuple[Spread, ...]:
    """The mesh that a flat parameter is cut and repeated on, from the process groups of its module."""
    handle, between = module._handle, getattr(module, "_inter_node_pg", None)
    inner = ("shard", handle.process_group, FLAT if handle.uses_sharded_strategy else "R")
    return (spread_over([inner] if between is None else [("replicate", between, "R"), inner]),)


def _show_shard(prefix: str, handle: Any) -> None:
    """Throw away what was gathered for a forward pass: it is made anew from the shard, where loads go."""
    if handle._training_state.name != "IDLE":
        raise UsageError(
            f"{prefix or 'the module'}: FSDP1 is at work in it ({handle._training_state.name})",
            hint="call outside of forward, backward and summon_full_params",
        )
    if hasattr(handle.flat_param, "_local_shard"):
        handle.reshard(handle.uses_sharded_strategy)
        handle.post_reshard()
        handle._prefetched = False


def _names(flat: Any) -> Iterator[list[str]]:
    """All names of each tensor in a flat parameter, below the module that was wrapped."""
    shared = defaultdict(list)
    for info in flat._shared_param_infos:
        first = _joined(info.prim_module_name, info.prim_param_name)
        shared[first].append(_joined(info.module_name, info.param_name))
    for name in flat._fqns:
        yield [name, *shared[name]]


def _joined(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _held(label: str, handle: Any, number: int) -> Held | None:
    """What this rank holds of tensor `number` of a flat parameter; None for a parameter that is whole by itself."""
    flat, whole = handle.flat_param, not handle.uses_sharded_strategy
    if whole and handle._use_orig_params:
        return None
    shape: Shape = tuple(flat._shapes[number])
    if flat._param_extensions[number] is not None:
        raise FitError(f"{label}: FSDP1 over DTensors is not known", hint="use torch.distributed.fsdp.fully_shard")
    if not flat._contiguities[number] and flat._strides[number] != row_major_strides(shape):
        raise FitError(
            f"{label}: FSDP1 flattened a parameter with strides {list(flat._strides[number])}",
            hint="make it contiguous before wrapping",
        )
    place = flat._shard_param_infos[number]
    if handle._use_orig_params:
        memory, at = local_tensor(flat._params[number], label), 0
    else:
        memory, at = local_tensor(flat, label), place.offset_in_shard
    runs = [(place.intra_param_start_idx, at, place.numel_in_shard)] if place.in_shard else []
    return flat_held(shape, memory, runs)
