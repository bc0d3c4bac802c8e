"""How much of a checkpoint is read, and that what is read goes on into every other use: conversion, verification."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.distributed.checkpoint import FileSystemWriter

import ucp
from tests.support.dcp_alone import sample, save
from ucp.cli.app import program
from ucp.converters.dcp import CONVERTER
from ucp.layout import Box
from ucp.run.gather import read_region
from ucp.store.local import LocalStore

ROWS, COLUMNS = 1024, 1024


class Counting(LocalStore):
    """Counts the requests and the bytes that are read."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.reads: list[int] = []

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        self.reads.append(len(memoryview(buffer).cast("B")))
        super().read_into(path, offset, buffer)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 4 MiB tensors, four of them in one file."""
    torch.manual_seed(0)
    tensors = {f"layer.{n}": torch.randn(ROWS, COLUMNS) for n in range(4)}
    return save({"model": tensors}, tmp_path_factory.mktemp("large") / "ckpt")


def test_the_catalog_reads_the_ends_of_items(large: Path) -> None:
    store = Counting(str(large))
    catalog = CONVERTER.read(store)
    metadata = (large / ".metadata").stat().st_size
    assert sum(store.reads) < metadata + 256 + 4 * 2048
    # Its class, the metadata, and one read for each end or boundary of items.
    assert len(store.reads) <= 2 + 5
    assert catalog.nbytes == 4 * 4 * ROWS * COLUMNS


@pytest.mark.parametrize("dim", [0, 1])
def test_a_slice_reads_about_its_own_bytes(large: Path, dim: int) -> None:
    """DCP itself reads the whole item for any slice of it."""
    store = Counting(str(large))
    catalog = CONVERTER.read(store)
    store.reads.clear()
    shape = (ROWS // 8, COLUMNS) if dim == 0 else (ROWS, COLUMNS // 8)
    start = (ROWS // 2, 0) if dim == 0 else (0, COLUMNS // 2)
    part = read_region(store, catalog.cover("layer.2", "value"), Box(start, shape))
    wanted = 4 * ROWS * COLUMNS // 8
    assert part.nbytes == wanted
    if dim == 0:
        assert sum(store.reads) <= 1.05 * wanted
    torch.manual_seed(0)
    whole = [torch.randn(ROWS, COLUMNS) for _ in range(4)][2]
    expected = whole[start[0] : start[0] + shape[0], start[1] : start[1] + shape[1]]
    assert part.tobytes() == expected.contiguous().numpy().tobytes()


def test_many_small_items_are_read_in_few_requests(tmp_path: Path) -> None:
    folder = save({"model": {f"p{n}": torch.full((4,), float(n)) for n in range(500)}}, tmp_path / "c")
    store = Counting(str(folder))
    assert len(CONVERTER.read(store).tensors) == 500
    assert len(store.reads) < 10


def test_open_reads_names_and_values(tmp_path: Path) -> None:
    state = sample()
    checkpoint = ucp.open(str(save(state, tmp_path / "c")))
    assert checkpoint.family == "dcp"
    assert (
        checkpoint["a.weight"]["exp_avg"][2:4].tolist() == state["optim"]["state"]["a.weight"]["exp_avg"][2:4].tolist()
    )


def test_conversion_to_universal_keeps_everything(tmp_path: Path) -> None:
    state = {**sample(), "rng": torch.arange(9, dtype=torch.uint8), "epoch": 4, "extra": {"lr_scheduler": {"n": 1}}}
    source, universal = save(state, tmp_path / "c"), tmp_path / "u"
    ucp.convert(str(source), str(universal))
    checkpoint = ucp.open(str(universal))
    for name, states in state["optim"]["state"].items():
        assert checkpoint[name]["value"][...].tolist() == state["model"][name].tolist()
        assert checkpoint[name]["exp_avg_sq"][...].tolist() == states["exp_avg_sq"].tolist()
    assert checkpoint.state["epoch"] == 4
    assert checkpoint.state["lr_scheduler"] == {"n": 1}


def test_a_small_array_of_numpy_far_down_a_file(tmp_path: Path) -> None:
    state = {**sample(), "rng": {"numpy": np.arange(3)}}
    catalog = CONVERTER.read(LocalStore(str(save(state, tmp_path / "ckpt"))))
    assert catalog.state["rng"]["numpy"].inline == np.arange(3).tobytes()


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    """DCP loads it in silence; the CRC that every item has tells."""
    folder = save(sample(), tmp_path / "c")
    catalog = CONVERTER.read(LocalStore(str(folder)))
    extent = catalog.cover("a.weight", "value").fragments[0].extent
    data = bytearray((folder / extent.object).read_bytes())
    data[extent.offset + 5] ^= 1
    (folder / extent.object).write_bytes(data)
    with pytest.raises(ucp.errors.CorruptError):
        ucp.convert(str(folder), str(tmp_path / "u"))


def test_command_line(tmp_path: Path) -> None:
    folder = save(sample(), tmp_path / "c", storage_writer=FileSystemWriter(tmp_path / "c", thread_count=2))
    told = json.loads(_run("info", folder, "--json"))
    assert (told["family"], told["step"], told["detail"]["files"]) == ("dcp", 3, 2)
    assert "exp_avg_sq" in _run("ls", folder)
    assert "__0_1.distcp" in _run("show", folder, "a.bias")
    _run("convert", folder, tmp_path / "u")
    assert "equals" in _run("verify", tmp_path / "u", "--against", folder)


def _run(*arguments: object) -> str:
    result = CliRunner().invoke(program, [str(argument) for argument in arguments], prog_name="ucp")
    assert result.exit_code == 0, result.output
    return result.stdout
