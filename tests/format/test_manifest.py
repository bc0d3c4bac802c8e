from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.format.build import source, universal, write
from tests.format.schemas import MANIFEST, STATE, problems
from tests.format.test_damage import signed, tensors
from ucp.catalog import Catalog, ParamGroup, ProgramRecord, Scalar, Source
from ucp.errors import FitError, UsageError
from ucp.format.records import ROOT
from ucp.format.universal import CONVERTER
from ucp.lang import from_json, parse, to_json
from ucp.lang.bind import bind
from ucp.lang.held import Held
from ucp.layout import FlatRange, Mesh
from ucp.plan import TensorSpec
from ucp.run.gather import read_region
from ucp.store import LocalStore

ORIGIN = Source("deepspeed", "0.19.8", Mesh({"pp": 2, "dp": 3}), {"zero_stage": 3, "loss_scale": 0.5, "note": None})
GROUPS = (ParamGroup(("a/weight",), {"lr": 0.1, "betas": (0.9, 0.999), "foreach": None}), ParamGroup((), {}))
PROGRAM = ProgramRecord(to_json(parse("format 1\nsize a\nw [a] <-> w [a]")), Mesh({"tp": 2}), {"a": 3}, {"tied": True})
CHANGES: dict[str, Any] = {
    "source": ORIGIN,
    "step": 41,
    "param_groups": GROUPS,
    "ties": {"head": "a/weight"},
    "state": {"lr_scheduler": {"last": 3, "lr": (0.1,)}},
    "notes": ("inferred the step",),
    "program": PROGRAM,
}


def manifest(store: LocalStore) -> dict[str, Any]:
    return json.loads(Path(store.root, ROOT).read_bytes())["attributes"]["ucp"]


def contents(store: LocalStore) -> dict[str, bytes]:
    return {entry.path: Path(store.root, entry.path).read_bytes() for entry in store.entries()}


def rewritten(store: LocalStore, destination: Path, **options: Any) -> LocalStore:
    again = LocalStore(store.root)
    return write(CONVERTER.read(again), again, destination, **options)


def test_a_catalog_comes_back(tmp_path: Path) -> None:
    store = universal(tmp_path, tensors(), shard_bytes=30_000, **CHANGES)
    found = CONVERTER.read(store)
    assert {name: dict(tensor.states) for name, tensor in found.tensors.items()} == {
        name: {state: TensorSpec(array.shape, array.dtype.name) for state, array in states.items()}
        for name, states in tensors().items()
    }
    assert found.tensors["scale"].scalars == {"step": Scalar(7, "int")}
    assert (found.step, found.param_groups, found.ties) == (41, GROUPS, CHANGES["ties"])
    assert found.program == PROGRAM
    assert (found.state, found.notes) == (CHANGES["state"], CHANGES["notes"])
    assert (found.source.family, found.source.version, found.source.mesh) == ("universal", "1.0", ORIGIN.mesh)
    assert found.source.detail["origin"] == "deepspeed"
    assert found.source.detail["loss_scale"] == 0.5
    assert set(found.objects) == {entry.path for entry in store.entries()}


def test_every_checkpoint_keeps_a_program(tmp_path: Path) -> None:
    """Where none was needed, one that says that every tensor is itself; older manifests have none."""
    plain = universal(tmp_path / "without", tensors())
    found = CONVERTER.read(plain)
    assert found.program is not None
    held = [
        Held(name, spec.shape, spec.dtype, {}, state)
        for name, tensor in found.tensors.items()
        for state, spec in tensor.states.items()
    ]
    bound = bind(from_json(dict(found.program.ast)), held, mesh=Mesh({}))
    assert {name for name, _ in bound.tensors} == found.tensors.keys()
    raw = manifest(universal(tmp_path / "with", tensors(), **CHANGES))
    assert raw["program"] == {"ast": PROGRAM.ast, "mesh": [["tp", 2]], "sizes": {"a": 3}, "flags": {"tied": True}}
    assert not problems(MANIFEST, raw)


def test_fragments_give_the_data(tmp_path: Path) -> None:
    store = universal(tmp_path, tensors(), shard_bytes=30_000)
    check_data(store)
    assert len(CONVERTER.read(store).cover("cut", "exp_avg").fragments) > 2


def check_data(store: LocalStore) -> Catalog:
    catalog = CONVERTER.read(store)
    for name, states in tensors().items():
        for state, array in states.items():
            cover = catalog.cover(name, state)
            assert read_region(store, cover, FlatRange(0, array.size)).tobytes() == array.tobytes()
    return catalog


def test_documents_follow_their_schemas(tmp_path: Path) -> None:
    store = universal(tmp_path, tensors(), shard_bytes=30_000, **CHANGES)
    assert problems(MANIFEST, manifest(store)) == []
    assert problems(STATE, json.loads(store.read("state.json"))) == []


def test_the_schema_finds_mistakes(tmp_path: Path) -> None:
    found = manifest(universal(tmp_path, tensors()))
    assert problems(MANIFEST, {**found, "version": "2.0"})
    assert problems(MANIFEST, {**found, "step": 1.5})
    assert problems(MANIFEST, {**found, "param_groups": [{"params": [], "options": {"lr": 0.1}}]})
    assert problems(MANIFEST, {key: value for key, value in found.items() if key != "files"})


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    one = universal(tmp_path / "one", tensors(), **CHANGES)
    other = universal(tmp_path / "other", tensors(), **CHANGES)
    assert contents(one) == contents(other)


