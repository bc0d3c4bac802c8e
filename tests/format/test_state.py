from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from tests.format.build import universal
from tests.format.schemas import STATE, problems
from ucp.catalog import ParamGroup
from ucp.container.values import Reference, Size
from ucp.errors import CorruptError, FitError
from ucp.format.documents import compact, parsed
from ucp.format.leaves import LeafReader
from ucp.format.state import Blob, Decoder, Encoder
from ucp.format.universal import CONVERTER
from ucp.plan import Extent
from ucp.store import LocalStore
from ucp.tree import Opaque, TensorLeaf, Tree


def inline(array: np.ndarray, **options: Any) -> TensorLeaf:
    extent = Extent.contiguous("", 0, array.shape, array.dtype.name)
    return TensorLeaf(extent, inline=array.tobytes(), **options)


def round_trip(tree: Tree) -> tuple[Tree, bytes]:
    """Encode, write as JSON text, read, decode; also the blobs object."""
    encoder = Encoder(lambda leaf: leaf.inline or b"")
    encoded = encoder.encode(tree)
    blobs, table = encoder.blobs()
    doc = parsed(compact({"blobs": table, "state": {"x": encoded}}), where="test")
    assert problems(STATE, doc) == []
    held = {key: Blob(row["dtype"], tuple(row["shape"]), row["offset"]) for key, row in doc["blobs"].items()}

    def read(leaf: TensorLeaf) -> bytes:
        return blobs[leaf.extent.offset : leaf.extent.offset + leaf.extent.nbytes]

    return Decoder(held, read).decode(doc["state"]["x"]), blobs


def same(one: Tree, other: Tree) -> bool:
    """Equality that also tells types, signs of zero and NaN, order of members, and looks into opaque objects."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return struct.pack("d", one) == struct.pack("d", other) or (math.isnan(one) and math.isnan(other))
    if isinstance(one, complex):
        return same(one.real, other.real) and same(one.imag, other.imag)
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Opaque):
        fields = ("module", "name", "args", "kwargs", "state", "items", "pairs")
        return all(same(getattr(one, field), getattr(other, field)) for field in fields)
    return one == other


HASHABLE = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text()
    | st.text(st.sampled_from(["\ud800", "$", "a"]), max_size=4)
    | st.binary(max_size=600)
)
LEAVES = HASHABLE | st.binary(max_size=600).map(lambda data: inline(np.frombuffer(data, "u1")))
NAMES = st.text(max_size=5)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.lists(st.integers(0, 9), max_size=3).map(Size)
        | st.sets(HASHABLE.filter(lambda value: value == value), max_size=3)
        | st.frozensets(st.integers(), max_size=3)
        | st.dictionaries(HASHABLE.filter(lambda value: value == value), inner, max_size=3)
        | st.builds(
            Opaque,
            NAMES,
            NAMES,
            args=st.tuples(inner),
            kwargs=st.dictionaries(NAMES, inner, max_size=2),
            state=inner,
            items=st.lists(inner, max_size=2),
            pairs=st.lists(st.tuples(inner, inner), max_size=2),
        )
        | st.builds(Reference, NAMES, NAMES)
    ),
    max_leaves=12,
)


def without_places(tree: Tree, blobs: bytes) -> Tree:
    """The tree with every tensor's bytes put back inline."""
    if isinstance(tree, TensorLeaf) and tree.inline is None:
        at = tree.extent.offset
        extent = Extent.contiguous("", 0, tree.extent.shape, tree.extent.dtype)
        return TensorLeaf(extent, tree.numpy, blobs[at : at + extent.nbytes])
    if isinstance(tree, dict):
        return {key: without_places(value, blobs) for key, value in tree.items()}
    if isinstance(tree, Size):
        return tree
    if isinstance(tree, list | tuple):
        return type(tree)(without_places(item, blobs) for item in tree)
    if isinstance(tree, Reference) or not isinstance(tree, Opaque):
        return tree
    return Opaque(
        tree.module,
        tree.name,
        without_places(tree.args, blobs),
        without_places(tree.kwargs, blobs),
        without_places(tree.state, blobs),
        without_places(tree.items, blobs),
        without_places(tree.pairs, blobs),
    )


@given(TREES)
def test_trees_come_back(tree: Tree) -> None:
    found, blobs = round_trip(tree)
    assert same(without_places(found, blobs), tree)


@pytest.mark.parametrize(
    "value",
    [
        0.1,
        -0.0,
        float("inf"),
        float("-inf"),
        5e-324,
        1.0,
        2**53,
        -(2**53),
        2**200,
        True,
        1,
        {"$float": "1"},
        {1: "a", "1": "b"},
        {},
        (),
        Opaque("a", "b", state={}),
        Opaque("a", "b", state=[]),
        Opaque("a", "b", state=0),
        "\ud800",
        Size((1, 2)),
        Reference("torch", "bfloat16"),
        frozenset({1}),
    ],
    ids=repr,
)
def test_values_that_json_would_lose(value: Tree) -> None:
    found, _ = round_trip(value)
    assert same(found, value)


