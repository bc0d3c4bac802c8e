"""Jobs in every layout of torch, saved in one and loaded in another: bit for bit, and training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ucp
from tests.support.gloo import spawn
from tests.train.walk import ranks
from tests.train.walk.net import Net

TWO = ("ddp", "fsdp1 full", "fsdp1 full flat", "pp")
MORE = (
    "fsdp1 no",
    "fsdp1 no flat",
    "fsdp1 grad",
    "fsdp1 full bf16",
    "plain compiled",
    "plain recomputed",
    "fsdp2",
    "tp",
)
FOUR = ("fsdp1 hybrid", "fsdp1 hybrid flat", "fsdp2 hybrid", "tp fsdp", "pp fsdp", "pp interleaved")


def ring(layouts: tuple[str, ...], *steps: int) -> list[tuple[str, str]]:
    """Ways from each layout to the ones some steps further."""
    return [(one, layouts[(i + step) % len(layouts)]) for i, one in enumerate(layouts) for step in steps]


def check(found: list[dict[str, tuple[list[str], float]]], *, tolerance: float = 1e-5) -> None:
    for one in found:
        assert {way: names for way, (names, _) in one.items() if names} == {}
        # Layouts that compute in bfloat16 go on in bfloat16.
        assert {way: gap for way, (_, gap) in one.items() if gap > tolerance and "bf16" not in way} == {}
        assert {way: gap for way, (_, gap) in one.items() if gap > 0.1} == {}


WORK = (
    ("matrix", "matrix", (ring(TWO, 0, 1, 2, 3), "adamw", {})),
    ("tied", "matrix", (ring(TWO[:3], 1), "sgd", {"tied": True, "frozen": True})),
    ("adafactor", "matrix", ([TWO[1:3], TWO[2:0:-1], ("ddp", "plain")], "adafactor", {})),
    ("gathered", "gathered", ("fsdp1 grad",)),
    ("refused", "refused", ()),
    ("apps", "apps", ([("ddp", "fsdp2"), ("fsdp2", "fsdp1 full flat"), ("fsdp1 full flat", "ddp")],)),
    ("statistics", "statistics", ()),
    ("stages", "stages", ()),
    ("moe", "moe", ([("dtensor", "declared"), ("declared", "whole"), ("whole", "dtensor"), ("named", "named")],)),
    ("misdeclared", "misdeclared", ()),
)
"""What the same two ranks do, one after the other: starting them takes longer."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("walk")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each of two ranks found, by the names in `WORK`."""
    return spawn(ranks.several, 2, str(folder), WORK, timeout=300)


def test_what_one_layout_saves_another_loads(found: list[dict[str, Any]], folder: Path) -> None:
    check([one["matrix"] for one in found])
    for layout in TWO:
        with ucp.open(str(folder / "matrix" / layout)) as ckpt:
            assert sorted(ckpt.names) == sorted(Net().state_dict())


def test_tied_and_frozen_parameters(found: list[dict[str, Any]], folder: Path) -> None:
    check([one["tied"] for one in found])
    for layout in TWO[:3]:
        with ucp.open(str(folder / "tied" / layout)) as ckpt:
            assert ckpt.ties == {"head.weight": "embed.weight"}
            assert [name for name in ckpt.names if ckpt[name].kind == "frozen"] == ["positions.weight"]
            assert list(ckpt["positions.weight"]) == ["value"]


def test_adafactor_keeps_what_fits_each_layout(found: list[dict[str, Any]]) -> None:
    """It factors the matrices that it sees, and FSDP1 shows it flat ones: it goes on in another way, too."""
    check([one["adafactor"] for one in found], tolerance=0.1)


def test_what_a_forward_pass_gathered_is_thrown_away(found: list[dict[str, Any]]) -> None:
    for wrong, wanted, loss in (one["gathered"] for one in found):
        assert (wrong, loss) == ([], wanted)


def test_fsdp1_that_cannot_be_taken_is_refused(found: list[dict[str, Any]]) -> None:
    for turned, gathered, *inside, part in (one["refused"] for one in found):
        assert turned.startswith("FitError: 0.weight: FSDP1 flattened a parameter with strides [1, 5]")
        assert gathered.startswith("UsageError")
        assert "summon_full_params" in gathered
        assert [said.partition(" (")[0] for said in inside] == [
            "UsageError: weight: FSDP1 flattened it",
            "UsageError: _flat_param: FSDP1 flattened it",
        ]
        assert "bias (in one flat parameter with weight, whose step is 2.0 in the source, not 1.0)" in part


def test_state_dicts_of_torch(found: list[dict[str, Any]]) -> None:
    """Nested and flattened ones, of one layout loaded into another, and into the optimizer itself."""
    for one in found:
        for wrong, rates, epoch in one["apps"].values():
            assert (wrong, rates, epoch) == ([], [0.01, 0.01], 7)


