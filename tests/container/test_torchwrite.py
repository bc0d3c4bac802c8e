"""Torch files written without torch, read by stock torch.load, by zipfile, and by our own reader."""

from __future__ import annotations

import argparse
import io
import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.serialization import config

from tests.container.torchfiles import Level, Thing, read, same, save, state
from ucp.container.torchfile import read_torch_file, with_bytes
from ucp.container.torchwrite import Slot, TorchFrame, Zeros, dumps
from ucp.container.values import Reference, Size
from ucp.errors import CorruptError, UsageError
from ucp.layout import Box, FlatRange
from ucp.layout.dtypes import ITEMSIZE
from ucp.plan import Cover, Digests, Extent, Fragment, Key, Section, Task, TensorSpec
from ucp.run.integrity import Ledger, Spans
from ucp.run.worker import write_object
from ucp.store import LocalStore, open_store
from ucp.tree import Opaque, TensorLeaf


def assemble(frame: TorchFrame, sections: list[bytes]) -> bytes:
    """The file as a worker writes it: in order of offset, without holes."""
    parts = [*frame.literals(), *((start, data) for start, data in zip(frame.offsets, sections, strict=True) if data)]
    parts.append(frame.suffix(Digests((), tuple(map(zlib.crc32, sections)))))
    out = b""
    for offset, data in sorted(parts, key=lambda part: part[0]):
        assert offset == len(out)
        out += data
    assert len(out) == frame.size
    return out


def leaf(tensor: torch.Tensor) -> TensorLeaf:
    dtype = str(tensor.dtype).removeprefix("torch.")
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return TensorLeaf(Extent.contiguous("", 0, tuple(tensor.shape), dtype), inline=raw)


