"""What DCP itself loads in silence, or trips over late, is an error here that says what is wrong."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from tests.support.dcp_alone import edit, index, place, sample, save
from ucp.catalog import Catalog
from ucp.container.unpickle import unpickle
from ucp.converter import find_converter
from ucp.converters._dcp.metadata import read_metadata
from ucp.converters.dcp import CONVERTER
from ucp.errors import (
    ConflictError,
    CorruptError,
    FitError,
    NotFoundError,
    UcpError,
    UnsafeError,
    UsageError,
)
from ucp.store import open_store

KEY = "model.a.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(sample(), tmp_path / "ckpt")


def read(folder: Path, **options: object) -> Catalog:
    return CONVERTER.read(open_store(str(folder)), **options)


def refused(folder: Path, kind: type[UcpError], *says: str, **options: object) -> None:
    """`kind` is raised; its message says all of `says` and a remedy comes along."""
    with pytest.raises(kind) as caught:
        read(folder, **options)
    assert type(caught.value) is kind
    assert caught.value.hint
    assert not [text for text in says if text not in caught.value.message], caught.value.message


def test_the_sample_is_sound(folder: Path) -> None:
    catalog = read(folder)
    assert list(catalog.tensors) == ["a.weight", "a.bias"]
    assert catalog.tensors["a.bias"].scalars["step"].value == 3.0
    assert catalog.param_groups[0].options == {"lr": 0.1, "betas": (0.9, 0.99)}


def test_a_save_that_was_cut_short(folder: Path) -> None:
    (folder / ".metadata").unlink()
    assert CONVERTER.detect(open_store(str(folder)))
    refused(folder, NotFoundError, ".metadata")


def test_a_save_without_collectives(folder: Path) -> None:
    (folder / ".metadata").rename(folder / "__0.metadata")
    refused(folder, FitError, "__0.metadata")


def test_a_missing_file(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()
    refused(folder, NotFoundError, "__0_0.distcp")


def test_a_truncated_file(folder: Path) -> None:
    os.truncate(folder / "__0_0.distcp", (folder / "__0_0.distcp").stat().st_size - 1)
    refused(folder, CorruptError, "__0_0.distcp", "ends at byte")


def test_new_files_under_old_metadata(folder: Path, tmp_path: Path) -> None:
    """A job that dies while it saves over an older checkpoint leaves the old metadata in place."""
    other = sample()
    other["model"]["a.weight"] = torch.randn(60, 4)
    newer = save(other, tmp_path / "newer")
    shutil.copy(newer / "__0_0.distcp", folder / "__0_0.distcp")
    refused(folder, CorruptError, "__0_0.distcp")


def _moved(metadata: Metadata) -> None:
    place(metadata, KEY).offset += 64


def _of_another_dtype(metadata: Metadata) -> None:
    metadata.state_dict_metadata[KEY].properties.dtype = torch.float16  # type: ignore[union-attr]


def _of_another_shape(metadata: Metadata) -> None:
    entry = metadata.state_dict_metadata[KEY]
    entry.size = torch.Size([4, 6])  # type: ignore[union-attr]
    entry.chunks[0].sizes = torch.Size([4, 6])  # type: ignore[union-attr]


def _with_a_hole(metadata: Metadata) -> None:
    metadata.state_dict_metadata[KEY].size = torch.Size([7, 4])  # type: ignore[union-attr]


def _reaching_outside(metadata: Metadata) -> None:
    metadata.state_dict_metadata[KEY].size = torch.Size([5, 4])  # type: ignore[union-attr]


def _without_a_place(metadata: Metadata) -> None:
    del metadata.storage_data[index(metadata, KEY)]


def _with_an_unknown_item(metadata: Metadata) -> None:
    metadata.storage_data[MetadataIndex("model.more", (0,))] = place(metadata, KEY)


def _sharing_bytes(metadata: Metadata) -> None:
    metadata.storage_data[index(metadata, "model.a.bias")] = place(metadata, KEY)


def _overlapping(metadata: Metadata) -> None:
    metadata.state_dict_metadata[KEY].chunks.append(  # type: ignore[union-attr]
        ChunkStorageMetadata(torch.Size([3, 0]), torch.Size([3, 4]))
    )
    metadata.storage_data[MetadataIndex(KEY, (3, 0))] = place(metadata, "optim.state.a.weight.exp_avg")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_moved, "__0_0.distcp"),
        (_of_another_dtype, "is float32, .metadata says float16"),
        (_of_another_shape, "has shape [6, 4], .metadata says [4, 6]"),
        (_with_a_hole, KEY),
        (_reaching_outside, KEY),
        (_without_a_place, f"{KEY}: the chunk at [0, 0] lies in no file"),
        (_with_an_unknown_item, "model.more"),
        (_sharing_bytes, "share bytes"),
        (_overlapping, KEY),
    ],
)
def test_metadata_that_does_not_match(folder: Path, change: Callable[[Metadata], None], says: str) -> None:
    refused(edit(folder, change), CorruptError, says)


def test_ranks_that_saved_one_name_in_two_shapes(folder: Path) -> None:
    def change(metadata: Metadata) -> None:
        chunks = metadata.state_dict_metadata[KEY].chunks  # type: ignore[union-attr]
        chunks.append(ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([3, 4])))

    refused(edit(folder, change), ConflictError, KEY, "[6, 4] on one rank and [3, 4] on another")


def test_a_chunk_that_two_ranks_list_is_one(folder: Path) -> None:
    def change(metadata: Metadata) -> None:
        chunks = metadata.state_dict_metadata[KEY].chunks  # type: ignore[union-attr]
        chunks.append(ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([6, 4])))

    catalog = read(edit(folder, change))
    assert len(catalog.cover("a.weight", "value").fragments) == 1


@pytest.mark.parametrize("path", ["../other/__0_0.distcp", "/etc/passwd", "a/../../b", "a\\b", ""])
def test_files_outside_of_the_checkpoint(folder: Path, path: str) -> None:
    def change(metadata: Metadata) -> None:
        place(metadata, KEY).relative_path = path

    refused(edit(folder, change), UnsafeError, KEY)


def test_compressed_items(folder: Path) -> None:
    def change(metadata: Metadata) -> None:
        place(metadata, KEY).transform_descriptors = ["stream.zstd/1"]

    refused(edit(folder, change), FitError, "stream.zstd/1", "__0_0.distcp")


class _Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch attacked",))


def test_metadata_that_runs_code(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(_Attack()))
    refused(folder, UnsafeError, ".metadata", "system")
    assert not Path("attacked").exists()


def test_an_object_that_runs_code(tmp_path: Path) -> None:
    folder = save({**sample(), "evil": _Attack()}, tmp_path / "evil")
    refused(folder, UnsafeError, "__0_0.distcp", "system")
    assert not Path("attacked").exists()


def test_an_unknown_dtype(tmp_path: Path) -> None:
    state = {"model": {"a": torch.zeros(3, dtype=torch.complex128)}}
    refused(save(state, tmp_path / "wide"), FitError, "model.a", "complex128")


def test_a_moment_of_another_shape(tmp_path: Path) -> None:
    state = sample()
    state["optim"]["state"]["a.weight"]["exp_avg"] = torch.zeros(3, 4)
    refused(save(state, tmp_path / "c"), ConflictError, "a.weight has shape [6, 4]", "[3, 4]")


def test_states_of_a_parameter_that_the_model_lacks(tmp_path: Path) -> None:
    state = sample()
    state["optim"]["state"]["gone"] = {"exp_avg": torch.ones(2)}
    folder = save(state, tmp_path / "c")
    refused(folder, FitError, "gone", "exp_avg")
    catalog = read(folder, strict="no")
    assert set(catalog.state["optimizer"]["state"]["gone"]) == {"exp_avg"}
    assert any("gone" in note for note in catalog.notes)


def test_a_parameter_that_lacks_a_state(tmp_path: Path) -> None:
    state = sample()
    del state["optim"]["state"]["a.bias"]["exp_avg_sq"]
    notes = read(save(state, tmp_path / "c")).notes
    assert any("not all parameters have the same optimizer states" in note and "a.bias" in note for note in notes)


def test_parameters_at_different_steps(tmp_path: Path) -> None:
    state = sample()
    state["optim"]["state"]["a.bias"]["step"] = torch.tensor(2.0)
    state["step"] = 4
    catalog = read(save(state, tmp_path / "c"))
    assert catalog.step == 3
    assert any("different optimizer steps: 2 3" in note for note in catalog.notes)
    assert any("the optimizer counted 3 steps, the job 4" in note for note in catalog.notes)


def test_two_optimizers_with_one_parameter(tmp_path: Path) -> None:
    state = sample()
    state["optimizer_1"] = state["optim"]
    refused(save(state, tmp_path / "c"), ConflictError, "optim.state.a.weight", "optimizer_1.state.a.weight")


def test_groups_that_are_none(tmp_path: Path) -> None:
    state = sample()
    state["optim"]["param_groups"] = [{"params": 5}]
    refused(save(state, tmp_path / "c"), CorruptError, "optim.param_groups")


def test_an_optimizer_alone(tmp_path: Path) -> None:
    refused(save({"optim": sample()["optim"]}, tmp_path / "c"), FitError, "an optimizer and no model")


def test_options(folder: Path) -> None:
    refused(folder, FitError, "'nothing.'", model="nothing")
    refused(folder, FitError, "no.such", frozen="no.such")
    refused(folder, UsageError, "tag", tag="x")
    with pytest.raises(UsageError, match="strict is yes or no"):
        read(folder, strict="maybe")


def test_megatron_is_left_to_its_own_family(folder: Path) -> None:
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    assert not CONVERTER.detect(open_store(str(folder)))
    refused(folder, FitError, "Megatron-Core")


def test_folders_of_other_things(tmp_path: Path) -> None:
    assert not CONVERTER.detect(open_store(str(tmp_path)))
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"not": "dcp"}))
    assert not CONVERTER.detect(open_store(str(tmp_path)))
    refused(tmp_path, CorruptError, ".metadata")


def test_a_root_of_steps_is_told_apart(folder: Path) -> None:
    folder.rename(folder.parent / "step-3")
    with pytest.raises(NotFoundError) as caught:
        find_converter(str(folder.parent))
    assert "step-3" in str(caught.value.hint)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_never_a_crash(folder: Path, data: st.DataObject) -> None:
    """Any byte of the metadata or of an item may be wrong: what comes out is a catalog or an error of ours."""
    name = data.draw(st.sampled_from([".metadata", "__0_0.distcp"]))
    good = (folder / name).read_bytes()
    at, length = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(0, 8))
    bad = data.draw(st.binary(max_size=8))
    (folder / name).write_bytes(good[:at] + bad + good[at + length :])
    try:
        catalog = read(folder)
        for tensor in catalog.tensors.values():
            for state in tensor.states:
                catalog.cover(tensor.name, state)
    except UcpError:
        pass
    finally:
        (folder / name).write_bytes(good)


def test_metadata_may_be_as_large_as_its_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds that keep forged pickles small do not hold for the metadata of thousands of ranks."""
    monkeypatch.setattr("ucp.container.unpickle.MOST_OPS", 100)
    monkeypatch.setattr("ucp.container.unpickle.MOST_NODES", 100)
    with pytest.raises(CorruptError, match="too long to be training state"):
        unpickle((folder / ".metadata").read_bytes(), where="metadata")
    assert read_metadata(open_store(str(folder))).tensors.keys() >= {KEY}


def test_paths_that_do_not_spell_their_keys(folder: Path) -> None:
    def swap(metadata: Metadata) -> None:
        paths = metadata.planner_data
        one, other = "optim.state.a.weight.exp_avg", "optim.state.a.weight.exp_avg_sq"
        paths[one], paths[other] = paths[other], paths[one]

    refused(edit(folder, swap), CorruptError, "optim.state.a.weight.exp_avg")


def test_a_file_whose_name_no_file_can_have(folder: Path) -> None:
    def change(metadata: Metadata) -> None:
        place(metadata, KEY).relative_path = "\0zeros"

    refused(edit(folder, change), UnsafeError, KEY)
