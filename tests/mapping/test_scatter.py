"""A catalog as the coordinates of another mesh would hold it: read from the source's own bytes, wherever they lie."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from tests.mapping.made import numbers, part, put_together, read, whole, zero
from ucp.catalog import ParamGroup
from ucp.errors import FitError
from ucp.lang import parse
from ucp.layout import Mesh
from ucp.mapping import consolidate, is_logical, scatter
from ucp.plan import ZEROS
from ucp.run.cast import round_to_bfloat16
from ucp.store import open_store

FUSED = """
format 1
mesh pp tp
size hidden ffn groups r d vocab
embed.weight  [(vocab + _ align 4*tp)/tp, hidden]  <->  embed.weight [vocab, hidden]  on pp 0
in layers.{l/pp} <-> layers.{l} {
  qkv.weight  [groups/tp (r d + d + d), hidden]  <->  q.weight [groups r d, hidden],
                                                      k.weight [groups d, hidden],
                                                      v.weight [groups d, hidden]
  fc1.weight  [ffn/tp + ffn/tp, hidden]  <->  gate.weight [ffn, hidden], up.weight [ffn, hidden]
  fc2.weight  [hidden, ffn/tp]           <->  down.weight
}
state * : like param
"""
SIZES = {"groups": 4, "r": 2, "d": 3, "vocab": 13}


def model() -> dict[str, np.ndarray]:
    shapes = {"embed.weight": (13, 6)}
    for layer in range(4):
        shapes |= {f"layers.{layer}.{n}.weight": (24 if n == "q" else 12, 6) for n in "qkv"}
        shapes |= {f"layers.{layer}.{n}.weight": (8, 6) for n in ("gate", "up")}
        shapes[f"layers.{layer}.down.weight"] = (6, 8)
    return {name: numbers(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def shard(full: dict[str, np.ndarray], tp: int, pp: int, t: int, p: int) -> dict[str, np.ndarray]:
    """What a rank holds, written out by hand."""
    held = {}
    if p == 0:
        padded = np.zeros((-(-13 // (4 * tp)) * 4 * tp, 6), "<f4")
        padded[:13] = full["embed.weight"]
        held["embed.weight"] = np.split(padded, tp)[t]
    for local in range(4 // pp):
        at = f"layers.{p * (4 // pp) + local}"
        q, k, v = (np.split(full[f"{at}.{n}.weight"], 4) for n in "qkv")
        groups = [np.concatenate([q[g], k[g], v[g]]) for g in range(t * 4 // tp, (t + 1) * 4 // tp)]
        held[f"layers.{local}.qkv.weight"] = np.concatenate(groups)
        gate, up = (np.split(full[f"{at}.{n}.weight"], tp)[t] for n in ("gate", "up"))
        held[f"layers.{local}.fc1.weight"] = np.concatenate([gate, up])
        held[f"layers.{local}.fc2.weight"] = np.split(full[f"{at}.down.weight"], tp, axis=1)[t]
    return held


@pytest.mark.parametrize("cut", [whole, zero(3)], ids=["boxes", "flat"])
@pytest.mark.parametrize(("source", "target"), [*itertools.product([(1, 1), (2, 2), (4, 1)], repeat=2)])
def test_any_mesh_from_any_other(tmp_path, source, target, cut):
    full, program = model(), parse(FUSED)
    tp, pp = source
    shards = {
        (("pp", p), ("tp", t)): {
            name: {"value": value, "exp_avg": value * 2} for name, value in shard(full, tp, pp, t, p).items()
        }
        for p in range(pp)
        for t in range(tp)
    }
    catalog, store = put_together(tmp_path, FUSED, shards, mesh=Mesh({"pp": pp, "tp": tp}), sizes=SIZES, cut=cut)
    tp, pp = target
    made = scatter(catalog, program, mesh=Mesh({"pp": pp, "tp": tp}), sizes=SIZES)
    assert len(made.parts) == tp * pp
    assert made.config["hidden"] == 6
    for at, held in made.parts:
        expected = shard(full, tp, pp, at["tp"], at["pp"])
        assert held.tensors.keys() == expected.keys()
        for name, value in expected.items():
            assert held.tensors[name].states["exp_avg"].shape == value.shape
            assert held.tensors[name].scalars["step"].value == 7
            np.testing.assert_array_equal(read(held, store, name), value)
            np.testing.assert_array_equal(read(held, store, name, "exp_avg"), value * 2)
        (group,) = held.param_groups
        assert set(group.params) == set(expected)


def test_padding_is_zeros_that_no_object_holds(tmp_path):
    catalog, _ = put_together(tmp_path, FUSED, {(): shard(model(), 1, 1, 0, 0)}, mesh=Mesh({}), sizes=SIZES)
    made = scatter(catalog, parse(FUSED), mesh=Mesh({"tp": 2}), sizes=SIZES)
    _, last = made.parts[-1]
    held = last.cover("embed.weight", "value").fragments
    assert sum(f.region.size for f in held if f.extent.object == ZEROS) == 3 * 6
    assert sum(f.region.size for f in held) == last.tensors["embed.weight"].states["value"].size


def test_low_precision_copies_replicas_and_reductions_come_along(tmp_path):
    store = open_store(str(tmp_path))
    value = np.arange(48, dtype="<f4").reshape(8, 6)
    low = {"up.weight": round_to_bfloat16(value)}
    parts = [part(store, {"dp": n}, {"up.weight": value, "norm.weight": value[0] + n}, low=low) for n in range(2)]
    program = parse(
        "format 1\nmesh dp tp\nsize n m\nup.weight [n, m/tp] <-> up.weight\nnorm.weight mean dp <-> norm.weight\n"
    )
    catalog = consolidate(parts, program, mesh=Mesh({"dp": 2}))
    target = parse("format 1\nmesh tp\nsize n m\nup.weight [n, m/tp] <-> up.weight\nnorm.weight <-> norm.weight\n")
    made = scatter(catalog, target, mesh=Mesh({"tp": 2}))
    for at, held in made.parts:
        t = at["tp"]
        witness = held.witness("up.weight")
        assert witness is not None
        assert witness.cover.spec.shape == (8, 3)
        assert len(held.cover("up.weight", "value").replicas) == 1
        np.testing.assert_array_equal(read(held, store, "up.weight"), value[:, 3 * t : 3 * t + 3])
        np.testing.assert_array_equal(read(held, store, "norm.weight"), value[0] + 0.5)


def test_groups_keep_their_order(tmp_path):
    """Optimizers number parameters by position, in an order that need not be the program's."""
    catalog, _ = put_together(tmp_path, FUSED, {(): shard(model(), 1, 1, 0, 0)}, mesh=Mesh({}), sizes=SIZES)
    order = ["down", "v", "q", "up", "k", "gate"]
    names = [f"layers.{layer}.{name}.weight" for layer in (2, 0, 3, 1) for name in order]
    groups = (ParamGroup((*names, "embed.weight"), {"lr": 1.0}),)
    made = scatter(replace(catalog, param_groups=groups), parse(FUSED), mesh=Mesh({"tp": 2}), sizes=SIZES)
    for _, held in made.parts:
        (group,) = held.param_groups
        fused = [f"layers.{layer}.{name}.weight" for layer in (2, 0, 3, 1) for name in ("fc2", "qkv", "fc1")]
        assert group.params == (*fused, "embed.weight")