def test_other_content_gives_another_id(tmp_path: Path) -> None:
    changed = tensors()
    changed["cut"]["value"][-1, -1] += 1
    stores = [
        universal(tmp_path / "0", tensors(), **CHANGES),
        universal(tmp_path / "1", changed, **CHANGES),
        universal(tmp_path / "2", tensors(), **CHANGES | {"step": 42}),
        universal(tmp_path / "3", tensors(), **CHANGES | {"state": {}}),
    ]
    assert len({manifest(store)["id"] for store in stores}) == 4


def test_rewriting_changes_nothing(tmp_path: Path) -> None:
    store = universal(tmp_path, tensors(), **CHANGES)
    assert contents(rewritten(store, tmp_path / "again")) == contents(store)


def test_rewriting_into_other_objects_keeps_the_data(tmp_path: Path) -> None:
    store = universal(tmp_path, tensors(), **CHANGES)
    found = check_data(rewritten(store, tmp_path / "again", shard_bytes=30_000))
    assert len(found.cover("cut", "value").fragments) > 2
    assert found.source.detail["origin"] == "deepspeed"


def test_what_we_do_not_know_survives_a_rewrite(tmp_path: Path) -> None:
    store = universal(tmp_path, tensors(), **CHANGES)
    root = json.loads(store.read(ROOT))
    found = root["attributes"]["ucp"]
    found["version"] = "1.7"
    found["later"] = {"a": [1, "b"]}
    found["source"]["commit"] = "abc"
    found["tensors"][0]["precision"] = "int4"
    root["attributes"]["title"] = "mine"
    signed(store, root)
    again = rewritten(store, tmp_path / "again")
    attributes = json.loads(again.read(ROOT))["attributes"]
    assert attributes["title"] == "mine"
    assert attributes["ucp"]["later"] == {"a": [1, "b"]}
    assert attributes["ucp"]["source"]["commit"] == "abc"
    assert attributes["ucp"]["tensors"][0]["precision"] == "int4"
    assert attributes["ucp"]["version"] == "1.0", "what we write is what we know"


def test_a_newer_minor_version_is_read(tmp_path: Path) -> None:
    store = universal(tmp_path, tensors())
    root = json.loads(store.read(ROOT))
    root["attributes"]["ucp"]["version"] = "1.99"
    signed(store, root)
    assert CONVERTER.read(LocalStore(store.root)).source.version == "1.99"


@pytest.mark.parametrize("version", ["2.0", "10.3"])
def test_a_newer_major_version_is_refused_with_the_remedy(tmp_path: Path, version: str) -> None:
    store = LocalStore(str(tmp_path))
    store.put(ROOT, json.dumps({"attributes": {"ucp": {"format": "universal", "version": version}}}).encode())
    assert CONVERTER.detect(store)
    with pytest.raises(FitError, match=f"format version {version}; this ucp reads up to 1.1") as caught:
        CONVERTER.read(store)
    assert "pip install -U" in str(caught.value.hint)


@pytest.mark.parametrize("state", ["", "__ucp_index__", "__metadata__"])
def test_states_that_have_no_place_are_refused(tmp_path: Path, state: str) -> None:
    catalog, store = source(tmp_path, {"a": {"value": np.zeros(3, "f4"), state: np.zeros(3, "f4")}})
    with pytest.raises(FitError, match="cannot be named"):
        CONVERTER.target(catalog, store)


def test_unknown_options_are_refused(tmp_path: Path) -> None:
    catalog, store = source(tmp_path, tensors())
    with pytest.raises(UsageError, match="colour"):
        CONVERTER.target(catalog, store, colour="red")
    with pytest.raises(UsageError, match="colour"):
        CONVERTER.read(store, colour="red")


def test_states_of_other_shapes_lie_beside(tmp_path: Path) -> None:
    states = {
        "exp_avg_sq_row": np.ones(4, "f4"),
        "exp_avg_sq_col": np.ones(6, "f4"),
        "value": np.ones((4, 6), "f4"),
        "low": np.ones((4, 6), "f2"),
    }
    store = universal(tmp_path, {"A/b": states})
    (tensor,) = manifest(store)["tensors"]
    assert [(array["path"], array["states"]) for array in tensor["arrays"]] == [
        ("tensors/A=2fb=u1", ["value"]),
        ("tensors/A=2fb=u1@exp_avg_sq_row", ["exp_avg_sq_row"]),
        ("tensors/A=2fb=u1@exp_avg_sq_col", ["exp_avg_sq_col"]),
        ("tensors/A=2fb=u1@low", ["low"]),
    ]


TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    names=st.lists(TEXT, min_size=1, max_size=4, unique=True),
    state=TEXT,
    dims=st.lists(TEXT, min_size=2, max_size=2),
    detail=st.dictionaries(TEXT, st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT),
)
def test_any_names_come_back(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], state: str, dims: list[str], detail: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("names")
    held = {name: {"value": np.ones((2, 3), "f4"), state: np.zeros((2, 3), "f4")} for name in names}
    catalog, store = source(folder / "source", held, state={name: name for name in names})
    named = {name: replace(tensor, dims=tuple(dims)) for name, tensor in catalog.tensors.items()}
    written = write(replace(catalog, tensors=named, source=replace(ORIGIN, detail=detail)), store, folder / "out")
    found = CONVERTER.read(written)
    assert {name: (list(tensor.states), tensor.dims) for name, tensor in found.tensors.items()} == {
        name: (list(held[name]), tuple(dims)) for name in names
    }
    assert found.state == {name: name for name in names}
    assert detail.items() <= found.source.detail.items() or {"origin", "origin_version", "id", "created_by"} & set(
        detail
    )
    assert problems(MANIFEST, manifest(written)) == []
