"""Live Python values as inert trees: copies that later changes do not reach."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from ucp.errors import FitError
from ucp.layout.dtypes import ITEMSIZE
from ucp.plan import Extent
from ucp.train.shards import dtype_name, local_tensor
from ucp.tree import TensorLeaf, Tree

_HINT = "give it a state_dict() and load_state_dict(), or make it plain values"
_MOST_DEPTH = 100


def tree_of(value: Any, where: str) -> Tree:
    """`value` as a tree, tensors and arrays copied into it; FitError naming `where` for what is no tree."""
    return _tree(value, where, 0)


def _tree(value: Any, where: str, depth: int) -> Tree:
    if depth > _MOST_DEPTH:
        raise FitError(f"{where}: nested too deeply to be saved", hint="does it contain itself?")
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        return value
    if isinstance(value, torch.Tensor):
        return _of_tensor(value, where)
    if isinstance(value, np.ndarray | np.generic):
        return _of_array(np.asarray(value), where) if isinstance(value, np.ndarray) else value.item()
    if isinstance(value, Mapping):
        return {_tree(key, where, depth + 1): _tree(one, f"{where}.{key}", depth + 1) for key, one in value.items()}
    if isinstance(value, list | tuple):
        kind = list if isinstance(value, list) else tuple
        return kind(_tree(one, f"{where}.{number}", depth + 1) for number, one in enumerate(value))
    if isinstance(value, set | frozenset):
        kept = {_tree(one, where, depth + 1) for one in value}
        return frozenset(kept) if isinstance(value, frozenset) else kept
    if isinstance(value, int | float | str | bytes) and not isinstance(value, Enum):
        return _plain(value)
    raise FitError(f"{where}: a {type(value).__name__} cannot be saved", hint=_HINT)


def _plain(value: float | str | bytes) -> Tree:
    """A value of a subclass, such as ``numpy.str_``, as one of the class itself."""
    if isinstance(value, str | bytes):
        return str(value) if isinstance(value, str) else bytes(value)
    return int(value) if isinstance(value, int) else float(value)


def _of_tensor(tensor: torch.Tensor, where: str) -> TensorLeaf:
    if isinstance(tensor, DTensor) and not all(placement.is_replicate() for placement in tensor.placements):
        raise FitError(
            f"{where}: ranks hold parts of this tensor", hint="give the dict or module that it is in by itself"
        )
    local = local_tensor(tensor, where).cpu().contiguous()
    # Where a dim has size 1, the strides of what has no gaps may say anything.
    data = local.as_strided((local.numel(),), (1,)).view(torch.uint8).numpy().tobytes()
    return TensorLeaf(_extent(tuple(local.shape), dtype_name(local.dtype), where), inline=data)


def _of_array(array: np.ndarray[Any, Any], where: str) -> TensorLeaf:
    extent = _extent(array.shape, array.dtype.name, where)
    little = array.astype(array.dtype.newbyteorder("<")) if sys.byteorder == "big" else array
    return TensorLeaf(extent, numpy=True, inline=np.ascontiguousarray(little).tobytes())


def _extent(shape: tuple[int, ...], dtype: str, where: str) -> Extent:
    if dtype not in ITEMSIZE:
        raise FitError(f"{where}: {dtype} cannot be stored", hint=f"what can: {' '.join(ITEMSIZE)}")
    return Extent.contiguous("", 0, shape, dtype)


def is_plain(value: Any) -> bool:
    """Whether `value` is nothing but numbers, text and containers of them: it is then an item as a whole."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str | int) and is_plain(one) for key, one in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return all(is_plain(one) for one in value)
    return value is None or isinstance(value, bool | int | float | str | bytes | np.generic)
