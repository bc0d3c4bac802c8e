"""The conformance vectors: the compiler makes them, a plain reading confirms them, and binding finds them again."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.layout.plain import read_vector
from ucp.lang.bind import bind
from ucp.lang.held import Held
from ucp.testing import vectors

FOLDER = Path(__file__).parents[2] / "spec" / "vectors"
FILES = sorted(FOLDER.glob("*.json"))
VECTORS = {path.stem: vectors.read(path) for path in FILES}
SHARDS = [name for name, vector in VECTORS.items() if "shards" in vector]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_command_makes_the_file_again(path: Path) -> None:
    assert vectors.write(vectors.compute(vectors.read(path))) == path.read_text()
    assert vectors.read(path)["name"] == path.stem


def test_the_command_rewrites_a_file(tmp_path: Path) -> None:
    copy = tmp_path / "grouped-qkv.json"
    given = {key: value for key, value in VECTORS["grouped-qkv"].items() if key != "shards"}
    copy.write_text(json.dumps({**given, "shards": ["of old"]}))
    vectors.main([str(copy)])
    assert copy.read_text() == (FOLDER / copy.name).read_text()


@pytest.mark.parametrize("name", SHARDS)
def test_a_plain_reading_of_every_element_agrees(name: str) -> None:
    vector = VECTORS[name]
    told = read_vector(vector)
    assert {(tuple(sorted(s["coordinate"].items())), s["name"]) for s in vector["shards"]} == set(told)
    for shard in vector["shards"]:
        shape, elements = told[tuple(sorted(shard["coordinate"].items())), shard["name"]]
        assert tuple(shard["shape"]) == shape
        assert expand(shard) == elements


def expand(shard: Mapping[str, Any]) -> list[set[tuple[str, int]]]:
    """What each element of a shard is by its blocks: (tensor, row-major position)."""
    shape = shard["shape"]
    size = ravel([0] * len(shape), shape, last=True)
    found: list[set[tuple[str, int]]] = [set() for _ in range(size)]
    for block in shard["blocks"]:
        view = list(itertools.chain(*block["view"]))
        for index in itertools.product(*map(range, block["shape"])):
            at = list(block["at"])
            for i, (dim, stride) in zip(index, block["steps"], strict=True):
                if i:
                    at[dim] += i * stride
            there = [a + i for a, i in zip(block["start"], index, strict=True)]
            item = (block["tensor"], ravel(there, view))
            here = found[ravel(at, shape)]
            assert item not in here
            here.add(item)
    return found


def ravel(index: list[int], shape: list[int], *, last: bool = False) -> int:
    position, size = 0, 1
    for i, n in zip(index, shape, strict=True):
        assert 0 <= i < n or last
        position, size = position * n + i, size * n
    return size if last else position


@pytest.mark.parametrize("name", SHARDS)
def test_binding_the_shards_finds_the_same_blocks(name: str) -> None:
    vector = VECTORS[name]
    state = vector.get("state", "value")
    dtype = "bfloat16" if "bf16" in vector["program"][-1] else "float32"
    held = [
        Held(shard["name"], tuple(shard["shape"]), dtype, shard["coordinate"], kind)
        for kind in dict.fromkeys(["value", state])
        for shard in (vector["shards"] if kind == state else whole(vector))
    ]
    bound = bind(vectors.program_of(vector), held, **vectors.setting_of(vector))
    found = {
        (held[piece.held].name, tuple(held[piece.held].coordinate.items()), tensor, piece.block.box, piece.block.start)
        for (tensor, kind), pieces in bound.pieces.items()
        for piece in pieces
        if kind == state
    }
    told = {
        (s["name"], tuple(s["coordinate"].items()), bound.ties.get(b["tensor"], b["tensor"]), *box(b))
        for s in vector["shards"]
        for b in s["blocks"]
    }
    assert found == told


def whole(vector: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The shards of the value, for a vector that shows another state."""
    found: list[Mapping[str, Any]] = vectors.compute({**vector, "state": "value"})["shards"]
    return found


def box(block: Mapping[str, Any]) -> tuple[object, object]:
    from ucp.layout import Box

    return Box(tuple(block["start"]), tuple(block["shape"])), tuple(block["at"])


def test_buffers_are_what_their_formulas_say() -> None:
    """The elements in a row of all ranks' buffers, written out for the packs of the vectors."""
    for name, flat in {"zero-1": zero_1, "megatron-bucket": bucket, "zero-3": zero_3}.items():
        vector = VECTORS[name]
        rows: list[list[Any]] = []
        for buffer in vector["buffers"]:
            row: list[Any] = [None] * buffer["length"]
            for param, start, length, offset in buffer["parts"]:
                row[offset : offset + length] = [(param, start + k) for k in range(length)]
            rows.append(row)
        assert rows == flat(vector["parameters"], vector["mesh"]["dp"])


def zero_1(sizes: list[int], dp: int) -> list[list[Any]]:
    row = [(k, i) for k, n in enumerate(sizes) for i in range(n)]
    return split(row + [None] * (-len(row) % (2 * dp)), dp)


def zero_3(sizes: list[int], dp: int) -> list[list[Any]]:
    rows: list[list[Any]] = [[] for _ in range(dp)]
    for k, n in enumerate(sizes):
        for rank, part in enumerate(split([(k, i) for i in range(n)] + [None] * (-n % dp), dp)):
            rows[rank] += part
    return rows


def bucket(sizes: list[int], dp: int) -> list[list[Any]]:
    row: list[Any] = []
    for k in reversed(range(len(sizes))):
        row += [(k, i) for i in range(sizes[k])]
        row += [None] * (-len(row) % 64)
    return split(row + [None] * (-len(row) % 128), dp)


def split(row: list[Any], count: int) -> list[list[Any]]:
    each = len(row) // count
    return [row[k * each : (k + 1) * each] for k in range(count)]


def test_every_refusal_names_a_kind_of_error() -> None:
    refused = {name: vector["refused"] for name, vector in VECTORS.items() if "refused" in vector}
    assert set(refused.values()) == {"fit", "program"}
    assert all(name.startswith("refused-") for name in refused)


def test_the_vectors_use_every_construct() -> None:
    """What a layout can say, and the paper's table of patterns."""
    used: set[str] = set()
    for vector in VECTORS.values():
        text = "\n".join(vector["program"])
        used |= {word for word in CONSTRUCTS if CONSTRUCTS[word] in text}
        used |= {f"{key}:" for key in vector}
    assert used >= {*CONSTRUCTS, "cuts:", "placements:", "saved:", "state:", "flags:", "parameters:"}
    patterns = {"unique", "replicated", "partial", "shard-v", "shard-h", "shard-hy", "shard-nc-moe", "shard-nc-gqa"}
    assert set(VECTORS) >= patterns


CONSTRUCTS = {
    "composed": "[groups r d",
    "joined": " + ",
    "cut": "/tp",
    "placed": "@ep",
    "pad": "_",
    "align": "align",
    "number": "2 half",
    "one": "[1,",
    "scalar": "[]",
    "dtype": "bf16[",
    "factored axis": "axis tp =",
    "let": "let ",
    "capture": "{l}",
    "cut capture": "{l/vpp/pp}",
    "offset": "{l/pp+2}",
    "computed": "{=l+3}",
    "block": "in model",
    "on": " on pp",
    "when": " when ",
    "unless": " unless ",
    "tie": "tie ",
    "mean": " mean ",
    "lacking": "lacking",
    "each": "each dp",
    "every": "*param",
    "reversed": "reversed",
}