def test_statistics_of_batches_in_a_state_dict_may_differ(found: list[dict[str, Any]]) -> None:
    assert [one["statistics"] for one in found] == [[1.0] * 3] * 2


def test_a_pipeline_is_strict_with_all_its_stages(found: list[dict[str, Any]]) -> None:
    first, second = (one["stages"] for one in found)
    assert (first["pp"], second["pp"], first["pp interleaved"]) == (14, 14, 14)
    assert first["names"]
    for told in (first, second):
        assert "unexpected: layers.3.up.weight" in told["unexpected"]
        assert "layers.1" not in told["unexpected"]
        assert told["map"] == 1
        assert told["schedulers"] == [1, 1]
        assert "map: last (no such name in the target)" in told["no such name"]
        assert "ranks 0 and 1 hold different values" in told["own names"]
        assert "nn.ModuleDict" in told["own names"]
    assert "missing: extra.weight" in second["missing"]
    assert "missing: extra.weight" in first["missing"]


def test_experts(found: list[dict[str, Any]]) -> None:
    for one in found:
        told = dict(one["moe"])
        refusal = told.pop("declared undeclared")
        assert refusal.startswith("ConflictError: moe.stacked.")
        assert "layout={glob of names: (DeviceMesh, [Shard(0)])}" in refusal
        assert (len(told), [way for way, wrong in told.items() if wrong]) == (4, [])


def test_layouts_that_fit_nothing_are_refused(found: list[dict[str, Any]]) -> None:
    for twice, partial, dims in (one["misdeclared"] for one in found):
        assert twice.startswith("UsageError: layout['w']: ('S(0)', 'S(1)') on a mesh of 1 axes")
        assert partial.startswith("UsageError: layout['w']")
        assert dims.startswith("UsageError: w: has 2 dims, and its layout cuts dim 2")


@pytest.mark.slow
def test_what_one_layout_of_many_saves_another_loads(tmp_path: Path) -> None:
    check(spawn(ranks.matrix, 2, str(tmp_path), ring((*MORE, *TWO), 1, 4), "adamw", {}))


@pytest.mark.slow
def test_layouts_of_two_axes(tmp_path: Path) -> None:
    check(spawn(ranks.matrix, 4, str(tmp_path), ring(FOUR, 0, 1, 2, 3), "sgd", {}))


@pytest.mark.slow
def test_experts_that_are_cut_again(tmp_path: Path) -> None:
    ways = [("declared fsdp", "declared"), ("declared", "declared fsdp"), ("declared fsdp", "whole")]
    for found in spawn(ranks.moe, 4, str(tmp_path), ways):
        assert {way: wrong for way, wrong in found.items() if "undeclared" not in way and wrong} == {}


def test_how_tensors_lie_on_meshes_is_recorded(tmp_path: Path) -> None:
    found: dict[str, Any] = spawn(ranks.record, 4, str(tmp_path))[0]
    assert found["ddp"]["source"]["mesh"] == [["rank", 4]]
    assert laid(found["ddp"], "norm.weight") == [[("rank4", (0, 1, 2, 3), ["R"])]]
    assert found["tp fsdp"]["source"]["mesh"] == [["dp", 2], ["tp", 2]]
    assert laid(found["tp fsdp"], "layers.0.up.weight") == [[("dp2 tp2", (0, 1, 2, 3), ["_S(0, 2)", "S(0)"])]]
    assert laid(found["fsdp1 hybrid"], "norm.weight") == [
        [("replicate2 shard2", (0, 1, 2, 3), ["R", "flat"])],
    ]
    assert found["pp fsdp"]["source"]["mesh"] == [["pp", 2], ["dp", 2]]
    assert laid(found["pp fsdp"], "embed.weight") == [[("dp2", (0, 1), ["S(0)"])]]
    assert laid(found["pp fsdp"], "head.weight") == [[("dp2", (2, 3), ["S(0)"])]]


def laid(manifest: dict[str, Any], name: str) -> list[list[tuple[str, tuple[int, ...], list[str]]]]:
    """How a manifest says that a tensor lay: axes, ranks and placements of each link of each chain."""
    number = next(tensor["layout"] for tensor in manifest["tensors"] if tensor["name"] == name)
    chains = []
    for chain in manifest["layouts"][number]:
        meshes = [(manifest["meshes"][mesh], placements) for mesh, placements in chain]
        chains.append([(axes(mesh), tuple(mesh["ranks"]), placements) for mesh, placements in meshes])
    return chains


def axes(mesh: dict[str, Any]) -> str:
    return " ".join(f"{name}{size}" for name, size in mesh["axes"])
