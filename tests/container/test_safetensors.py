"""Headers of safetensors files: those of the real library, and lying ones."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ucp.container.safetensors import read_header
from ucp.errors import CorruptError, FitError
from ucp.layout.dtypes import SAFETENSORS
from ucp.store import LocalStore


def write(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> LocalStore:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return LocalStore(str(path.parent))


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_real_files(tmp_path: Path) -> None:
    tensors = {name: torch.arange(6).view(2, 3).to(getattr(torch, name)) for name in SAFETENSORS}
    tensors |= {"no dims": torch.tensor(1.5), "empty": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    store = LocalStore(str(tmp_path))
    file = read_header(store, "x.safetensors")
    assert file.metadata == {"format": "pt"}
    assert file.tensors.keys() == tensors.keys()
    for name, real in load_file(tmp_path / "x.safetensors").items():
        extent, spec = file.tensors[name], file.spec(name)
        assert (spec.shape, f"torch.{spec.dtype}") == (tuple(real.shape), str(real.dtype))
        raw = store.read("x.safetensors", extent.offset, extent.nbytes)
        assert raw == real.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_long_header(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.{'x' * 50}": torch.full((1,), float(i)) for i in range(2000)}
    save_file(tensors, tmp_path / "x.safetensors")
    file = read_header(LocalStore(str(tmp_path)), "x.safetensors")
    assert len(file.tensors) == 2000
    assert file.metadata == {}


GOOD = entry("F32", [2], 0, 8)
LIES: dict[str, tuple[Any, bytes]] = {
    "array": (b"[]", b""),
    "not json": (b"{abc}", b""),
    "not utf-8": (b'{"\xff": 1}', b""),
    "deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""),
    "twice": (b'{"__metadata__":{},"__metadata__":{}}', b""),
    "text": ({"a": "F32"}, b""),
    "extra field": ({"a": {**GOOD, "more": 1}}, bytes(8)),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "negative": ({"a": entry("F32", [2], -8, 0)}, bytes(8)),
    "float offsets": ({"a": entry("F32", [2], 0, 8.0)}, bytes(8)),  # type: ignore[arg-type]
    "true as shape": ({"a": entry("F32", [True], 0, 4)}, bytes(4)),
    "backwards": ({"a": entry("F32", [2], 8, 0)}, bytes(8)),
    "shape too large": ({"a": entry("F32", [3], 0, 8)}, bytes(8)),
    "shape overflows": ({"a": entry("F32", [1 << 59, 1 << 59], 0, 8)}, bytes(8)),
    "number of many digits": (b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}', b""),
    "overlap": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12)),
    "same place": ({"a": GOOD, "b": GOOD}, bytes(8)),
    "hole": ({"a": GOOD, "b": entry("F32", [1], 12, 16)}, bytes(16)),
    "hole at start": ({"a": entry("F32", [2], 4, 12)}, bytes(12)),
    "more data": ({"a": GOOD}, bytes(9)),
    "less data": ({"a": GOOD}, bytes(7)),
    "metadata": ({"__metadata__": {"a": 1}}, b""),
    "metadata list": ({"__metadata__": []}, b""),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_lying_headers(tmp_path: Path, name: str) -> None:
    header, data = LIES[name]
    store = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CorruptError, match=r"x\.safetensors"):
        read_header(store, "x.safetensors")


def test_the_lies_differ_from_a_sound_file(tmp_path: Path) -> None:
    store = write(tmp_path / "x.safetensors", {"b": entry("F32", [1], 8, 12), "a": GOOD}, bytes(12))
    assert list(read_header(store, "x.safetensors").tensors) == ["a", "b"]


def test_unknown_dtype(tmp_path: Path) -> None:
    store = write(tmp_path / "x.safetensors", {"a": entry("F4", [2], 0, 1)}, bytes(1))
    with pytest.raises(FitError, match="F4"):
        read_header(store, "x.safetensors")


@pytest.mark.parametrize("length", [3, 100_000_001, 1 << 40, (1 << 64) - 1])
def test_lying_lengths(tmp_path: Path, length: int) -> None:
    store = write(tmp_path / "x.safetensors", {"a": GOOD}, bytes(8), length=length)
    with pytest.raises(CorruptError):
        read_header(store, "x.safetensors")


def test_every_cut_and_flip(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2), "b": torch.ones(3, dtype=torch.bfloat16)}, path)
    data, store = path.read_bytes(), LocalStore(str(tmp_path))
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CorruptError):
            read_header(store, path.name)
    header = int.from_bytes(data[:8], "little") + 8
    for position in range(header):
        for bit in range(8):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            path.write_bytes(changed)
            with contextlib.suppress(CorruptError, FitError):
                read_header(store, path.name)


@given(
    st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.none() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(["F32", "dtype", "shape"]),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), inner)
            ),
            max_leaves=8,
        ),
    )
)
def test_no_header_raises_anything_untyped(tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    store = write(path, header, bytes(16))
    try:
        read_header(store, path.name)
    except (CorruptError, FitError):
        return
    assert all(isinstance(item, dict) for item in header.values())
