"""The small files of a universal folder, as trees: optimizer state and model state."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from ucp.catalog import Catalog, Scalar
from ucp.container.values import Size
from ucp.plan import Extent
from ucp.training import first_rank, progress
from ucp.tree import TensorLeaf, Tree

from .carry import Drop, carry
from .folders import Content
from .scaler import loss_scale

_DS_VERSION = "0.16.0"
"""Loaders ask for at least 0.3.17 (deepspeed/runtime/zero/stage_1_and_2.py, ``_load_global_state``)."""

_SPARE_GROUPS = 64
_ASIDE = frozenset({"client_state", "module", "optimizer", "per_rank"})


def scalar_tree(scalar: Scalar) -> Tree:
    """A number kept per parameter as the framework had it: a 0-d tensor, or a plain Python number."""
    if scalar.dtype in ("int", "float", "bool"):
        return scalar.value
    return TensorLeaf(Extent.contiguous("", 0, (), scalar.dtype), inline=_packed(scalar))


def _packed(scalar: Scalar) -> bytes:
    """The number's bytes, little-endian."""
    import numpy as np

    if scalar.dtype == "bfloat16":
        return np.float32(scalar.value).tobytes()[2:]
    return np.asarray(scalar.value, np.dtype(scalar.dtype).newbyteorder("<")).tobytes()


def optimizer_tree(catalog: Catalog, content: Content, drop: Drop) -> dict[str, Tree]:
    """``zero/optimizer_state.pt``: hyper-parameters, step and loss scale, in the places where each stage looks.

    ZeRO-1, ZeRO-2 and BF16_Optimizer walk the job's and the saved groups side by side and stop at the shorter list,
    which would leave whole groups unloaded without a word (deepspeed/runtime/base_optimizer.py); spare groups that set
    nothing keep the saved list the longer one. ZeRO-3 gives every group of the job the hyper-parameters of the first
    saved one (deepspeed/runtime/zero/stage3.py), so that one holds only what all groups agree on: the job's own values
    stay elsewhere.
    """
    groups = [carry(dict(group.options), f"param_groups.{i}", drop) for i, group in enumerate(content.groups)]
    numbered = [{**options, "params": [i]} for i, options in enumerate(groups)]
    tree: dict[str, Tree] = {
        "ds_version": _DS_VERSION,
        "param_groups": [*numbered, *({"params": []} for _ in range(_SPARE_GROUPS))],
    }
    saved = first_rank(catalog).get("optimizer")
    if isinstance(saved, dict):
        kept = {**loss_scale(saved), **{key: saved[key] for key in ("clip_grad",) if key in saved}}
        tree.update(carry(kept, "optimizer", drop))
    if content.zero3:
        state = {} if content.step is None else {0: {"step": scalar_tree(content.step)}}
        tree["optimizer_state_dict"] = {"state": state, "param_groups": [{**_agreed(groups), "params": [0]}]}
    return tree


def _agreed(groups: list[dict[Any, Tree]]) -> dict[Any, Tree]:
    first, *others = groups
    return {key: value for key, value in first.items() if all(key in g and _same(g[key], value) for g in others)}


def _same(a: Tree, b: Tree) -> bool:
    # Without the type, 1 and True and 1.0 would be one.
    return type(a) is type(b) and bool(a == b)


def disagreeing(content: Content) -> list[str]:
    """Hyper-parameters that differ between the groups."""
    groups = [dict(group.options) for group in content.groups]
    return sorted({str(key) for group in groups for key in group} - {str(key) for key in _agreed(groups)})


def model_tree(catalog: Catalog, content: Content, drop: Drop, *, mp: int = 1) -> dict[str, Tree]:
    """A model file: shapes, counters, scheduler and client state (deepspeed/runtime/engine.py, ``_save_checkpoint``).

    DeepSpeed reads it on every rank, twice, and skips what is in ``module``: frozen parameters and buffers have their
    folders instead. ``mp_world_size`` is the number of such files that a loader must find
    (deepspeed/runtime/state_dict_factory.py, ``check_ckpt_list``).
    """
    state, samples = first_rank(catalog), progress(catalog).consumed_samples
    client, module = (state.get(key) for key in ("client_state", "module"))
    engine = {key: value for key, value in state.items() if key not in _ASIDE}
    return {
        **(carry(client, "client_state", drop) if isinstance(client, dict) else {}),
        "lr_scheduler": None,
        "global_steps": catalog.step or 0,
        "skipped_steps": 0,
        "dp_world_size": catalog.source.mesh["dp"],
        **({} if samples is None else {"global_samples": samples}),
        **carry(engine, "state", drop),
        **_shapes(catalog, content),
        "module": carry(module, "module", drop) if isinstance(module, dict) else {},
        "mp_world_size": mp,
    }


def _shapes(catalog: Catalog, content: Content) -> dict[str, Tree]:
    tensors = catalog.tensors.values()
    return {
        "buffer_names": [tensor.name for tensor in tensors if tensor.kind == "buffer"],
        "param_shapes": [_sizes(catalog, group.params) for group in content.groups],
        "frozen_param_shapes": _sizes(catalog, [tensor.name for tensor in tensors if tensor.kind == "frozen"]),
        "frozen_param_fragments": None,
        "shared_params": dict(catalog.ties),
        "optimizer": None,
    }


def _sizes(catalog: Catalog, names: Iterable[str]) -> OrderedDict[str, Size]:
    return OrderedDict((name, Size(catalog.tensors[name].states["value"].shape)) for name in names)
