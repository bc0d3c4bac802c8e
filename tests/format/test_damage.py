"""Every byte is under some digest, and damage anywhere is found; a manifest that lies is refused."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.format.build import universal
from ucp.catalog import Catalog, ParamGroup, ProgramRecord
from ucp.errors import ContentError, CorruptError, FitError, NotFoundError, UcpError
from ucp.format.documents import compact, root_digest
from ucp.format.records import ROOT, Places
from ucp.format.universal import CONVERTER
from ucp.layout import Mesh
from ucp.plan import BLOCK_BYTES, Extent
from ucp.store import LocalStore
from ucp.tree import TensorLeaf

BLOBS, DIGESTS, STATE = Places().blobs, Places().digests, Places().state


def tensors() -> dict[str, dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    adam = ("value", "exp_avg", "exp_avg_sq")
    return {
        "a/weight": {state: random.standard_normal((6, 4)).astype("f4") for state in adam},
        "scale": {"value": np.array(3.0, "f4"), "step": np.array(7, "i8")},
        "empty": {"value": np.zeros((0, 2), "f4")},
        "cut": {state: random.standard_normal((15, 400)).astype("f4") for state in adam},
    }


def small(folder: Path) -> LocalStore:
    leaf = TensorLeaf(Extent.contiguous("3-0.raw", 0, (5, 400), "float32"))
    state = {"rng": {"seed": 1, "blob": b"x" * 1000}, "table": (leaf, 0.5)}
    groups = (ParamGroup(("a/weight", "scale"), {"lr": 0.1, "betas": (0.9, 0.999)}),)
    program = ProgramRecord({"format": 1, "statements": []}, Mesh({"tp": 2}), {"hidden": 4}, {"tied": False})
    around = {"state": state, "param_groups": groups, "ties": {"head": "a/weight"}, "program": program}
    return universal(folder, tensors(), shard_bytes=30_000, **around)


@pytest.fixture
def checkpoint(tmp_path: Path) -> LocalStore:
    return small(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    """For tests that put the root back."""
    return small(tmp_path_factory.mktemp("damage"))


def read(store: LocalStore) -> Catalog:
    """As a new process would: no file is open yet."""
    return CONVERTER.read(LocalStore(store.root))


def failing(store: LocalStore) -> list[str]:
    """Objects with a span that fails its digest."""
    catalog, fresh = read(store), LocalStore(store.root)
    return [
        checksum.object
        for checksum in catalog.checksums
        if crc32c(fresh.read(checksum.object, checksum.offset, checksum.length)) != checksum.value
    ]


def test_the_checkpoint_is_sound(checkpoint: LocalStore) -> None:
    assert failing(checkpoint) == []


def test_every_byte_is_under_one_digest(checkpoint: LocalStore) -> None:
    catalog = read(checkpoint)
    spans = defaultdict(list)
    for checksum in catalog.checksums:
        spans[checksum.object].append((checksum.offset, checksum.offset + checksum.length))
    entries = {entry.path: entry.size for entry in checkpoint.entries()}
    assert entries.pop(ROOT) > 0
    assert spans.keys() == entries.keys()
    for path, found in spans.items():
        found.sort()
        assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
        assert found[-1][1] == entries[path]


def test_blocks_are_cut_per_state(tmp_path: Path) -> None:
    elements = BLOCK_BYTES // 2 + 5
    store = universal(tmp_path, {"a": {"value": np.zeros(elements, "f2"), "exp_avg": np.ones(elements, "f2")}})
    lengths = [checksum.length for checksum in read(store).checksums if checksum.object.endswith("c/0/0")]
    assert lengths[1:-1] == [BLOCK_BYTES, 10, BLOCK_BYTES, 10]


def flip(store: LocalStore, path: str, at: int, bit: int) -> None:
    file = Path(store.root, path)
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.write_bytes(data)


def test_a_flipped_bit_in_any_object_is_found(checkpoint: LocalStore) -> None:
    chance = random.Random(0)
    for entry in list(checkpoint.entries()):
        if entry.path in (ROOT, DIGESTS, STATE, BLOBS):
            continue
        for at in {0, entry.size - 1, *(chance.randrange(entry.size) for _ in range(3))}:
            bit = chance.randrange(8)
            flip(checkpoint, entry.path, at, bit)
            assert failing(checkpoint) == [entry.path]
            flip(checkpoint, entry.path, at, bit)
    assert failing(checkpoint) == []


@pytest.mark.parametrize("path", [DIGESTS, STATE, BLOBS])
def test_a_flipped_bit_in_what_is_read_stops_the_reader(checkpoint: LocalStore, path: str) -> None:
    for at in range(0, checkpoint.entry(path).size, 7 if path != BLOBS else 101):
        flip(checkpoint, path, at, at % 8)
        with pytest.raises(CorruptError, match=path):
            list(read(checkpoint).checksums)
        flip(checkpoint, path, at, at % 8)


def test_a_flipped_bit_anywhere_in_the_root_is_found(checkpoint: LocalStore) -> None:
    good = checkpoint.read(ROOT)
    for at in range(0, len(good), 5):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        Path(checkpoint.root, ROOT).write_bytes(bad)
        with pytest.raises(UcpError):
            read(checkpoint)


def test_an_attribute_added_later_is_a_change(checkpoint: LocalStore) -> None:
    root = json.loads(checkpoint.read(ROOT))
    root["attributes"]["note"] = "x"
    checkpoint.put(ROOT, compact(root))
    with pytest.raises(CorruptError, match="changed after it was written"):
        read(checkpoint)


@pytest.mark.parametrize("path", ["tensors/cut/c/0/1/0", "tensors/scale/zarr.json", "state/blobs.safetensors", DIGESTS])
def test_missing_and_truncated_objects_are_named(checkpoint: LocalStore, path: str) -> None:
    file = Path(checkpoint.root, path)
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(ContentError, match=path):
        read(checkpoint)
    file.unlink()
    with pytest.raises(UcpError, match=path):
        read(checkpoint)


def test_without_a_root_nothing_is_a_checkpoint(checkpoint: LocalStore) -> None:
    assert CONVERTER.detect(checkpoint)
    checkpoint.delete(ROOT)
    assert not CONVERTER.detect(checkpoint)


def test_a_foreign_zarr_group_is_no_checkpoint(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    store.put(ROOT, b'{"zarr_format":3,"node_type":"group","attributes":{}}')
    assert not CONVERTER.detect(store)
    assert not CONVERTER.detect(LocalStore(str(tmp_path / "nothing")))


def signed(store: LocalStore, root: dict[str, Any]) -> None:
    """Put a root whose digest is right, whatever it says."""
    root["attributes"]["ucp"]["crc32c"] = root_digest(root)
    Path(store.root, ROOT).write_bytes(compact(root))


Change = Callable[[dict[str, Any]], object]


def first(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["tensors"][0]["arrays"][0]


LIES: dict[str, Change] = {
    "path leaves the folder": lambda m: first(m).update(path="tensors/../../etc"),
    "path is absolute": lambda m: first(m).update(path="/tensors/a"),
    "path is elsewhere": lambda m: first(m).update(path="state/a"),
    "path with a dot folder": lambda m: first(m).update(path="tensors/.."),
    "file leaves the folder": lambda m: m["files"][0].update(path="../x"),
    "two arrays, one path": lambda m: m["tensors"][1]["arrays"][0].update(
        path=first(m)["path"].upper().replace("TENSORS", "tensors")
    ),
    "two tensors, one name": lambda m: m["tensors"][1].update(name=m["tensors"][0]["name"]),
    "a state twice": lambda m: first(m).update(states=["value", "value", "exp_avg_sq"]),
    "no states": lambda m: first(m).update(states=[]),
    "negative size": lambda m: first(m)["objects"][0].update(size=-1),
    "data past the end": lambda m: first(m)["objects"][0].update(data=1 << 40),
    "fewer objects": lambda m: first(m).update(objects=[]),
    "more objects": lambda m: first(m).update(objects=first(m)["objects"] * 2),
    "shape overflows": lambda m: first(m).update(shape=[2**40, 2**40], chunk=[1, 1], rows=1),
    "negative shape": lambda m: first(m).update(shape=[-6, -4]),
    "fractional shape": lambda m: first(m).update(shape=[6.0, 4]),
    "boolean shape": lambda m: first(m).update(shape=[True, 4]),
    "other shape": lambda m: first(m).update(shape=[6, 5], chunk=[6, 5]),
    "chunk of zero": lambda m: first(m).update(chunk=[0, 4]),
    "chunk that does not divide": lambda m: first(m).update(chunk=[5, 4]),
    "chunk that is no run": lambda m: first(m).update(chunk=[6, 2]),
    "no rows": lambda m: first(m).update(rows=0),
    "unknown dtype": lambda m: first(m).update(dtype="object"),
    "other dtype": lambda m: first(m).update(dtype="float64"),
    "unknown kind": lambda m: m["tensors"][0].update(kind="secret"),
    "name is a number": lambda m: m["tensors"][0].update(name=3),
    "tensors are no list": lambda m: m.update(tensors={}),
    "tie to nothing": lambda m: m["ties"].update(x="y"),
    "tie of a tensor": lambda m: m["ties"].update({"scale": "a/weight"}),
    "mesh of nothing": lambda m: m["source"].update(mesh=[["dp", 0]]),
    "mesh is no list of pairs": lambda m: m["source"].update(mesh=[["dp"]]),
    "program is text": lambda m: m.update(program="format 1"),
    "program of nothing": lambda m: m["program"].pop("ast"),
    "program on no mesh": lambda m: m["program"].update(mesh=[["tp", 0]]),
    "program with a negative size": lambda m: m["program"]["sizes"].update(hidden=-1),
    "program with a flag that is a number": lambda m: m["program"]["flags"].update(tied=1),
    "step is text": lambda m: m.update(step="7"),
    "unlisted state": lambda m: m.update(files=[f for f in m["files"] if f["path"] != STATE]),
    "scalar is text": lambda m: m["tensors"][0]["scalars"]["step"].update(value="7"),
    "options with a bad tag": lambda m: m["param_groups"][0].update(options={"lr": {"$float": "x"}}),
    "no blocks": lambda m: m.update(block_bytes=0),
    "blocks that cut an element": lambda m: m.update(block_bytes=4097),
    "smaller blocks": lambda m: m.update(block_bytes=16),
    "no version": lambda m: m.pop("version"),
    "digest too large": lambda m: first(m)["objects"][0].update(blocks_crc32c=2**32),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies_is_refused(shared: LocalStore, lie: str) -> None:
    good = Path(shared.root, ROOT).read_bytes()
    root = json.loads(good)
    LIES[lie](root["attributes"]["ucp"])
    signed(shared, root)
    try:
        with pytest.raises(CorruptError, match=r"zarr\.json"):
            read(shared)
    finally:
        Path(shared.root, ROOT).write_bytes(good)


def places(node: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, child in items for place in places(child, (*path, key)))]


TYPED = (NotFoundError, FitError, ContentError)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["$tuple", "$float", "$tensor", "a"]), inner, max_size=2)
    ),
    max_leaves=5,
)


@settings(max_examples=300)
@given(data=st.data(), value=JSON)
def test_no_manifest_breaks_the_reader(shared: LocalStore, data: st.DataObject, value: Any) -> None:
    good = Path(shared.root, ROOT).read_bytes()
    root = json.loads(good)
    manifest = root["attributes"]["ucp"]
    *path, last = data.draw(st.sampled_from(places(manifest)[1:]))
    node = manifest
    for key in path:
        node = node[key]
    node[last] = copy.deepcopy(value)
    signed(shared, root)
    try:
        with contextlib.suppress(*TYPED):
            list(read(shared).checksums)
    finally:
        Path(shared.root, ROOT).write_bytes(good)


NO_ROOTS = [b"", b"[]", b"{", b"\xff", b'{"a":1,"a":2}', b'{"a":NaN}', b"[" * 100_000]
NO_ROOTS += [b'{"a":-1e999}', rb'{"a":"\uD800"}']


@pytest.mark.parametrize("text", NO_ROOTS)
def test_a_root_that_is_no_json_object(tmp_path: Path, text: bytes) -> None:
    store = LocalStore(str(tmp_path))
    store.put(ROOT, text)
    with pytest.raises(CorruptError, match=r"zarr\.json"):
        read(store)
