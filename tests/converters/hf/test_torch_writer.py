"""What torch.distributed.checkpoint.HuggingFaceStorageWriter writes on real ranks is read bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.converters.hf import made, writers
from ucp.checkpoint import Checkpoint
from ucp.converters._hf.read import Options
from ucp.converters._hf.read import read_catalog as read_hf
from ucp.errors import ConflictError, FitError, NotFoundError, UsageError

WHOLE = {**writers.truth(), "count": torch.tensor([7, 8])}


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_shards_of_ranks_are_put_together(world: int, several: bool, tmp_path: Path) -> None:
    writers.folder_of(tmp_path, world, save_distributed=True, fqn_to_index_mapping=several or None)
    catalog, found = made.read(tmp_path, ranks=world)
    assert catalog.source.detail["weights"] == "distributed"
    assert made.same(found, WHOLE)
    assert catalog.tensors["count"].kind == "buffer"
    for told in (world - 1, world + 1):
        with pytest.raises((NotFoundError, UsageError)):
            made.read(tmp_path, ranks=told)
    if world > 1:
        assert made.same(made.read(tmp_path)[1], WHOLE), "rows that do not come out even tell"
        return
    with pytest.raises(UsageError, match="do not tell") as failed:
        made.read(tmp_path)
    assert "ranks=1" in (failed.value.hint or "")


@pytest.mark.parametrize("world", [2, 3])
def test_without_the_last_rank_nothing_tells_that_these_are_all(world: int, tmp_path: Path) -> None:
    writers.folder_of(tmp_path, world, save_distributed=True)
    next(tmp_path.glob(f"shard-{world:05d}-*")).unlink()
    with pytest.raises(UsageError, match="do not tell") as failed:
        made.read(tmp_path)
    assert f"ranks={world - 1}" in (failed.value.hint or "")


def test_a_file_of_the_last_rank_is_missing_where_rows_tell_the_ranks(tmp_path: Path) -> None:
    writers.folder_of(tmp_path, 2, save_distributed=True, fqn_to_index_mapping=True)
    (tmp_path / "shard-00002-model-00002-of-00002.safetensors").unlink()
    with pytest.raises((NotFoundError, UsageError)):
        made.read(tmp_path)


def test_one_of_several_files_of_a_rank_is_missing(tmp_path: Path) -> None:
    """Of the last rank, so that no hole shows it."""
    writers.folder_of(tmp_path, 2, save_distributed=True, fqn_to_index_mapping=True)
    (tmp_path / "shard-00002-model-00002-of-00002.safetensors").unlink()
    with pytest.raises(NotFoundError, match="rank 2, file 2"):
        made.read(tmp_path, ranks=2)


def test_one_rank_writes_an_index(tmp_path: Path) -> None:
    writers.folder_of(tmp_path, 1, fqn_to_index_mapping=True)
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert made.same(made.read(tmp_path)[1], WHOLE)


def test_consolidated_files_are_compared_with_the_shards_they_were_made_of(tmp_path: Path) -> None:
    source = writers.folder_of(tmp_path / "source", 2, save_distributed=True, enable_consolidation=True)
    catalog, found = made.read(source)
    assert made.same(found, writers.truth())
    assert all(len(catalog.cover(name, "value").replicas) for name in found)
    (source / "config.json").write_text("{}")
    assert made.same(made.on_disk(made.to_hf(source, tmp_path / "written")), writers.truth())
    # A consolidation that was cut short leaves files of the right size, with zeros where the rest should be.
    (whole,) = source.glob("model-*.safetensors")
    tensors = load_file(whole)
    tensors["blocks.0.w"][5:] = 0
    save_file(tensors, whole)
    with pytest.raises(ConflictError, match=r"blocks\.0\.w"):
        made.to_hf(source, tmp_path / "other")


def test_consolidated_files_of_another_save(tmp_path: Path) -> None:
    writers.folder_of(tmp_path, 2, save_distributed=True, enable_consolidation=True)
    shutil.rmtree(tmp_path / "sharded")
    (tmp_path / "sharded").mkdir()
    save_file({"scale": torch.ones(1)}, tmp_path / "sharded" / "shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(ConflictError, match=r"missing"):
        made.read(tmp_path)


def test_a_rank_that_is_missing_leaves_a_hole(tmp_path: Path) -> None:
    writers.folder_of(tmp_path, 3, save_distributed=True)
    next(tmp_path.glob("shard-00002-*")).unlink()
    with pytest.raises(FitError):
        made.read(tmp_path, ranks=3)


def test_the_configuration_tells_whether_a_rank_is_missing(tmp_path: Path) -> None:
    model = made.model("llama")
    tensors = dict(model.state_dict())
    model.config.save_pretrained(tmp_path)
    for rank in range(2):
        shards = {name: tensor.chunk(2)[rank].contiguous() for name, tensor in tensors.items()}
        starts = {name: {"saved_offsets": [rank * len(t), *[0] * (t.dim() - 1)]} for name, t in shards.items()}
        path = tmp_path / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
        save_file(shards, path, {"DCP_SHARDING_INFO": json.dumps(starts), "DCP_VERSION": "1.0", "format": "pt"})
    catalog, found = made.read(tmp_path)
    assert made.same(found, tensors)
    assert catalog.options == {}
    path.unlink()
    with pytest.raises(FitError, match="config"):
        made.read(tmp_path)
    assert made.read(tmp_path, ranks=1)[1].keys() == tensors.keys()
    whole = {"other.weight": torch.ones(2)}
    save_file(whole, tmp_path / "shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(FitError, match=r"not all tensors of the model") as failed:
        made.read(tmp_path)
    assert "ranks=N" in (failed.value.hint or "")


def test_the_number_of_ranks_is_a_number(tmp_path: Path) -> None:
    for ranks in ("many", 0, -1, "1.5"):
        with pytest.raises(UsageError, match="how many ranks"):
            made.read(tmp_path, ranks=ranks, family="hf")


def test_a_slice_reads_its_bytes(tmp_path: Path) -> None:
    writers.folder_of(tmp_path, 2, save_distributed=True)
    store = made.Counting(str(tmp_path))
    ckpt = Checkpoint(read_hf(store, Options(ranks=2)), store)
    store.count.clear()
    assert torch.equal(ckpt["embed.weight"]["value"][4:7], WHOLE["embed.weight"][4:7])
    assert sum(store.count.values()) == 3 * 6 * 4
