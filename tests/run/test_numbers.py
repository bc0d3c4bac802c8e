"""Values of every dtype, and statistics gathered in blocks, against numpy and ml_dtypes."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ucp.run.numbers import Statistics, not_finite, values


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        ("bfloat16", ml_dtypes.bfloat16),
        ("float8_e4m3fn", ml_dtypes.float8_e4m3fn),
        ("float8_e5m2", ml_dtypes.float8_e5m2),
    ],
)
def test_every_code_of_the_small_floats(dtype, kind) -> None:
    width = np.dtype(kind).itemsize
    raw = np.arange(256**width, dtype=f"<u{width}").view(np.uint8)
    assert np.array_equal(values(raw, dtype), raw.view(kind).astype(np.float32), equal_nan=True)


def test_other_dtypes_are_as_they_are() -> None:
    for dtype in ("int64", "uint8", "bool", "float16", "float32", "float64"):
        array = np.array([0, 1, 1], dtype)
        assert np.array_equal(values(array.view(np.uint8), dtype), array)
    assert values(np.array([1 + 2j], np.complex64).view(np.uint8), "complex64").tolist() == [1.0, 2.0]


@given(
    hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(width=32)),
    st.lists(st.integers(0, 40), max_size=5),
)
def test_statistics_do_not_depend_on_blocks(array, cuts) -> None:
    found = Statistics()
    with np.errstate(over="ignore"):
        for block in np.split(array, sorted(min(cut, len(array)) for cut in cuts)):
            found.add(block)
    finite = array[np.isfinite(array)].astype(np.float64)
    assert (found.count, found.nan, found.inf) == (array.size, np.isnan(array).sum(), np.isinf(array).sum())
    if not finite.size:
        assert (found.min, found.max) == (None, None)
        assert math.isnan(found.mean)
        assert math.isnan(found.std)
        return
    assert (found.min, found.max) == (finite.min(), finite.max())
    scale = np.abs(finite).max()
    assert found.mean == pytest.approx(finite.mean(), rel=1e-9, abs=1e-9 * scale)
    assert found.std == pytest.approx(finite.std(), rel=1e-6, abs=1e-7 * scale)


def test_whole_numbers_are_never_nan() -> None:
    assert not_finite(np.array([1, 2])) == (0, 0)
    found = Statistics()
    found.add(np.array([2**62, 2**62 + 1]))
    assert (found.min, found.max) == (2**62, 2**62 + 1)
