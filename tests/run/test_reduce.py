from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.plan.test_match import KEY, view, wanted_values
from ucp.errors import FitError
from ucp.layout import Box, FlatRange
from ucp.plan import Cover, Extent, Fragment, TensorSpec
from ucp.run.gather import read_into, read_region
from ucp.run.reduce import PIECE_ELEMENTS, reduced
from ucp.store import open_store
from ucp.testing.strategies import extents, regions, regular_boxes, views


def cover_of(arrays, dtype, kind, *, held="float32", name="memory://reduce"):
    """A store with one object per term, and the cover of their mean or sum."""
    store = open_store(name)
    fragments = []
    for number, array in enumerate(arrays):
        store.put(f"r{number}", array.tobytes())
        extent = Extent.contiguous(f"r{number}", 0, array.shape, held)
        fragments.append(Fragment(Box.whole(array.shape), extent, term=number))
    return store, Cover.of(KEY, TensorSpec(arrays[0].shape, dtype), fragments, reduce=kind)


@given(st.data())
def test_any_region_of_a_mean_is_that_of_the_mean_in_float64(data):
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    arrays = [random.normal(size=(5, 7)).astype("<f4") for _ in range(data.draw(st.integers(1, 4)))]
    kind = data.draw(st.sampled_from(["mean", "sum"]))
    store, cover = cover_of(arrays, "float32", kind)
    expected = np.zeros((5, 7))
    for array in arrays:
        expected = expected + array
    expected = (expected / len(arrays) if kind == "mean" else expected).astype("<f4")
    region = data.draw(regions((5, 7)))
    found = read_region(store, cover, region).view("<f4")
    np.testing.assert_array_equal(found, np.ravel(wanted_values(expected, region)))


@given(st.data())
def test_a_mean_is_read_in_any_view(data):
    random = np.random.default_rng(0)
    arrays = [random.normal(size=(4, 6)).astype("<f4") for _ in range(3)]
    store, cover = cover_of(arrays, "float32", "sum")
    expected = sum(array.astype("f8") for array in arrays).astype("<f4")
    seen = data.draw(views((4, 6)))
    box = data.draw(regular_boxes(seen.shape))
    target = Fragment(box, data.draw(extents("", box.shape, "float32", 4)))
    buffer = np.full(target.extent.span[1] // 4 + 1, np.nan, "<f4")
    read_into(store, cover, target, buffer.view("u1").data, view=seen)
    found = view(buffer, target.extent)
    np.testing.assert_array_equal(found, expected.reshape(seen.shape)[tuple(map(slice, box.start, box.stop))])


def test_a_mean_of_more_than_one_piece_has_no_seams():
    random = np.random.default_rng(0)
    arrays = [random.normal(size=(3, PIECE_ELEMENTS)).astype("<f4") for _ in range(2)]
    store, cover = cover_of(arrays, "float32", "mean")
    expected = ((arrays[0].astype("f8") + arrays[1]) / 2).astype("<f4")
    np.testing.assert_array_equal(read_region(store, cover, Box.whole(expected.shape)).view("<f4"), expected.ravel())
    run = FlatRange(17, expected.size - 40)
    np.testing.assert_array_equal(read_region(store, cover, run).view("<f4"), expected.ravel()[17:-23])


def test_low_precision_terms_are_rounded_once():
    one = torch.tensor([1.0, 257.0, -3.0]).bfloat16()
    other = torch.tensor([1.0078125, 1.0, 1e-3]).bfloat16()
    arrays = [t.view(torch.uint16).numpy() for t in (one, other)]
    store, cover = cover_of(arrays, "bfloat16", "mean", held="bfloat16")
    found = torch.from_numpy(read_region(store, cover, Box.whole((3,)))).view(torch.bfloat16)
    torch.testing.assert_close(found, ((one.double() + other.double()) / 2).float().bfloat16(), rtol=0, atol=0)


def test_integers_add_up_and_have_no_mean():
    terms = [(np.array([2**30, -5], "<i4"), "int32"), (np.array([2**29, 3], "<i4"), "int32")]
    np.testing.assert_array_equal(reduced("sum", terms, "int32"), [2**30 + 2**29, -2])
    with pytest.raises(FitError, match="no mean"):
        reduced("mean", terms, "int32")
    with pytest.raises(FitError, match="does not fit in int32"):
        reduced("sum", terms * 2, "int32")
    with pytest.raises(FitError, match="int64"):
        reduced("sum", [(np.array([2**62], "<i8"), "int64")] * 2, "int64")
    with pytest.raises(FitError, match="float32 in int32"):
        reduced("sum", [(np.array([1.0], "<f4"), "float32")], "int32")


def test_every_term_must_be_whole():
    extent = Extent.contiguous("r", 0, (4,), "float32")
    half = Extent.contiguous("r", 0, (2,), "float32")
    fragments = [Fragment(Box((0,), (4,)), extent), Fragment(Box((0,), (2,)), half, term=1)]
    with pytest.raises(FitError, match=r"elements 2\.\.4"):
        Cover.of(KEY, TensorSpec((4,), "float32"), fragments, reduce="mean")
