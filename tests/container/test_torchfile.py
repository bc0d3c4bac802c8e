"""Files that real torch.save writes, read without torch and compared with what torch.load gives."""

from __future__ import annotations

import collections
import io
import os
import pickle
import subprocess
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from tests.container.torchfiles import Colour, Level, objects, opaque, read, same, save, state, tensors, torch_zip
from ucp.container.torchfile import leaf_bytes, leaf_numpy, leaf_scalar, read_torch_file, with_bytes
from ucp.container.values import Reference
from ucp.errors import CorruptError, FitError, NotFoundError
from ucp.plan import Extent
from ucp.store import LocalStore, open_store
from ucp.tree import TensorLeaf, walk

FORMATS = {
    "zip": {},
    "zip, protocol 4": {"pickle_protocol": 4},
    "zip, protocol 5": {"pickle_protocol": 5},
    "legacy": {"_use_new_zipfile_serialization": False},
}
CORPUS = Path(__file__).parents[2].parent / "shared" / "corpus"


@pytest.fixture(params=FORMATS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return FORMATS[request.param]


@pytest.mark.parametrize("make", [tensors, state])
def test_everything_is_what_torch_loads(tmp_path: Path, options: dict[str, Any], make: Any) -> None:
    value = make()
    if "_use_new_zipfile_serialization" in options:  # torch cannot load its own legacy files of these dtypes
        value = {name: part for name, part in value.items() if "uint" not in str(name) and "float8" not in str(name)}
    path = save(tmp_path / "x.pt", value, **options)
    file = read(path)
    same(LocalStore(str(tmp_path)), file.root, torch.load(path, weights_only=False))
    assert file.entry.size == path.stat().st_size


def test_objects_are_data(tmp_path: Path, options: dict[str, Any]) -> None:
    root = read(save(tmp_path / "x.pt", objects(), **options)).root
    store = LocalStore(str(tmp_path))
    namespace = opaque(root["namespace"])
    assert (namespace.path, namespace.attribute("lr")) == ("argparse.Namespace", 0.1)
    assert opaque(namespace.attribute("nested")).state == {"x": 1}
    assert leaf_numpy(store, namespace.attribute("weight")).tolist() == [1, 1]
    assert opaque(root["slotted"]).state == {"a": 1, "b": [2]}
    assert isinstance(opaque(root["thing"]).attribute("first"), TensorLeaf)
    assert isinstance(root["class"], Reference)
    assert opaque(root["path"]).args == ("a", "b")
    for name, member in (("enum", Colour.RED), ("int enum", Level.HIGH)):
        node = opaque(root[name])
        assert node.args == (member.value,) or node.name == f"{type(member).__name__}.{member.name}"
    for name in ("conjugate", "complex128", "objects", "strings"):
        assert opaque(root[name]).module in ("torch._utils", "numpy", "numpy._core.numeric")


def test_a_subclass_of_tensor_keeps_its_name(tmp_path: Path) -> None:
    root = read(save(tmp_path / "x.pt", {"sub": torch.ones(2).as_subclass(Sub)})).root
    node = opaque(root["sub"])
    assert (node.name, type(node.args[0])) == ("Sub", TensorLeaf)


class Sub(torch.Tensor):
    pass


def test_a_tensor_with_attributes_is_a_tensor(tmp_path: Path) -> None:
    tensor = torch.arange(3.0)
    tensor.note = "seen by DeepSpeed"
    root = read(save(tmp_path / "x.pt", [tensor])).root
    same(LocalStore(str(tmp_path)), root, [torch.arange(3.0)])


def test_checksums_are_those_of_the_storages(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", tensors())
    data = path.read_bytes()
    checksums = read(path).checksums
    assert len(checksums) == sum(i.file_size > 0 and "/data/" in i.filename for i in zipfile.ZipFile(path).infolist())
    for checksum in checksums:
        assert checksum.object == "x.pt"
        assert zlib.crc32(data[checksum.offset :][: checksum.length]) == checksum.value


def test_no_checksums_where_torch_computed_none(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        file = read(save(tmp_path / "x.pt", {"a": torch.ones(3)}))
    finally:
        torch.serialization.set_crc32_options(True)
    assert file.checksums == ()
    same(LocalStore(str(tmp_path)), file.root, {"a": torch.ones(3)})


def test_another_alignment(tmp_path: Path) -> None:
    from torch.utils.serialization import config

    config.save.storage_alignment = 4096
    try:
        path = save(tmp_path / "x.pt", [torch.full((1 << 19,), float(i)) for i in range(3)])
    finally:
        config.save.storage_alignment = 64
    same(LocalStore(str(tmp_path)), read(path).root, torch.load(path))


def test_any_store(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", tensors())
    with fsspec.open("memory://torchfiles/a/x.pt", "wb") as file:
        file.write(path.read_bytes())
    store = open_store("memory://torchfiles")
    same(store, read_torch_file(store, "a/x.pt").root, torch.load(path, weights_only=False))


def test_a_large_file_takes_few_reads(tmp_path: Path) -> None:
    class Counting(LocalStore):
        reads = 0
        nbytes = 0

        def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
            Counting.reads += 1
            Counting.nbytes += len(buffer)
            super().read_into(path, offset, buffer)

    path = save(tmp_path / "x.pt", {f"layers.{i}.weight": torch.full((1000,), float(i)) for i in range(1000)})
    store = Counting(str(tmp_path))
    root = read_torch_file(store, "x.pt").root
    assert Counting.reads <= 5
    assert Counting.nbytes < path.stat().st_size / 4
    same(store, root, torch.load(path))


def test_work_of_opening_grows_with_the_number_of_storages_and_no_faster(tmp_path: Path) -> None:
    def calls(storages: int) -> int:
        path = save(tmp_path / f"{storages}.pt", {f"layers.{i}.weight": torch.zeros(10) for i in range(storages)})
        store, events = LocalStore(str(tmp_path)), collections.Counter[str]()
        sys.setprofile(lambda frame, event, argument: events.update((event,)))
        try:
            read_torch_file(store, path.name)
        finally:
            sys.setprofile(None)
        return events["call"] + events["c_call"]

    few, many = calls(250), calls(1000)
    assert many < 4.2 * few
    assert many < 1000 * 300


def test_torch_is_never_imported(tmp_path: Path) -> None:
    save(tmp_path / "x.pt", {**tensors(), **objects()})
    program = f"""
import sys
from ucp.container.torchfile import read_torch_file, leaf_bytes
from ucp.container.torchwrite import dumps
from ucp.container.safetensors import read_header
from ucp.store import LocalStore
store = LocalStore({str(tmp_path)!r})
leaf_bytes(store, read_torch_file(store, "x.pt").root["transposed"])
assert not {{"torch", "argparse", "tests"}} & set(sys.modules), sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (torch.tensor(3, dtype=torch.int32), 3),
        (torch.tensor([True]), True),
        (torch.tensor(0.1, dtype=torch.bfloat16), float(torch.tensor(0.1, dtype=torch.bfloat16))),
        (torch.tensor(0.1, dtype=torch.float16), float(torch.tensor(0.1, dtype=torch.float16))),
        (np.float64(0.1), 0.1),
    ],
)
def test_scalars(tmp_path: Path, value: Any, number: float) -> None:
    leaf = read(save(tmp_path / "x.pt", value)).root
    found = leaf_scalar(LocalStore(str(tmp_path)), leaf)
    assert (type(found), found) == (type(number), number)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_float8_as_a_scalar(tmp_path: Path, dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    store = LocalStore(str(tmp_path))
    leaf = read(save(tmp_path / "x.pt", every)).root
    name = str(dtype).removeprefix("torch.")
    found = [leaf_scalar(store, TensorLeaf(Extent("x.pt", leaf.extent.offset + i, (), (), name))) for i in range(256)]
    np.testing.assert_array_equal(found, every.float().numpy())


def test_no_scalar(tmp_path: Path) -> None:
    leaf = read(save(tmp_path / "x.pt", torch.zeros(2))).root
    with pytest.raises(FitError, match="shape"):
        leaf_scalar(LocalStore(str(tmp_path)), leaf)


def test_with_bytes_needs_the_file_no_more(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {**tensors(), **state()})
    store = LocalStore(str(tmp_path))
    whole = with_bytes(store, read(path).root)
    real = torch.load(path, weights_only=False)
    path.unlink()
    store.close()
    leaves = [node for _, node in walk(whole) if isinstance(node, TensorLeaf)]
    assert leaves
    assert all(leaf.inline is not None for leaf in leaves)
    assert leaf_bytes(store, whole["transposed"]) == real["transposed"].contiguous().numpy().tobytes()


FOREIGN = {
    "empty": (b"", CorruptError, "empty"),
    "text": (b"hello world\n" * 9, CorruptError, "text"),
    "zeros": (bytes(1000), CorruptError, "zeros"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", CorruptError, "LFS"),
    "noise": (bytes(range(256)) * 4, CorruptError, "not a file of torch.save"),
    "other zip": (torch_zip(b"").replace(b"data.pkl", b"data.abc"), CorruptError, "data.pkl"),
    "compressed": (torch_zip(b"N." * 100, compression=zipfile.ZIP_DEFLATED), FitError, "compressed"),
    "pickle": (pickle.dumps({"a": 1}), CorruptError, "not a file of torch.save"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_named_for_what_they_are(tmp_path: Path, name: str) -> None:
    data, kind, says = FOREIGN[name]
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(kind, match=says) as caught:
        read(tmp_path / "x.pt")
    assert str(tmp_path / "x.pt") in str(caught.value)
    assert caught.value.hint


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read(tmp_path / "x.pt")


def test_torchscript(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "x.pt")
    with pytest.raises(FitError, match="TorchScript"):
        read(tmp_path / "x.pt")


def test_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.pt", "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    with pytest.raises(FitError, match="tar"):
        read(tmp_path / "x.pt")


def test_big_endian(tmp_path: Path) -> None:
    data = save(tmp_path / "x.pt", [torch.ones(2)]).read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, b"big" if info.filename.endswith("byteorder") else old.read(info))
    with pytest.raises(FitError, match="big-endian"):
        read(tmp_path / "y.pt")
    legacy = save(tmp_path / "z.pt", [1], _use_new_zipfile_serialization=False)
    place = legacy.read_bytes().index(b"little_endian")
    changed = bytearray(legacy.read_bytes())
    changed[changed.index(b"\x88", place)] = 0x89
    legacy.write_bytes(changed)
    with pytest.raises(FitError, match="big-endian"):
        read(legacy)


def test_duplicate_names_and_missing_storages(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", [torch.ones(2), torch.zeros(2)])
    data = path.read_bytes()
    path.write_bytes(data.replace(b"x/data/1", b"x/data/0"))
    with pytest.raises(CorruptError, match="same name"):
        read(path)
    path.write_bytes(data.replace(b"x/data/1", b"x/data/7"))
    with pytest.raises(CorruptError, match="data/1"):
        read(path)


def test_a_zip_of_more_than_4_gib(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with torch.serialization.skip_data():
        torch.save({"a": torch.empty(1 << 30), "b": torch.empty(300)}, path)
    assert path.stat().st_size > 1 << 32
    leaves = read(path).root
    assert [leaves[name].extent.nbytes for name in ("a", "b")] == [4 << 30, 1200]
    offsets = [i for i in zipfile.ZipFile(path).infolist() if "/data/" in i.filename]
    assert [i.file_size for i in offsets] == [4 << 30, 1200]
    with path.open("rb") as file:
        for info, name in zip(offsets, ("a", "b"), strict=True):
            file.seek(info.header_offset)
            head = file.read(30)
            lengths = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
            assert leaves[name].extent.offset == info.header_offset + 30 + lengths


@pytest.fixture
def no_classes() -> Iterator[None]:
    """torch loads no class, also where a framework imported by an earlier test of this process has named some safe."""
    named = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    yield
    torch.serialization.add_safe_globals(named)


def corpus_files() -> list[str]:
    return sorted(os.path.relpath(path, CORPUS) for path in CORPUS.glob("cases/**/*.pt"))


@pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpus of checkpoints of other frameworks is not beside this one")
def test_checkpoints_of_other_frameworks() -> None:
    store = LocalStore(str(CORPUS))
    files = corpus_files()
    assert files
    for path in files:
        file = read_torch_file(store, path)
        for _, node in walk(file.root):
            if isinstance(node, TensorLeaf) and node.inline is None:
                assert node.extent.span[1] <= file.entry.size


@pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpus of checkpoints of other frameworks is not beside this one")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.usefixtures("no_classes")
def test_plain_checkpoints_of_other_frameworks_bit_for_bit() -> None:
    compared = 0
    for path in corpus_files():
        try:
            real = torch.load(CORPUS / path, weights_only=True)
        except pickle.UnpicklingError:
            continue  # holds classes, which torch imports and we do not
        store = LocalStore(str(CORPUS))
        same(store, read_torch_file(store, path).root, real, path)
        compared += 1
    assert compared
