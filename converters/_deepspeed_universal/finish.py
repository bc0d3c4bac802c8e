"""What DeepSpeed's universal loader leaves undone in a job, done after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ucp.catalog import Catalog, ParamGroup
from ucp.checkpoint import Checkpoint, open_checkpoint
from ucp.errors import FitError, NotFoundError
from ucp.lazy import LazyTensor, lazy_tree
from ucp.tree import Opaque

from .._deepspeed.experts import EXPERT, LAYER, named_degree
from .placed import Stored, stored_experts, stored_for

if TYPE_CHECKING:
    import torch


def finish_load(engine: Any, url: str, *, strict: bool = True, **options: Any) -> None:
    """Restore into a DeepSpeed engine what its universal loader does not; call it right after ``load_checkpoint``.

    >>> engine.load_checkpoint(url)      # doctest: +SKIP
    >>> finish_load(engine, url)         # doctest: +SKIP

    `url` is the folder that was loaded, or any other form of the same checkpoint; `options` go to its reader, such as
    the `tag` that was loaded. Every rank calls it.

    - Frozen parameters and persistent buffers, under every ZeRO stage: DeepSpeed skips the module's state
      (deepspeed/runtime/engine.py, ``_load_checkpoint``).
    - Hyper-parameters of each optimizer group under ZeRO-3, whose loader knows only those of one group, and a step of
      its own for each sub-group: they share one tensor, which torch's optimizers would count up once per sub-group
      (deepspeed/runtime/zero/stage3.py, ``load_hp_checkpoint_state_from_checkpoint_dir_stage3``).

    FitError if the job sets ``round_robin_gradients`` under ZeRO-1 or 2: DeepSpeed has just put the values in the wrong
    places (see `_check_order`).

    Nothing is changed if anything does not fit: NotFoundError for a frozen parameter or buffer that the checkpoint
    lacks (with `strict` off it keeps the value it has), FitError for one of another shape and for optimizer groups cut
    differently. Damaged files raise what `ucp.open` raises.
    """
    _check_order(engine.optimizer)
    with open_checkpoint(url, **options) as checkpoint:
        unrestored = list(_unrestored(engine, checkpoint, strict=strict))
        groups = _zero3_groups(engine, checkpoint) if _is_zero3(engine) else []
        for tensor, stored in unrestored:
            _restore(tensor, stored)
        for group, values in groups:
            group.update(values)
        if _is_zero3(engine):
            _own_steps(engine.optimizer)


def _is_zero3(engine: Any) -> bool:
    return bool(engine.zero_optimization_partition_weights())


def _check_order(optimizer: Any) -> None:
    """FitError where ZeRO-1 or 2 looks for parameters in another order than they lie in.

    Under ``round_robin_gradients`` parameters are flattened in an order of their own, while the addresses that the
    universal loader fills count in the plain order, unless parameters are padded one by one
    (deepspeed/runtime/zero/stage_1_and_2.py, ``_link_all_hp_params``).
    """
    flattened = getattr(optimizer, "round_robin_bit16_groups", [])
    padded = getattr(optimizer, "round_robin_bit16_padding", [()] * len(flattened))
    for laid, listed, padding in zip(flattened, getattr(optimizer, "bit16_groups", []), padded, strict=False):
        if not any(padding) and [id(parameter) for parameter in laid] != [id(parameter) for parameter in listed]:
            raise FitError(
                "this job sets round_robin_gradients, under which DeepSpeed's universal loader puts values in the "
                "wrong places: nothing that was loaded can be trusted",
                hint="set zero_optimization.round_robin_gradients to false in the job that loads",
            )


def _unrestored(engine: Any, checkpoint: Checkpoint, *, strict: bool) -> Iterator[tuple[torch.Tensor, Stored]]:
    """Frozen parameters and persistent buffers of the job, each with where the checkpoint keeps it."""
    missing = []
    for own, tensor in _untrained(engine.module):
        name = _in_checkpoint(engine.module, own)
        if name not in checkpoint:
            missing.append(name)
            continue
        layer = _auto_layer(engine.module, own)
        whole = checkpoint[name]["value"]
        if layer is not None:
            yield tensor, stored_experts(layer, name, tensor, whole, checkpoint.url)
        else:
            yield tensor, stored_for(name, tensor, whole, checkpoint.url)
    if missing and strict:
        raise NotFoundError(
            f"{checkpoint.url}: has no {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}, "
            f"{len(missing)} frozen parameters and buffers of the job in all",
            hint="load them from elsewhere and give strict=False",
        )


def _auto_layer(module: torch.nn.Module, name: str) -> Any:
    """The layer that AutoEP made of which `name` is a stacked parameter, or None."""
    path, _, own = name.rpartition(".experts.")
    layer = module.get_submodule(path) if own in ("w1", "w2", "w3") else None
    return layer if hasattr(layer, "ep_rank") and hasattr(layer, "ep_size") else None


def _in_checkpoint(module: torch.nn.Module, name: str) -> str:
    """What the checkpoint calls a parameter or buffer of the job, which has local numbers for its experts."""
    match = EXPERT.fullmatch(name)
    if match is None:
        return name
    from deepspeed.utils import groups

    layer: Any = module.get_submodule(match[1].removesuffix(LAYER).removesuffix("."))
    rank = int(groups._get_expert_parallel_rank(layer.expert_group_name))
    return f"{match[1]}{rank * int(layer.num_local_experts) + int(match[2])}{match[3]}"


def _untrained(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            yield name, parameter
    for prefix, child in module.named_modules():
        for name, buffer in child.named_buffers(recurse=False):
            if name not in child._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer


def _restore(tensor: Any, stored: Stored) -> None:
    import torch

    with torch.no_grad():
        if not hasattr(tensor, "ds_id"):
            tensor.copy_(stored.read())
            return
        import deepspeed

        # The first rank of those that share the parameter fills it; leaving the context broadcasts it among them and
        # partitions it again.
        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
            if torch.distributed.get_rank(tensor.ds_process_group) == 0:
                tensor.copy_(stored.read())


def _zero3_groups(engine: Any, checkpoint: Checkpoint) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each optimizer group of a ZeRO-3 job with the hyper-parameters that the checkpoint has for its parameters."""
    optimizer = engine.optimizer
    members: dict[int, list[str]] = {}
    for sub_group, parameters in enumerate(optimizer.fp16_groups):
        names = members.setdefault(optimizer.sub_group_to_group_id[sub_group], [])
        names.extend(engine.param_names[parameter] for parameter in parameters)
    catalog = checkpoint.catalog
    owner = {catalog.resolve(name): group for group in catalog.param_groups for name in group.params}
    found = []
    for number, group in enumerate(optimizer.optimizer.param_groups):
        holder = _holder(number, members.get(number, []), owner, catalog) if owner else None
        if holder is not None:
            found.append((group, _plain(checkpoint, holder.options)))
    return found


