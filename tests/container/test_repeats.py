"""A few bytes that a file describes over and over are not taken for the tensors it claims to have."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.container.torchfiles import read, save
from ucp.container.leaves import LeafBytes, leaf_bytes, with_bytes
from ucp.container.unpickle import unpickle
from ucp.errors import CorruptError
from ucp.format.leaves import LeafReader
from ucp.format.state import Blob, Decoder, Encoder
from ucp.plan import Extent
from ucp.store import LocalStore
from ucp.tree import TensorLeaf

MIB = 1 << 20


@contextmanager
def at_most(most: int) -> Iterator[None]:
    """No more than so many bytes are held at once inside."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] <= most
    finally:
        tracemalloc.stop()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    (tmp_path / "x").write_bytes(bytes(MIB))
    return LocalStore(str(tmp_path))


def test_an_expanded_tensor_is_read(tmp_path: Path) -> None:
    save(tmp_path / "x.pt", {"w": torch.ones(1).expand(1000)})
    assert read(tmp_path / "x.pt").root["w"].extent.shape == (1000,)


def test_a_tensor_that_repeats_a_few_bytes_for_ever_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "x.pt", {"model": {"w": torch.ones(1).expand(1 << 30)}})
    with pytest.raises(CorruptError, match=r"x\.pt: model\.w: .*repeats the 4 bytes"):
        read(tmp_path / "x.pt")


@pytest.mark.parametrize("reader", [leaf_bytes, lambda store, leaf: LeafReader(store, ())(leaf)])
def test_repeats_are_refused_before_there_is_room_for_them(store: LocalStore, reader) -> None:
    leaf = TensorLeaf(Extent("x", 0, (1 << 40,), (0,), "float32"))
    with at_most(MIB), pytest.raises(CorruptError, match="repeat"):
        reader(store, leaf)


def test_a_tensor_named_many_times_is_read_once(store: LocalStore) -> None:
    leaf = TensorLeaf(Extent.contiguous("x", 0, (MIB,), "uint8"))
    with at_most(3 * MIB):
        tree = with_bytes(store, [leaf] * 16)
    assert all(held.inline is tree[0].inline for held in tree)
    with pytest.raises(CorruptError, match="repeat"):
        with_bytes(store, [leaf] * 17)


def test_overlapping_tensors_are_counted_together(store: LocalStore) -> None:
    read_leaf = LeafBytes(store)
    leaves = [TensorLeaf(Extent.contiguous("x", start, (MIB - 20,), "uint8")) for start in range(20)]
    with pytest.raises(CorruptError, match="repeat"):
        list(map(read_leaf, leaves))


def test_state_that_names_a_tensor_many_times_is_written_once(store: LocalStore) -> None:
    reads = []

    def read_leaf(leaf: TensorLeaf) -> bytes:
        reads.append(leaf)
        return leaf_bytes(store, leaf)

    encoder = Encoder(read_leaf)
    encoder.encode([TensorLeaf(Extent.contiguous("x", 0, (MIB,), "uint8")) for _ in range(100)])
    assert len(reads) == 1


def test_state_that_names_a_byte_string_many_times_holds_it_once(store: LocalStore) -> None:
    decoder = Decoder({"0": Blob("uint8", (MIB,), 0, "x")}, lambda leaf: leaf_bytes(store, leaf))
    with at_most(3 * MIB):
        assert len(decoder.decode([{"$bytes": {"blob": "0"}}] * 1000)) == 1000


@pytest.mark.parametrize(("doublings", "sound"), [(12, True), (20, False)])
def test_a_short_pickle_does_not_unfold_to_a_large_tree(doublings: int, sound: bool) -> None:
    data = b"\x80\x02N" + b"2\x86" * doublings + b"."
    if sound:
        unpickle(data, where="x")
        return
    with pytest.raises(CorruptError, match="too large"):
        unpickle(data, where="x")
