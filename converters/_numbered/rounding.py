"""Whether a low-precision tensor is a rounded copy of an fp32 one, seen from their first elements."""

from __future__ import annotations

from ucp.container.torchfile import leaf_numpy
from ucp.layout import numel
from ucp.plan import Extent
from ucp.store import Store
from ucp.tree import TensorLeaf

_SAMPLE = 4096


def is_rounded(store: Store, master: TensorLeaf, low: TensorLeaf) -> bool:
    """Whether `low` (float32, float16 or bfloat16) holds `master` (float32) rounded to nearest even.

    Both are contiguous and of the same size; up to 4096 elements are compared.
    """
    import numpy as np

    size = min(numel(master.extent.shape), _SAMPLE)
    exact, copy = (leaf_numpy(store, _head(leaf, size)) for leaf in (master, low))
    if low.extent.dtype == "bfloat16":
        bits = exact.astype("<f4").view("<u4")
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        return bool(np.array_equal(np.where(np.isnan(exact), copy, rounded), copy))
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.array_equal(exact.astype(copy.dtype), copy, equal_nan=True))


def _head(leaf: TensorLeaf, size: int) -> TensorLeaf:
    extent = leaf.extent
    return TensorLeaf(Extent.contiguous(extent.object, extent.offset, (size,), extent.dtype))
