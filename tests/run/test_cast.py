from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ucp.errors import FitError
from ucp.run.cast import cast, contradicts, storage_dtype

FLOATS = ["float64", "float32", "float16", "bfloat16"]


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]).numpy()


def array(tensor, dtype):
    return bits(tensor).view(storage_dtype(dtype))


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
@given(values=st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_casts_are_torchs_bit_for_bit(source, target, values):
    tensor = torch.tensor(values, dtype=torch.float64).to(getattr(torch, source))
    expected = tensor.to(getattr(torch, target))
    found = cast(array(tensor, source), source, target)
    nan = torch.isnan(expected).numpy()
    width = bits(expected).dtype
    np.testing.assert_array_equal(found.view(width)[~nan], bits(expected)[~nan])
    back = torch.from_numpy(np.ascontiguousarray(found).view(width)).view(getattr(torch, target))
    np.testing.assert_array_equal(torch.isnan(back).numpy(), nan)


def test_there_is_no_cast_between_kinds():
    with pytest.raises(FitError, match="float32 to int64"):
        cast(np.zeros(1, "f4"), "float32", "int64")


@pytest.mark.parametrize("low", ["bfloat16", "float16", "float32"])
def test_a_rounded_copy_is_recognised_and_one_wrong_bit_is_not(low):
    exact = torch.randn(1000)
    exact[:3] = torch.tensor([float("nan"), float("inf"), -0.0])
    copy = exact.to(getattr(torch, low))
    stored = array(copy, low).copy()
    assert not contradicts(exact.numpy(), "float32", stored, low).any()
    stored.view(f"<u{stored.itemsize}")[17] ^= 1
    assert list(np.flatnonzero(contradicts(exact.numpy(), "float32", stored, low))) == [17]
