"""A reader made from spec/universal-format.md alone, without a line of ours, reads the kept checkpoint."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crc32c import crc32c

from tests.data.make_universal_1_0 import FOLDER, tensors

SIZES = {"float8_e4m3fn": 1, "float8_e5m2": 1, "bfloat16": 2}


@pytest.fixture(scope="module")
def root() -> dict[str, Any]:
    return json.loads((FOLDER / "zarr.json").read_text())


def width(dtype: str) -> int:
    return SIZES.get(dtype) or np.dtype(dtype).itemsize


def objects(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any], int, Path, int]]:
    """(tensor, array, object, rows, path, run) in manifest order."""
    for tensor in manifest["tensors"]:
        for array in tensor["arrays"]:
            shape = array["shape"]
            for n, held in enumerate(array["objects"]):
                rows = min(array["rows"], shape[0] - n * array["rows"]) if shape else 1
                key = "/".join(["c", "0", *([str(n)] if shape else []), *("0" for _ in shape[1:])])
                run = rows * math.prod(shape[1:]) * width(array["dtype"])
                yield tensor["name"], array, held, rows, FOLDER / array["path"] / key, run


def test_data(root: dict[str, Any]) -> None:
    found: dict[tuple[str, str], bytes] = {}
    for name, array, held, _, path, run in objects(root["attributes"]["ucp"]):
        data = path.read_bytes()
        for i, state in enumerate(array["states"]):
            start = held["data"] + i * run
            found[name, state] = found.get((name, state), b"") + data[start : start + run]
    expected = {(name, state): array.tobytes() for name, states in tensors().items() for state, array in states.items()}
    assert found == {key: data for key, data in expected.items() if data}


def test_headers(root: dict[str, Any]) -> None:
    for name, array, held, rows, path, run in objects(root["attributes"]["ucp"]):
        data = path.read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        assert 8 + length == held["data"]
        assert held["data"] % 8 == 0
        header = json.loads(data[8 : 8 + length])
        about = header.pop("__metadata__")
        assert (about["ucp"], about["tensor"], json.loads(about["shape"])) == ("1.0", name, array["shape"])
        assert list(header) == [*array["states"], "__ucp_index__"]
        part = [rows, *array["shape"][1:]] if array["shape"] else []
        for i, state in enumerate(array["states"]):
            assert (header[state]["shape"], header[state]["data_offsets"]) == (part, [i * run, (i + 1) * run])
        assert header["__ucp_index__"]["data_offsets"][1] == len(data) - held["data"]


def test_digests_and_index(root: dict[str, Any]) -> None:
    manifest = root["attributes"]["ucp"]
    digests = (FOLDER / "digests.bin").read_bytes()
    block_bytes = manifest["block_bytes"]
    for _, array, held, _, path, run in objects(manifest):
        data = path.read_bytes()
        starts = [held["data"] + i * run for i in range(len(array["states"]))]
        spans = [
            (at, min(at + block_bytes, start + run))
            for start in starts
            for at in range(start, start + run, block_bytes)
        ]
        blocks = b"".join(struct.pack("<I", crc32c(data[start:stop])) for start, stop in spans)
        assert digests.startswith(blocks)
        digests = digests[len(blocks) :]
        tail = data[starts[-1] + run :]
        assert tail.startswith(blocks)
        index = tail[len(blocks) : -4]
        assert tail[-4:] == struct.pack("<I", crc32c(index))
        assert list(struct.iter_unpack("<2Q", index)) == list(entries(array, starts, run))
        assert held["blocks_crc32c"] == crc32c(blocks)
        assert held["index_crc32c"] == crc32c(tail)
        assert held["header_crc32c"] == crc32c(data[: held["data"]])
        assert held["size"] == len(data)
    assert digests == b""


def entries(array: dict[str, Any], starts: list[int], run: int) -> Iterator[tuple[int, int]]:
    chunk = math.prod(array["chunk"]) * width(array["dtype"])
    full = array["rows"] * math.prod(array["shape"][1:]) * width(array["dtype"])
    for start in starts:
        for at in range(0, full, chunk):
            yield (start + at, chunk) if at < run else (2**64 - 1, 2**64 - 1)


def test_files(root: dict[str, Any]) -> None:
    files = root["attributes"]["ucp"]["files"]
    for file in files:
        data = (FOLDER / file["path"]).read_bytes()
        assert (len(data), crc32c(data)) == (file["size"], file["crc32c"])
    listed = {FOLDER / file["path"] for file in files} | {path for *_, path, _ in objects(root["attributes"]["ucp"])}
    assert listed | {FOLDER / "zarr.json"} == {path for path in FOLDER.rglob("*") if path.is_file()}


def test_the_root(root: dict[str, Any]) -> None:
    expected = root["attributes"]["ucp"].pop("crc32c")
    text = json.dumps(root, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert crc32c(text.encode()) == expected
    assert "." not in "".join(part for part in text.split('"')[::2]), "no number has a fraction"
