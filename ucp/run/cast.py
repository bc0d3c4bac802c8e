"""Element types in numpy's hands: storage views of every dtype, and exact casts between floating-point types.

numpy has no bfloat16 or float8; these travel as unsigned integers of the same width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ucp.errors import FitError
from ucp.layout import itemsize

Array = npt.NDArray[Any]

_UNSIGNED = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<u8"}
_AS_UNSIGNED = {"bfloat16", "float8_e4m3fn", "float8_e5m2"}
_CASTABLE = ("float64", "float32", "float16", "bfloat16")


def storage_dtype(dtype: str) -> np.dtype[Any]:
    """The little-endian numpy dtype that holds elements of `dtype`; unsigned integers where numpy has none."""
    name = _UNSIGNED[itemsize(dtype)] if dtype in _AS_UNSIGNED else dtype
    return np.dtype(name).newbyteorder("<")


def cast(array: Array, source: str, target: str) -> Array:
    """Elements of dtype `source` as dtype `target`, rounded to nearest, ties to even.

    float64 goes to bfloat16 through float32, as in torch. Arrays are in their storage dtypes. FitError unless both are
    float64, float32, float16 or bfloat16.
    """
    if source == target:
        return array
    if source not in _CASTABLE or target not in _CASTABLE:
        raise FitError(f"no cast from {source} to {target}", hint="read it in its own dtype")
    if source == "bfloat16":
        array, source = _widen(array), "float32"
    if target == "bfloat16":
        with np.errstate(over="ignore", invalid="ignore"):
            return round_to_bfloat16(array.astype("<f4", copy=False))
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(storage_dtype(target), copy=False)


def _widen(array: Array) -> Array:
    return (array.astype("<u4") << np.uint32(16)).view("<f4")


def round_to_bfloat16(array: Array) -> Array:
    """float32 to bfloat16 bits, round to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(array).view("<u4")
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    result = rounded.astype("<u2")
    nan = np.isnan(array)
    if nan.any():
        result[nan] = (bits[nan] >> np.uint32(16)).astype("<u2") | np.uint16(0x40)
    return result


def contradicts(exact: Array, exact_dtype: str, low: Array, low_dtype: str) -> Array:
    """Where `low` is not `exact` rounded to `low_dtype`: True at contradictions; any NaN equals any."""
    expected = cast(exact, exact_dtype, low_dtype)
    width = _UNSIGNED[itemsize(low_dtype)]
    differs: Array = expected.view(width) != low.view(width)
    if differs.any() and low_dtype in _CASTABLE:
        both = _is_nan(expected, low_dtype) & _is_nan(low, low_dtype)
        differs &= ~both
    return differs


def _is_nan(array: Array, dtype: str) -> Array:
    nan: Array = np.isnan(_widen(array) if dtype == "bfloat16" else array)
    return nan
