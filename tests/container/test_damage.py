"""Damaged torch files: flipped bits and cut ends give a typed error or the true tensors, never wrong ones."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.container.torchfiles import read, save
from ucp.container.safetensors import read_header
from ucp.container.torchfile import TorchFile, leaf_bytes
from ucp.errors import ContentError, CorruptError, FitError, NotFoundError
from ucp.store import Buffer, Entry, LocalStore, Store, Writer
from ucp.tree import TensorLeaf

VALUE = {"a": torch.arange(5.0), "e": torch.empty(0), "t": torch.arange(6).view(2, 3).t(), "s": 3}
FORMATS: dict[str, dict[str, Any]] = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}


class OneFile(Store):
    """A store of one object in memory."""

    def __init__(self, data: bytes) -> None:
        self.url = "memory"
        self.data = data

    def entry(self, path: str) -> Entry:
        return Entry(path, len(self.data), "")

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        assert 0 <= offset <= offset + len(buffer) <= len(self.data), "a read outside of the file"
        buffer[:] = self.data[offset : offset + len(buffer)]

    def entries(self, prefix: str = "") -> Any:
        raise NotImplementedError

    def children(self, path: str = "") -> list[str]:
        raise NotImplementedError

    def create(self, path: str, size: int) -> Writer:
        raise NotImplementedError

    def put(self, path: str, data: Buffer, *, if_absent: bool = False) -> None:
        raise NotImplementedError

    def delete(self, path: str) -> None:
        raise NotImplementedError

    def child(self, path: str) -> Store:
        raise NotImplementedError


def whole(data: bytes) -> tuple[TorchFile, dict[str, Any]]:
    """A file and all values of its tensors."""
    from ucp.container.torchfile import read_torch_file

    store = OneFile(data)
    file = read_torch_file(store, "x.pt")
    values = {}
    for name, node in file.root.items() if isinstance(file.root, dict) else ():
        leaf = isinstance(node, TensorLeaf)
        values[name] = (node.extent.shape, node.extent.dtype, leaf_bytes(store, node)) if leaf else node
    return file, values


def verified(file: TorchFile, data: bytes) -> bool:
    """Whether the checksums that the file keeps hold."""
    return all(zlib.crc32(data[c.offset :][: c.length]) == c.value for c in file.checksums)


@pytest.mark.parametrize("name", FORMATS)
def test_no_end_cut_off_is_taken(tmp_path: Path, name: str) -> None:
    data = save(tmp_path / "x.pt", VALUE, **FORMATS[name]).read_bytes()
    for length in range(len(data)):
        with pytest.raises(CorruptError):
            whole(data[:length])


@pytest.mark.parametrize("name", FORMATS)
def test_no_bytes_appended_are_taken(tmp_path: Path, name: str) -> None:
    data = save(tmp_path / "x.pt", VALUE, **FORMATS[name]).read_bytes()
    for more in (b"\0", b"\n", bytes(64), data):
        with pytest.raises(CorruptError):
            whole(data + more)


def test_a_file_in_two_halves_is_not_taken(tmp_path: Path) -> None:
    data = save(tmp_path / "x.pt", VALUE).read_bytes()
    for start in (1, 64, 100, len(data) // 2):
        with pytest.raises(CorruptError):
            whole(data[start:])
        with pytest.raises(CorruptError):
            whole(data[:64] + data[64 + start :])


def test_no_flipped_bit_of_a_zip_gives_a_wrong_tensor(tmp_path: Path) -> None:
    """A flip in the data is for the checksum to find, any other must be found on opening or change nothing."""
    data = save(tmp_path / "x.pt", VALUE).read_bytes()
    _, true = whole(data)
    found = 0
    for position in range(len(data)):
        for bit in (0, 3, 6):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            try:
                file, values = whole(bytes(changed))
            except (ContentError, FitError):
                found += 1
                continue
            assert values == true or not verified(file, bytes(changed)), (position, bit)
    assert found > len(data) / 10


def test_no_flipped_bit_of_a_legacy_file_raises_anything_untyped(tmp_path: Path) -> None:
    """The format has no checksum, so a flip in a number goes unseen; sizes, types and places must still agree."""
    data = save(tmp_path / "x.pt", VALUE, _use_new_zipfile_serialization=False).read_bytes()
    for position in range(len(data)):
        for bit in (0, 3, 6):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            try:
                whole(bytes(changed))
            except (ContentError, FitError):
                continue


@given(st.data())
def test_no_damage_raises_anything_untyped(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    changed = bytearray(_sample(tmp_path_factory, data.draw(st.sampled_from(sorted(FORMATS)))))
    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.integers(0, len(changed) - 1))
        patch = data.draw(st.binary(min_size=1, max_size=8) | st.just(b"\xff" * 8) | st.just(bytes(8)))
        changed[start : start + len(patch)] = patch
    try:
        whole(bytes(changed))
    except (ContentError, FitError):
        return


_samples: dict[str, bytes] = {}


def _sample(factory: pytest.TempPathFactory, name: str) -> bytes:
    if name not in _samples:
        _samples[name] = save(factory.mktemp("damage") / "x.pt", VALUE, **FORMATS[name]).read_bytes()
    return _samples[name]


def test_a_large_file_finds_flips_in_its_directory(tmp_path: Path) -> None:
    """Past 1 MiB local headers are not read where the directory leaves no doubt about them."""
    path = save(tmp_path / "x.pt", {"a": torch.arange(1 << 18), "b": torch.arange(1 << 17)})
    data = path.read_bytes()
    _, true = whole(data)
    start = data.index(b"PK\x01\x02")
    for position in range(start, len(data)):
        for bit in (0, 2, 6):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            try:
                file, values = whole(bytes(changed))
            except (ContentError, FitError):
                continue
            assert values == true or not verified(file, bytes(changed)), (position - start, bit)


def test_errors_survive_missing_files(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read(tmp_path / "no.pt")
    with pytest.raises(NotFoundError):
        read_header(LocalStore(str(tmp_path)), "no.safetensors")
