"""Means and sums of the copies that ranks hold of one tensor: the paper's pattern of parameters to average.

Terms are added in their order, in float64, or int64 for integers, and rounded once to the tensor's dtype, to nearest,
ties to even (to bfloat16 through float32): so the result is the same on every machine, whatever the blocks.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ucp.errors import FitError
from ucp.plan import Reduction
from ucp.run.cast import Array, cast, storage_dtype

PIECE_ELEMENTS = 1 << 18
"""Elements that are reduced at a time."""

_INTEGERS = frozenset({"uint8", "int8", "uint16", "int16", "uint32", "int32", "int64"})


def reduced(kind: Reduction, terms: Iterable[tuple[Array, str]], dtype: str) -> Array:
    """The mean or sum of `terms`, arrays of one shape with their dtypes, in the storage dtype of `dtype`.

    FitError for a mean of integers, for an integer sum that `dtype` does not hold, and for dtypes that do not add up.
    """
    whole = dtype in _INTEGERS
    if whole and kind == "mean":
        raise FitError(f"no mean in {dtype}", hint="say `any` in the program if the copies are equal")
    total, count = None, 0
    for array, held in terms:
        if whole != (held in _INTEGERS):
            raise FitError(f"no {kind} of {held} in {dtype}")
        addend = array.astype("<i8") if whole else cast(array, held, "float64")
        total = addend.copy() if total is None else _added(total, addend, kind)
        count += 1
    assert total is not None, "a reduction of nothing"
    if whole:
        return _narrowed(total, dtype)
    return cast(total / count if kind == "mean" else total, "float64", dtype)


def _added(total: Array, addend: Array, kind: str) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        result: Array = total + addend
    if total.dtype.kind == "i" and ((total ^ result) & (addend ^ result) < 0).any():
        raise FitError(f"the {kind} of integers does not fit in int64")
    return result


def _narrowed(total: Array, dtype: str) -> Array:
    result: Array = total.astype(storage_dtype(dtype))
    if (result.astype("<i8") != total).any():
        raise FitError(f"the sum of integers does not fit in {dtype}")
    return result
