"""Helpers: real torch files, and trees compared bit for bit with what torch itself loads."""

from __future__ import annotations

import argparse
import enum
import io
import random
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ucp.container.torchfile import TorchFile, leaf_numpy, read_torch_file
from ucp.container.values import Reference, Size
from ucp.store import LocalStore
from ucp.tree import Opaque, TensorLeaf, Tree


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    HIGH = 3


class Thing:
    """A class that no reader knows."""

    def __init__(self, first: Any) -> None:
        self.first = first


class Slotted:
    __slots__ = ("a", "b")

    def __init__(self) -> None:
        self.a, self.b = 1, [2]


def tensors() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    base = torch.randn(6, 8, generator=generator)
    flat = torch.arange(40, dtype=torch.float32)
    kinds = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16]
    kinds += [torch.float32, torch.float64, torch.uint16, torch.uint32, torch.uint64, torch.complex64]
    kinds += [torch.float8_e4m3fn, torch.float8_e5m2]
    return {
        **{str(kind): (base * 3).to(kind) for kind in kinds},
        "no dims": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "transposed": base.t(),
        "every other": base[::2, 1::3],
        "parts of one storage": [flat[:10].view(2, 5), flat[10:40].view(5, 6)],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "channels last": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
        "tied": (base, base),
        "parameter": torch.nn.Parameter(base.bfloat16()),
        "frozen parameter": torch.nn.Parameter(base.clone(), requires_grad=False),
    }


def state() -> dict[Any, Any]:
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {
        "model": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "ordered": OrderedDict(a=1, b=OrderedDict()),
        "plain": [None, True, -1, 1 << 70, 2.5, "é\ud800", b"\x00\xff", bytearray(b"ab"), 1j, (), (1, 2, 3, 4)],
        "sets": ({1, "a", (2, 3)}, frozenset({4}), set()),
        "range": range(3),
        3: {"nested": {"deeper": [[[["x"]]]]}},
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "torch rng": torch.get_rng_state(),
        "python rng": random.Random(3).getstate(),
        "numpy rng": np.random.RandomState(3).get_state(),
        "arrays": [
            np.arange(6.0).reshape(2, 3),
            np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)),
            np.arange(3, dtype=">i4"),
            np.arange(6, dtype=">c8").reshape(2, 3).T,
            np.zeros((0, 2), np.uint8),
            np.array(True),
        ],
        "scalars": [np.float32(1.5), np.int64(-3), np.bool_(True), np.float64(0.1)],
        "shared array": [shared := np.arange(4), shared],
    }


def objects() -> dict[str, Any]:
    return {
        "namespace": argparse.Namespace(lr=0.1, weight=torch.ones(2), nested=argparse.Namespace(x=1)),
        "enum": Colour.RED,
        "int enum": Level.HIGH,
        "thing": Thing(torch.zeros(3)),
        "slotted": Slotted(),
        "path": Path("a/b"),
        "class": Thing,
        "conjugate": torch.ones(2, dtype=torch.complex64).conj(),
        "complex128": torch.ones(2, dtype=torch.complex128),
        "objects": np.array([None, "a"], dtype=object),
        "strings": np.array(["a", "bc"]),
    }


def save(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def read(path: Path) -> TorchFile:
    return read_torch_file(LocalStore(str(path.parent)), path.name)


def same(store: LocalStore, mine: Tree, real: Any, place: str = "") -> None:
    """Assert that a tree says what torch loaded, bit for bit."""
    if isinstance(real, torch.Tensor):
        _same_tensor(store, mine, real, place)
    elif isinstance(real, np.ndarray | np.generic):
        _same_array(store, mine, np.asarray(real), place)
    elif isinstance(real, dict):
        assert isinstance(mine, dict), place
        assert len(mine) == len(real), place
        for (my_key, my_value), (key, value) in zip(mine.items(), real.items(), strict=True):
            same(store, my_key, key, f"key of {place}")
            same(store, my_value, value, f"{place}.{key}")
    elif isinstance(real, torch.Size):
        assert (type(mine), mine) == (Size, tuple(real)), place
    elif isinstance(real, list | tuple):
        assert (type(mine), len(mine)) == (type(real), len(real)), place
        for index, value in enumerate(real):
            same(store, mine[index], value, f"{place}.{index}")
    elif isinstance(real, torch.dtype):
        assert mine == Reference("torch", str(real).removeprefix("torch.")), place
    elif isinstance(real, torch.device):
        assert (mine.path, mine.args) == ("torch.device", (str(real),)), place
    elif isinstance(real, range):
        assert (mine.path, mine.args) == ("builtins.range", (real.start, real.stop, real.step)), place
    else:
        real = bytes(real) if isinstance(real, bytearray) else real
        assert (type(mine), mine) == (type(real), real), place


def _same_tensor(store: LocalStore, mine: Tree, real: torch.Tensor, place: str) -> None:
    assert isinstance(mine, TensorLeaf), place
    assert not mine.numpy, place
    extent = mine.extent
    assert (extent.shape, f"torch.{extent.dtype}") == (tuple(real.shape), str(real.dtype)), place
    if real.numel():
        assert extent.strides == real.stride(), place
    raw = real.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert leaf_numpy(store, mine).tobytes() == raw, place


def _same_array(store: LocalStore, mine: Tree, real: np.ndarray, place: str) -> None:
    assert isinstance(mine, TensorLeaf), place
    assert mine.numpy, place
    array = leaf_numpy(store, mine)
    assert (array.shape, array.dtype) == (real.shape, real.dtype.newbyteorder("<")), place
    assert array.tobytes() == real.astype(array.dtype).tobytes(), place


def opaque(node: Tree) -> Opaque:
    assert isinstance(node, Opaque)
    return node


def torch_zip(pickle: bytes, storages: dict[str, bytes] | None = None, **options: Any) -> bytes:
    """A zip in the shape of torch's with a pickle of any kind in it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", **options) as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/version", b"3\n")
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
    return out.getvalue()


def refit_crc(data: bytearray, name: bytes) -> None:
    """Put the true CRC-32 of the record `name` into the directory of a torch zip that was tampered with."""
    with zipfile.ZipFile(io.BytesIO(bytes(data))) as archive:
        info = archive.getinfo(name.decode())
    fields = struct.unpack_from("<2H", data, info.header_offset + 26)
    start = info.header_offset + 30 + sum(fields)
    crc = zlib.crc32(data[start : start + info.file_size])
    place = data.rindex(name) - 46
    struct.pack_into("<L", data, place + 16, crc)