def test_parts_of_one_shard_that_differ_are_refused(tmp_path):
    catalog, _ = put_together(tmp_path, FUSED, {(): shard(model(), 1, 1, 0, 0)}, mesh=Mesh({}), sizes=SIZES)
    gate = "layers.0.gate.weight"
    odd = replace(catalog, tensors={**catalog.tensors, gate: replace(catalog.tensors[gate], kind="frozen")})
    with pytest.raises(FitError, match=r"fc1.weight: is made of tensors of different kinds"):
        scatter(odd, parse(FUSED), mesh=Mesh({"tp": 2}), sizes=SIZES)
    groups = (ParamGroup((gate,), {"lr": 1.0}), ParamGroup(("layers.0.up.weight",), {"lr": 2.0}))
    with pytest.raises(FitError, match="different hyper-parameters"):
        scatter(replace(catalog, param_groups=groups), parse(FUSED), mesh=Mesh({"tp": 2}), sizes=SIZES)
    with pytest.raises(FitError, match="3"):
        scatter(catalog, parse(FUSED), mesh=Mesh({"tp": 3}), sizes=SIZES)


def test_logical_names_are_told_from_own_ones(tmp_path):
    catalog, _ = put_together(tmp_path, FUSED, {(): shard(model(), 1, 1, 0, 0)}, mesh=Mesh({}), sizes=SIZES)
    assert is_logical(catalog)
    same = "format 1\nlayers.{l}.{name}.weight <-> layers.{l}.{name}.weight\nembed.weight <-> embed.weight\n"
    own, _ = put_together(tmp_path / "own", same, {(): model()}, mesh=Mesh({}))
    assert not is_logical(own)
    assert not is_logical(replace(own, program=None))


def test_a_program_that_cuts_and_does_not_rename_leaves_own_names(tmp_path):
    cut = (
        "format 1\nmesh tp\nsize n m\nin layers.{l} <-> layers.{l} {\n  {name}.weight [n/tp, m] <-> {name}.weight\n}\n"
    )
    halves = {(("tp", t),): {"layers.0.up.weight": np.ones((2, 3), "<f4")} for t in range(2)}
    catalog, _ = put_together(tmp_path, cut, halves, mesh=Mesh({"tp": 2}))
    assert not is_logical(catalog)