def test_a_nan_stays_one() -> None:
    found, _ = round_trip(float("nan"))
    assert math.isnan(found)


def test_sets_are_written_in_one_order() -> None:
    encoder = Encoder(lambda _: b"")
    one = {str(i) for i in range(100)}
    other = {str(i) for i in reversed(range(100))}
    assert encoder.encode(one) == encoder.encode(other)


def test_large_tensors_and_bytes_lie_in_a_safetensors_object(tmp_path: Path) -> None:
    wide, narrow = np.arange(100, dtype="f8"), np.arange(301, dtype="u1")
    tree = {"narrow": inline(narrow, numpy=True), "wide": inline(wide), "again": inline(wide), "raw": b"y" * 999}
    found, blobs = round_trip(tree)
    (tmp_path / "blobs.safetensors").write_bytes(blobs)
    held = load_file(tmp_path / "blobs.safetensors")
    assert sorted(array.nbytes for array in held.values()) == [301, 800, 999], "equal tensors are kept once"
    assert found["wide"].extent.offset % 8 == 0
    assert found["narrow"].numpy
    assert same(without_places(found, blobs), tree)


def test_without_tensors_there_is_no_blobs_object() -> None:
    assert round_trip({"a": 1, "b": inline(np.zeros(3))})[1] == b""


def test_values_of_other_types_are_refused_by_name() -> None:
    with pytest.raises(FitError, match=r"scheduler: a builtins\.object"):
        Encoder(lambda _: b"").encode({"a": object()}, where="scheduler")


def test_trees_too_deep_are_refused() -> None:
    tree: Tree = []
    for _ in range(5000):
        tree = [tree]
    with pytest.raises(CorruptError, match="nested too deeply"):
        Encoder(lambda _: b"").encode(tree)


@pytest.mark.parametrize(
    "value",
    [
        {"$unknown": 1},
        {"$float": "x"},
        {"$float": None},
        {"$int": "12", "b": 1},
        {"$dict": [[[], 1]]},
        {"$dict": [[1]]},
        {"$set": [[]]},
        {"$tuple": 3},
        {"$complex": ["1"]},
        {"$bytes": {"data": "!"}},
        {"$bytes": {"blob": "9"}},
        {"$tensor": {"dtype": "float32", "shape": [2], "numpy": False, "data": "AAAA"}},
        {"$tensor": {"dtype": "float32", "shape": [-1, 0], "numpy": False, "data": ""}},
        {"$tensor": {"dtype": "object", "shape": [], "numpy": False, "data": ""}},
        {"$tensor": {"dtype": "uint8", "shape": [5], "numpy": False, "blob": "0"}},
        {"$object": {"module": 1, "name": "x"}},
        {"$object": {"module": "a", "name": "x", "kwargs": [[1, 2]]}},
        {"$reference": ["a"]},
        1.5,
    ],
    ids=json.dumps,
)
def test_what_no_encoder_writes_is_refused(value: Any) -> None:
    decoder = Decoder({"0": Blob("uint8", (4,), 0)}, lambda _: b"")
    with pytest.raises(CorruptError, match="scheduler"):
        decoder.decode([value], where="scheduler")


def test_through_a_checkpoint(tmp_path: Path) -> None:
    table = np.arange(12, dtype="f4").reshape(3, 4)
    strided = TensorLeaf(Extent("0-0.raw", 4, (4, 300), (1, 4), "float32"))
    value = np.arange(1204, dtype="f4")
    scheduler = Opaque("torch.optim.lr_scheduler", "StepLR", state={"step_size": 3, "last": (1, 2.5)})
    state = {"lr_scheduler": scheduler, "rng": {"cpu": inline(np.arange(5000, dtype="u1")), "table": inline(table)}}
    state |= {"strided": strided}
    groups = (ParamGroup(("a",), {"lr": 1e-3, "betas": (0.9, 0.95), "fused": None, "scale": inline(np.ones(99))}),)
    store = universal(tmp_path, {"a": {"value": value}}, state=state, param_groups=groups)
    catalog = CONVERTER.read(store)
    assert list(catalog.state) == ["lr_scheduler", "rng", "strided"]
    assert same(catalog.state["lr_scheduler"], scheduler)
    assert catalog.state["rng"]["cpu"].extent.object == "state/blobs.safetensors"
    read = LeafReader(LocalStore(store.root), catalog.checksums)
    assert read(catalog.state["rng"]["cpu"]) == np.arange(5000, dtype="u1").tobytes()
    assert catalog.state["rng"]["table"].inline == table.tobytes()
    rows = np.lib.stride_tricks.as_strided(value[1:], (4, 300), (4, 16))
    assert read(catalog.state["strided"]) == rows.tobytes()
    assert catalog.state["strided"].extent.shape == (4, 300)
    (group,) = catalog.param_groups
    assert (group.params, group.options["betas"], group.options["fused"]) == (("a",), (0.9, 0.95), None)
    assert read(group.options["scale"]) == np.ones(99).tobytes()
