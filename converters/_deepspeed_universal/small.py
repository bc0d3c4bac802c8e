"""The small files of a universal folder, as trees: optimizer state and model state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ucp.catalog import Catalog, Scalar
from ucp.container.values import Size
from ucp.layout import Shape
from ucp.plan import Extent
from ucp.tree import Opaque, TensorLeaf, Tree

from .carry import Drop, carry
from .folders import Content

_DS_VERSION = "0.16.0"
"""Loaders ask for at least 0.3.17 (deepspeed/runtime/zero/stage_1_and_2.py, ``_load_global_state``)."""

_SPARE_GROUPS = 64
_LOSS_SCALE_KEYS = ("loss_scaler", "dynamic_loss_scale", "overflow")


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


def shapes_tree(catalog: Catalog, content: Content) -> dict[str, Tree]:
    """What a model file says about its tensors (deepspeed/runtime/engine.py, ``_save_checkpoint``)."""
    kinds = {kind: [t for t in catalog.tensors.values() if t.kind == kind] for kind in ("frozen", "buffer")}
    return {
        "module": {},
        "buffer_names": [tensor.name for tensor in kinds["buffer"]],
        "param_shapes": [{name: _size(catalog, name) for name in group.params} for group in content.groups],
        "frozen_param_shapes": {tensor.name: _size(catalog, tensor.name) for tensor in kinds["frozen"]},
        "frozen_param_fragments": None,
        "shared_params": dict(catalog.ties),
        "optimizer": None,
    }


def _size(catalog: Catalog, name: str) -> Size:
    shape: Shape = catalog.tensors[catalog.resolve(name)].states["value"].shape
    return Size(shape)
