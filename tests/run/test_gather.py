from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.plan.test_match import KEY, scatter, wanted_values
from ucp.errors import CorruptError
from ucp.layout import Box, FlatRange, numel
from ucp.plan import Copy, Cover, Extent, Fragment, TensorSpec
from ucp.run.gather import gather, read_region
from ucp.store import open_store
from ucp.testing.strategies import fragmentations, regions, shapes


def stored(store, objects):
    for name, memory in objects.items():
        store.put(name, memory.tobytes())


@given(st.data())
def test_any_region_of_any_fragmentation_is_read_exactly(data):
    shape = data.draw(shapes(max_dims=3))
    tensor = np.arange(numel(shape), dtype="<i4").reshape(shape)
    fragments = data.draw(fragmentations(shape))
    store = open_store("memory://gather")
    stored(store, scatter(tensor, fragments))
    cover = Cover.of(KEY, TensorSpec(shape, "int32"), fragments)
    region = data.draw(regions(shape))
    found = read_region(store, cover, region).view("<i4")
    np.testing.assert_array_equal(found, np.ravel(wanted_values(tensor, region)))


class Counting:
    """A store that adds up the bytes read of it."""

    def __init__(self, store):
        self.store, self.bytes, self.calls = store, 0, 0

    def read_into(self, path, offset, buffer):
        self.bytes += len(buffer)
        self.calls += 1
        self.store.read_into(path, offset, buffer)

    def read_ranges(self, path, ranges):
        for offset, buffer in ranges:
            self.read_into(path, offset, buffer)

    def read_runs(self, path, offsets, length, buffer):
        self.bytes += len(offsets) * length
        self.calls += 1
        self.store.read_runs(path, offsets, length, buffer)


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    store = open_store(str(tmp_path_factory.mktemp("big")))
    tensor = np.arange(3000 * 2000, dtype="<f4").reshape(3000, 2000)
    store.put("t", tensor.tobytes())
    fragment = Fragment(FlatRange(0, tensor.size), Extent.contiguous("t", 0, (tensor.size,), "float32"))
    return store, tensor, Cover.of(KEY, TensorSpec(tensor.shape, "float32"), [fragment])


@pytest.mark.parametrize(
    ("box", "overread"),
    [
        (Box((100, 0), (700, 2000)), 1.0),
        (Box((0, 500), (3000, 1000)), 2.0),
        (Box((0, 0), (3000, 600)), 4.01),
        (Box((0, 1999), (3000, 1)), 1.0),
        (Box((17, 3), (1, 5)), 1.0),
    ],
)
def test_slices_of_a_large_tensor_read_little_more_than_they_want(big, box, overread):
    store, tensor, cover = big
    counting = Counting(store)
    found = read_region(counting, cover, box).view("<f4").reshape(box.shape)
    np.testing.assert_array_equal(found, tensor[tuple(map(slice, box.start, box.stop))])
    assert counting.bytes <= overread * found.nbytes + 8 * 2000
    assert counting.calls <= 3000


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_part_of_every_page_is_read_with_its_pages_and_sparser_runs_alone(kind, tmp_path):
    """Columns of narrow and of wide rows, in two dims outside of the run."""
    store = open_store(str(tmp_path) if kind == "local" else "memory://runs")
    for width, most in ((900, 4096 / 512 + 1), (5000, 1.0)):
        tensor = np.arange(30 * 40 * width, dtype="<f4").reshape(30, 40, width)
        store.put("t", tensor.tobytes())
        fragment = Fragment(Box.whole(tensor.shape), Extent.contiguous("t", 0, tensor.shape, "float32"))
        cover = Cover.of(KEY, TensorSpec(tensor.shape, "float32"), [fragment])
        counting = Counting(store)
        box = Box((3, 0, 128), (25, 40, 128))
        found = read_region(counting, cover, box).view("<f4").reshape(box.shape)
        np.testing.assert_array_equal(found, tensor[3:28, :, 128:256])
        assert counting.bytes <= most * found.nbytes
        assert counting.calls == 1


def test_a_file_that_ends_within_a_run_is_damaged(tmp_path):
    store = open_store(str(tmp_path))
    store.put("t", bytes(100))
    with pytest.raises(CorruptError, match="ends at byte 100"):
        store.read_runs("t", [0, 60, 95], 10, memoryview(bytearray(30)))


def test_a_cast_happens_on_the_way(big):
    store, tensor, _ = big
    buffer = np.zeros(2000, "<f2")
    source = Extent.contiguous("t", 8000, (2000,), "float32")
    copies = [Copy(source, Extent.contiguous("", 0, (2000,), "float16"))]
    gather(store, copies, buffer.view("u1").data)
    np.testing.assert_array_equal(buffer, tensor[1].astype("<f2"))


def test_every_byte_read_is_recorded(big):
    store, tensor, cover = big
    seen = []
    read_region(
        store, cover, Box((5, 0), (2, 2000)), lambda name, offset, data: seen.append((name, offset, bytes(data)))
    )
    assert seen == [("t", 5 * 8000, tensor[5:7].tobytes())]


def test_a_truncated_object_is_corrupt(tmp_path):
    store = open_store(str(tmp_path))
    store.put("t", bytes(39))
    cover = Cover.of(
        KEY, TensorSpec((10,), "float32"), [Fragment(FlatRange(0, 10), Extent.contiguous("t", 0, (10,), "float32"))]
    )
    with pytest.raises(CorruptError, match="t: ends at byte 39"):
        read_region(store, cover, Box.whole((10,)))


def test_neighbours_in_one_object_are_read_together(tmp_path):
    """With one call for each object; what is recorded is what was read."""
    store = open_store(str(tmp_path))
    store.put("a", bytes(range(200)))
    store.put("b", bytes(range(100)))
    calls, recorded = [], []

    class Watching(Counting):
        def read_ranges(self, path, ranges):
            calls.append((path, [(offset, len(buffer)) for offset, buffer in ranges]))
            super().read_ranges(path, ranges)

    def copy(name, offset, to):
        return Copy(Extent.contiguous(name, offset, (10,), "uint8"), Extent.contiguous("", to, (10,), "uint8"))

    buffer = memoryview(bytearray(40))
    copies = [copy("a", 0, 0), copy("b", 50, 10), copy("a", 20, 20), copy("a", 100, 30)]
    gather(Watching(store), copies, buffer, lambda name, at, data: recorded.append((name, at, bytes(data))))
    assert calls == [("a", [(0, 10), (20, 10), (100, 10)]), ("b", [(50, 10)])]
    assert bytes(buffer) == bytes([*range(10), *range(50, 60), *range(20, 30), *range(100, 110)])
    assert sorted(recorded) == [
        (name, at, bytes(range(at, at + 10))) for name, at in (("a", 0), ("a", 20), ("a", 100), ("b", 50))
    ]