@pytest.fixture
def checked_offsets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let torch compute where storages lie and compare with where it finds them."""
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")
    config.load.calculate_storage_offsets = True
    yield
    config.load.calculate_storage_offsets = False


@pytest.mark.usefixtures("checked_offsets")
@pytest.mark.parametrize("mmap", [False, True])
def test_every_dtype_as_torch_loads_it(tmp_path: Path, mmap: bool) -> None:
    real = {name: (torch.arange(12) - 3).view(3, 4).to(getattr(torch, name)) for name in ITEMSIZE}
    slots = {name: Slot(i, TensorSpec((3, 4), name)) for i, name in enumerate(ITEMSIZE)}
    data = assemble(TorchFrame.of(slots, archive="model"), [leaf(real[name]).inline or b"" for name in ITEMSIZE])
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    assert zipfile.ZipFile(path).testzip() is None
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    for name, tensor in real.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8))
    file = read(path)
    same(LocalStore(str(tmp_path)), file.root, real)
    assert len(file.checksums) == len(ITEMSIZE)


@pytest.mark.usefixtures("checked_offsets")
def test_shapes_ties_and_inline_tensors(tmp_path: Path) -> None:
    tree = {
        "no dims": Slot(0, TensorSpec((), "float32")),
        "inline": leaf(torch.arange(3)),
        "empty": Slot(1, TensorSpec((0, 3), "float32")),
        "tied": [Slot(2, TensorSpec((2, 2), "bfloat16")), Slot(2, TensorSpec((4,), "bfloat16"))],
        "last": Slot(3, TensorSpec((0,), "int64")),
    }
    sections = [np.float32(7).tobytes(), b"", bytes(range(8)), b""]
    (tmp_path / "x.pt").write_bytes(assemble(TorchFrame.of(tree), sections))
    loaded = torch.load(tmp_path / "x.pt", weights_only=True, mmap=True)
    assert (loaded["no dims"], loaded["empty"].shape, loaded["last"].shape) == (torch.tensor(7.0), (0, 3), (0,))
    assert loaded["inline"].tolist() == [0, 1, 2]
    first, second = loaded["tied"]
    assert first.data_ptr() == second.data_ptr()
    assert bytes(first.view(torch.uint8).flatten().tolist()) == sections[2]
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is None
    same(LocalStore(str(tmp_path)), read(tmp_path / "x.pt").root, loaded)


@pytest.mark.usefixtures("checked_offsets")
def test_slots_of_several_sections_and_zeros(tmp_path: Path) -> None:
    """Flat partitions hold many parameters and padding; every storage's CRC-32 is put together from the parts'."""
    blank = (1 << 20) + 3
    tree = {
        "flat": Slot(0, TensorSpec((10,), "int16"), (4, Zeros(6), 8, Zeros(2))),
        "one": Slot(1, TensorSpec((3,), "int8")),
        "zeros": Slot(2, TensorSpec((blank,), "uint8"), (Zeros(blank),)),
        "empty": Slot(3, TensorSpec((0,), "float32"), ()),
        "last": Slot(4, TensorSpec((9,), "uint8"), (Zeros(0), 0, 5, Zeros(4))),
        "again": Slot(4, TensorSpec((3, 3), "uint8"), (Zeros(0), 0, 5, Zeros(4))),
    }
    sections = [b"abcd", b"efghijkl", b"xyz", b"", b"12345"]
    frame = TorchFrame.of(tree)
    (tmp_path / "x.pt").write_bytes(assemble(frame, sections))
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.testzip() is None
        assert archive.read("archive/data/0") == b"abcd" + bytes(6) + b"efghijkl" + bytes(2)
        assert archive.read("archive/data/2") == bytes(blank)
        assert archive.read("archive/data/4") == b"12345" + bytes(4)
    loaded = torch.load(tmp_path / "x.pt", weights_only=True, mmap=True)
    assert (bytes(loaded["last"].tolist()), loaded["empty"].shape) == (b"12345" + bytes(4), (0,))
    assert loaded["again"].data_ptr() == loaded["last"].data_ptr()
    same(LocalStore(str(tmp_path)), read(tmp_path / "x.pt").root, loaded)


def test_large_runs_of_zeros_cost_no_memory() -> None:
    frame = TorchFrame.of(Slot(0, TensorSpec((1 << 40,), "uint8"), (1, Zeros((1 << 40) - 1))))
    offset, _ = frame.suffix(Digests((), (7,)))
    assert frame.size > offset > 1 << 40


@given(st.lists(st.tuples(st.binary(max_size=50), st.integers(0, 5000)), max_size=6))
def test_digests_of_storages_are_zlibs(parts: list[tuple[bytes, int]]) -> None:
    made = tuple(part for data, zeros in parts for part in (len(data), Zeros(zeros)))
    whole = b"".join(data + bytes(zeros) for data, zeros in parts)
    frame = TorchFrame.of(Slot(0, TensorSpec((len(whole),), "uint8"), made))
    file = assemble(frame, [data for data, _ in parts])
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        assert zlib.crc32(whole) == archive.getinfo("archive/data/0").CRC
        assert archive.read("archive/data/0") == whole


def test_plain_values(tmp_path: Path) -> None:
    tree = {
        "numbers": [
            0,
            1,
            255,
            256,
            65535,
            65536,
            -1,
            -(1 << 31),
            1 << 31,
            1 << 70,
            -(1 << 70),
            1.5,
            float("inf"),
            True,
        ],
        "text": ["", "é", "x" * 70000, "same", "same", b"", b"\x00\xff"],
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), Size((2, 3))),
        "none": None,
        "sets": [{1, 2}, set()],
        "complex": 1 - 2j,
        "ordered": OrderedDict(b=1, a=2),
        7: {"dtype": Reference("torch", "bfloat16"), "device": Opaque("torch", "device", ("cpu",))},
        "many": {f"name {i}": i for i in range(1000)},
    }
    (tmp_path / "x.pt").write_bytes(dumps(tree))
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    expected = {**tree, 7: {"dtype": torch.bfloat16, "device": torch.device("cpu")}}
    assert loaded == expected
    assert isinstance(loaded["tuples"][-1], torch.Size)
    assert isinstance(loaded["ordered"], OrderedDict)
    same(LocalStore(str(tmp_path)), read(tmp_path / "x.pt").root, loaded)


def test_what_torch_saved_comes_back_as_torch_saved_it(tmp_path: Path) -> None:
    value = {key: part for key, part in state().items() if key != "range"}
    path = save(tmp_path / "x.pt", value)
    store = LocalStore(str(tmp_path))
    tree = with_bytes(store, read(path).root)
    (tmp_path / "y.pt").write_bytes(dumps(tree, classes=["numpy.ndarray"]))
    again = torch.load(tmp_path / "y.pt", weights_only=False)
    same(store, read(tmp_path / "y.pt").root, again)
    assert torch.equal(again["torch rng"], value["torch rng"])
    assert again["python rng"] == value["python rng"]
    torch.optim.AdamW(torch.nn.Linear(3, 2).parameters()).load_state_dict(again["optimizer"])
    for mine, real in zip(again["arrays"] + again["scalars"], value["arrays"] + value["scalars"], strict=True):
        np.testing.assert_array_equal(mine, real)


def test_allowed_classes_by_name(tmp_path: Path) -> None:
    value = {"args": argparse.Namespace(lr=0.1, inner=[1]), "thing": Thing("x"), "level": Level.HIGH, "class": Thing}
    path = save(tmp_path / "x.pt", value)
    tree = read(path).root
    names = ["argparse.Namespace", f"{Thing.__module__}.Thing", f"{Thing.__module__}.Level"]
    (tmp_path / "y.pt").write_bytes(dumps(tree, classes=names))
    loaded = torch.load(tmp_path / "y.pt", weights_only=False)
    assert loaded["args"] == value["args"]
    assert loaded["thing"].first == "x"
    assert (loaded["level"], loaded["class"]) == (Level.HIGH, Thing)
    assert read(tmp_path / "y.pt").root == tree
    for missing in names:
        with pytest.raises(UsageError, match=missing):
            dumps(tree, classes=[name for name in names if name != missing])


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        (TensorLeaf(Extent.contiguous("a.pt", 0, (2,), "float32")), "a.pt"),
        (TensorLeaf(Extent.contiguous("", 0, (2,), "int8"), numpy=True, inline=b"ab"), "numpy.ndarray"),
        (Opaque("posix", "system", ("true",)), "posix.system"),
        (Reference("builtins", "eval"), "builtins.eval"),
        (Slot(0, TensorSpec((2,), "float32")), "slots"),
        (Slot(1, TensorSpec((2,), "float32")), "slot 1"),
        ([Slot(0, TensorSpec((2,), "int8")), Slot(0, TensorSpec((3,), "int8"))], "slot 0"),
        (Slot(0, TensorSpec((2,), "int8"), (1, Zeros(2))), "slot 0 has parts"),
        (object(), "object"),
    ],
)
def test_what_cannot_be_written(tree: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        dumps(tree)


def test_a_cycle_cannot_be_written() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(CorruptError):
        dumps(cycle)


def test_the_same_tree_gives_the_same_bytes() -> None:
    tree = {"a": leaf(torch.arange(5)), "b": [1, "x"]}
    assert dumps(tree) == dumps(tree)


def test_more_than_4_gib(tmp_path: Path) -> None:
    """Sizes and places past 32 bits, in a sparse file: the sections are holes, so their CRC-32 is that of zeros."""
    count = (1 << 30) + 5
    tree = {
        "large": Slot(0, TensorSpec((count,), "float32")),
        "after": Slot(1, TensorSpec((3,), "float32")),
        "inline": leaf(torch.arange(4)),
    }
    frame = TorchFrame.of(tree)
    path = tmp_path / "x.pt"
    after = np.arange(3, dtype="<f4").tobytes()
    with path.open("wb") as file:
        for offset, data in (*frame.literals(), (frame.offsets[1], after)):
            file.seek(offset)
            file.write(data)
        offset, data = frame.suffix(Digests((), (0, zlib.crc32(after))))
        file.seek(offset)
        file.write(data)
    assert path.stat().st_size == frame.size
    root = read(path).root
    assert root["large"].extent.shape == (count,)
    assert [root[name].extent.offset for name in ("large", "after")] == list(frame.offsets)
    with zipfile.ZipFile(path) as archive:
        assert archive.read("archive/data/1") == after
        assert archive.getinfo("archive/data/0").file_size == 4 * count
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert loaded["large"].shape == (count,)
    assert loaded["large"][-1] == 0
    assert (loaded["after"].tolist(), loaded["inline"].tolist()) == ([0, 1, 2], [0, 1, 2, 3])


def test_a_frame_crosses_processes() -> None:
    frame = TorchFrame.of({"a": Slot(0, TensorSpec((2,), "float32"))})
    assert pickle.loads(pickle.dumps(frame)) == frame
    assert replace(frame, block_bytes=1).offsets == frame.offsets
    assert frame.needs_crc32


def test_the_layout_is_that_of_torch(tmp_path: Path) -> None:
    """The same records at the same places as torch gives them, but for the pickle and the random id."""
    value = {"a": torch.arange(5.0), "e": torch.empty(0), "b": torch.arange(100)}
    path = save(tmp_path / "archive.pt", value)
    real = {info.filename: info for info in zipfile.ZipFile(path).infolist()}
    frame = TorchFrame.of({name: leaf(tensor) for name, tensor in value.items()})
    with zipfile.ZipFile(path) as archive:
        frame = replace(frame, pickle=archive.read("archive/data.pkl"))
    mine = {info.filename: info for info in zipfile.ZipFile(io.BytesIO(assemble(frame, []))).infolist()}
    del real["archive/.data/serialization_id"]
    assert list(mine) == list(real)
    for name, info in real.items():
        assert (mine[name].header_offset, mine[name].CRC, mine[name].flag_bits) == (
            info.header_offset,
            info.CRC,
            info.flag_bits,
        )


@pytest.mark.parametrize("url", ["local", "memory://torchwrite"])
def test_a_task_writes_what_torch_loads(tmp_path: Path, url: str) -> None:
    """From views in one torch file to storages of their own in another, through the engine."""
    value = {"t": torch.arange(60.0).view(6, 10).t(), "v": torch.arange(50)[7:40], "h": torch.ones(3).half()}
    path = save(tmp_path / "x.pt", value)
    root = read(path).root
    specs = {name: TensorSpec(leaf.extent.shape, leaf.extent.dtype) for name, leaf in root.items()}
    frame = TorchFrame.of({name: Slot(i, spec) for i, (name, spec) in enumerate(specs.items())}, block_bytes=64)
    sections = tuple(
        Section(offset, FlatRange(0, spec.size), Cover.of(Key(name, "value"), spec, [whole(root[name].extent)]))
        for offset, (name, spec) in zip(frame.offsets, specs.items(), strict=True)
    )
    destination = open_store(str(tmp_path / "out") if url == "local" else url)
    task = Task("y.pt", frame.size, frame, sections)
    ledger = Ledger(Spans(read(path).checksums))
    write_object(LocalStore(str(tmp_path)), destination, task, ledger=ledger, advance=lambda _: None)
    written = destination.read("y.pt")
    assert len(written) == frame.size
    assert zipfile.ZipFile(io.BytesIO(written)).testzip() is None
    loaded = torch.load(io.BytesIO(written), weights_only=True)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in value.items())


def whole(extent: Extent) -> Fragment:
    return Fragment(Box.whole(extent.shape), extent)


def test_paths_are_those_of_the_store(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "x.pt").write_bytes(dumps([leaf(torch.arange(3))]))
    store = LocalStore(str(tmp_path))
    root = read_torch_file(store, "deep/x.pt").root
    assert root[0].extent.object == "deep/x.pt"
    same(store, root, [torch.arange(3)])
