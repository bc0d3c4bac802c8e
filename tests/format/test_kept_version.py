"""Format 1.0 stays readable for ever: a checkpoint made when it was fixed is checked in."""

from __future__ import annotations

import json

import numpy as np
from crc32c import crc32c

from tests.data.make_universal_1_0 import CHANGES, FOLDER, ramp, state, tensors
from tests.format.schemas import MANIFEST, STATE, problems
from tests.format.test_state import same
from ucp.catalog import Scalar
from ucp.format.leaves import LeafReader
from ucp.format.universal import CONVERTER
from ucp.layout import FlatRange
from ucp.run.gather import read_region
from ucp.store import LocalStore

STORE = LocalStore(str(FOLDER))


def test_it_is_detected() -> None:
    assert CONVERTER.detect(STORE)


def test_all_tensors_hold_what_was_written() -> None:
    catalog = CONVERTER.read(STORE)
    assert list(catalog.tensors) == list(tensors())
    for name, states in tensors().items():
        assert list(catalog.tensors[name].states) == list(states)
        for key, array in states.items():
            cover = catalog.cover(name, key)
            assert (cover.spec.shape, cover.spec.dtype) == (array.shape, array.dtype.name)
            assert read_region(STORE, cover, FlatRange(0, array.size)).tobytes() == array.tobytes()
    assert len(catalog.cover("embed.weight", "value").fragments) > 1


def test_all_metadata_is_there() -> None:
    catalog = CONVERTER.read(STORE)
    for key in ("step", "ties", "param_groups", "notes"):
        assert getattr(catalog, key) == CHANGES[key]
    assert catalog.source.mesh == CHANGES["source"].mesh
    assert CHANGES["source"].detail.items() <= catalog.source.detail.items()
    assert catalog.tensors["embed.weight"].dims == ("vocabulary", "hidden")
    assert catalog.tensors["experts"].scalars == {"step": Scalar(7, "int")}
    assert (catalog.tensors["bias"].kind, catalog.tensors["experts"].kind) == ("frozen", "parameter")


def test_the_training_state_is_there() -> None:
    found, expected = dict(CONVERTER.read(STORE).state), state()
    rng, expected_rng = found.pop("rng"), expected.pop("rng")
    assert same(found, expected)
    assert rng["numpy"].numpy
    assert rng["numpy"].inline == expected_rng["numpy"].inline
    assert LeafReader(STORE, CONVERTER.read(STORE).checksums)(rng["cpu"]) == ramp((600,), "u1", 4).tobytes()


def test_all_digests_hold() -> None:
    checksums = CONVERTER.read(STORE).checksums
    assert {checksum.object for checksum in checksums} == {entry.path for entry in STORE.entries()} - {"zarr.json"}
    for checksum in checksums:
        assert crc32c(STORE.read(checksum.object, checksum.offset, checksum.length)) == checksum.value


def test_it_follows_the_schemas() -> None:
    root = json.loads(STORE.read("zarr.json"))
    assert root["attributes"]["ucp"]["version"] == "1.0"
    assert problems(MANIFEST, root["attributes"]["ucp"]) == []
    assert problems(STATE, json.loads(STORE.read("state.json"))) == []


def test_names_are_where_the_specification_says() -> None:
    folders = {entry.path.split("/")[1] for entry in STORE.entries("tensors/")}
    assert {
        "Layers.0=2fattn.weight=u1",
        "layers.0=2fattn.weight",
        "na=c3=afve",
        "scale@step",
        "factored@row",
    } <= folders
    assert np.frombuffer(STORE.read("tensors/bias/c/0/0")[-4:], "<u4").size == 1