def _holder(number: int, names: list[str], owner: Mapping[str, ParamGroup], catalog: Catalog) -> ParamGroup | None:
    """The checkpoint's group that all of `names` are in."""
    holders = {id(owner[name]): owner[name] for name in map(catalog.resolve, names) if name in owner}
    if len(holders) > 1:
        raise FitError(
            f"{catalog.url}: the parameters of the job's optimizer group {number} are in {len(holders)} groups there, "
            "with different hyper-parameters",
            hint="give the job the groups it was trained with, or set the hyper-parameters of each group after loading",
        )
    return next(iter(holders.values()), None)


def _plain(checkpoint: Checkpoint, options: Mapping[str, Any]) -> dict[str, Any]:
    values = lazy_tree(checkpoint.catalog, checkpoint.store, dict(options), "param_groups")
    read = {key: value[...] if isinstance(value, LazyTensor) else value for key, value in values.items()}
    # A group of experts is called after the job's own degree.
    left = {"params", "name"} if named_degree(options) is not None else {"params"}
    return {key: value for key, value in read.items() if key not in left and not isinstance(value, Opaque)}


def _own_steps(optimizer: Any) -> None:
    import torch

    for flat in optimizer.fp32_partitioned_groups_flat:
        state = optimizer.optimizer.state.get(flat, {})
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
