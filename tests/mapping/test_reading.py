"""Checkpoints of mesh coordinates through the public calls: opened, converted, loaded into jobs on other meshes."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

import ucp
from tests.mapping.made import numbers, part, put_together, read, zero
from tests.train.staged import LOGICAL, PROGRAM, SIZES, Stage, adamw, check, local, scaled
from ucp.catalog import ParamGroup, Scalar
from ucp.checkpoint import Checkpoint
from ucp.converter import Sharded
from ucp.errors import ConflictError
from ucp.lang import parse
from ucp.layout import Mesh
from ucp.mapping import consolidate
from ucp.store import open_store


def saved(store, *, tp, pp, spoil=None):
    """What a job of `tp` times `pp` ranks holds, each tensor in ZeRO's flat ranges over three further ranks."""
    parts = []
    for t, p in itertools.product(range(tp), range(pp)):
        place = {"tp": tp, "pp": pp, "tp_rank": t, "pp_rank": p}
        states = [local(full, **place) for full in (LOGICAL, scaled(10), {n: x * x for n, x in LOGICAL.items()})]
        tensors = {
            name: dict(zip(("value", "exp_avg", "exp_avg_sq"), (s[name].numpy() for s in states), strict=True))
            for name in states[0]
        }
        if spoil == (t, p):
            tensors["layers.0.norm"]["exp_avg"] = tensors["layers.0.norm"]["exp_avg"] + np.float32(1)
        groups = tuple(
            ParamGroup(tuple(n for n in tensors if ("norm" in n) == norm), {"lr": lr, "weight_decay": 0.0})
            for norm, lr in ((False, 0.02), (True, 0.01))
        )
        coordinate, catalog = part(store, {"tp": t, "pp": p}, tensors, cut=zero(3), param_groups=groups)
        for tensor in catalog.tensors.values():
            tensor.scalars["step"] = Scalar(3.0, "float32")
        parts.append((coordinate, catalog))
    return parts


@pytest.mark.parametrize(("source", "target"), [((2, 2), (1, 4)), ((1, 4), (2, 2)), ((2, 1), (1, 1)), ((1, 1), (2, 4))])
def test_any_mesh_goes_on_from_any_other(tmp_path, source, target):
    store = open_store(str(tmp_path))
    catalog = consolidate(
        saved(store, tp=source[0], pp=source[1]),
        parse(PROGRAM),
        mesh=Mesh({"pp": source[1], "tp": source[0]}),
        sizes={**SIZES, "vocab": 7},
    )
    for name, tensor in LOGICAL.items():
        np.testing.assert_array_equal(read(catalog, store, name), tensor.numpy())
    tp, pp = target
    for t, p in itertools.product(range(tp), range(pp)):
        place = {"tp": tp, "pp": pp, "tp_rank": t, "pp_rank": p}
        stage = Stage(**place)
        optimizer = adamw(stage)
        here = {"mesh": {"pp": pp, "tp": tp}, "coordinate": {"pp": p, "tp": t}}
        ucp.load((stage, optimizer), Checkpoint(catalog, store), program="source", **here)
        check(stage, optimizer, **place)


class Sliced:
    """A family whose tensors only a program can put together."""

    family = "sliced"
    spoil = None

    def detect(self, store):
        return store.exists("sliced")

    def sharded(self, store, **options):
        assert options in ({}, {"some": 1})
        return Sharded(
            saved(store, tp=2, pp=2, spoil=self.spoil), Mesh({"pp": 2, "tp": 2}), config=SIZES | {"vocab": 7}
        )


@pytest.fixture
def sliced(monkeypatch, tmp_path):
    found = Sliced()
    monkeypatch.setattr("ucp.converter.families", lambda: ["sliced", "universal"])
    real = ucp.converter.converter
    monkeypatch.setattr("ucp.converter.converter", lambda name: found if name == "sliced" else real(name))
    folder = tmp_path / "sliced"
    folder.mkdir()
    (folder / "sliced").touch()
    return found


def test_a_family_hands_over_its_shards_to_be_opened_and_converted(sliced, tmp_path):
    url, program = str(tmp_path / "sliced"), parse(PROGRAM)
    ckpt = ucp.open(url, program=program, some=1)
    np.testing.assert_array_equal(ckpt["layers.3.k.weight"]["value"][1:3].numpy(), LOGICAL["layers.3.k.weight"][1:3])
    report = ucp.convert(
        url, str(tmp_path / "out"), program=program, read_options={"some": 1}, processes=True, workers=2
    )
    assert report.bytes_checked > 0
    done = ucp.open(tmp_path / "out")
    assert done.catalog.program == ckpt.catalog.program
    for name, tensor in LOGICAL.items():
        np.testing.assert_array_equal(done[name]["exp_avg"][...].numpy(), (tensor * 10).numpy())
        assert done[name].scalars == {"step": 3}
    stage = Stage(tp=2, pp=1, tp_rank=1, pp_rank=0)
    optimizer = adamw(stage)
    ucp.load((stage, optimizer), done, program="source", mesh={"tp": 2}, coordinate={"tp": 1})
    check(stage, optimizer, tp=2, pp=1, tp_rank=1, pp_rank=0)


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_drifted_apart_stop_a_conversion(sliced, tmp_path, rank):
    sliced.spoil = (rank, 1)
    options = {"program": parse(PROGRAM)}
    with pytest.raises(ConflictError) as caught:
        ucp.convert(str(tmp_path / "sliced"), str(tmp_path / "out"), **options)
    assert "layers.2.norm.weight[exp_avg]" in caught.value.message
    for t in (0, 1):
        assert f"tp{t}pp1/layers.0.norm/exp_avg/0" in caught.value.message
    ucp.convert(str(tmp_path / "sliced"), str(tmp_path / "unchecked"), check=False, **options)
    assert ucp.open(tmp_path / "unchecked").step == 5


class Counting:
    """A store that notes the length of every read."""

    def __init__(self, store):
        self.store, self.lengths = store, []

    def read_into(self, path, offset, buffer):
        self.lengths.append(len(buffer))
        self.store.read_into(path, offset, buffer)

    def read_runs(self, path, offsets, length, buffer):
        self.lengths += [length] * len(offsets)
        self.store.read_runs(path, offsets, length, buffer)


def test_strided_blocks_are_read_in_large_pieces(tmp_path: Path):
    """A query is three quarters of a fused tensor, a key one eighth: the first is read through, the second in runs."""
    groups, r, d, hidden = 8, 6, 64, 256
    fused = numbers(groups * (r + 2) * d, hidden)
    program = (
        "format 1\nsize groups r d hidden\n"
        "w [groups (r d + d + d), hidden] <-> q [groups r d, hidden], k [groups d, hidden], v [groups d, hidden]"
    )
    catalog, store = put_together(
        tmp_path, program, {(): {"w": fused}}, mesh=Mesh({}), sizes={"groups": groups, "d": d, "r": r}
    )
    split = fused.reshape(groups, r + 2, d, hidden)
    for name, expected, most_reads, overread in (("q", split[:, :r], 2, 1.4), ("k", split[:, r], groups, 1.0)):
        counting = Counting(store)
        found = read(catalog, counting, name)
        np.testing.assert_array_equal(found, expected.reshape(-1, hidden))
        assert len(counting.lengths) <= most_reads
        assert sum(counting.lengths) <= overread * found.nbytes
