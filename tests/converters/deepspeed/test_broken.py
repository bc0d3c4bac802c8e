"""What is missing, mixed or damaged is an error that names the file and what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.converters.deepspeed.fake import Fake, write
from ucp.converters.deepspeed import CONVERTER
from ucp.errors import ConflictError, CorruptError, FitError, NotFoundError, UcpError
from ucp.store import open_store

FAKE = Fake([{"w": (30, 4), "v": (5,)}, {"b": (3,)}], dp=3)


def read(root: Path) -> object:
    return CONVERTER.read(open_store(str(root)))


def refused(root: Path, kind: type[UcpError], match: str) -> UcpError:
    with pytest.raises(kind, match=match) as error:
        read(root)
    assert error.type is kind
    assert error.value.hint, "an error says what to do"
    return error.value


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_missing_rank(tmp_path: Path, stage: int, rank: int) -> None:
    write(FAKE.with_(stage=stage), tmp_path)
    path = tmp_path / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    path.unlink()
    refused(tmp_path, NotFoundError, path.name)


def test_all_optimizer_files_missing(tmp_path: Path) -> None:
    for stage in (1, 3):
        write(FAKE.with_(stage=stage), tmp_path / str(stage))
        for path in (tmp_path / str(stage)).glob("*optim_states.pt"):
            path.unlink()
        refused(tmp_path / str(stage), NotFoundError, "optim_states.pt")


@pytest.mark.parametrize(("stage", "rank"), [(1, 0), (3, 0), (3, 2)])
def test_a_missing_model_file(tmp_path: Path, stage: int, rank: int) -> None:
    write(FAKE.with_(stage=stage), tmp_path)
    name = "mp_rank_00" if stage == 1 else f"zero_pp_rank_{rank}_mp_rank_00"
    (tmp_path / f"{name}_model_states.pt").unlink()
    refused(tmp_path, NotFoundError, f"{name}_model_states.pt")


def swap(root: Path, other: Path, pattern: str) -> None:
    """Replace the files of `root` that match by those of `other`."""
    paths = list(other.glob(pattern))
    assert paths
    for path in paths:
        shutil.copy(path, root / path.name)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_rank_of_another_step(tmp_path: Path, stage: int) -> None:
    write(FAKE.with_(stage=stage), tmp_path / "a")
    write(FAKE.with_(stage=stage, step=6.0), tmp_path / "b")
    swap(tmp_path / "a", tmp_path / "b", "*_rank_1_*optim*")
    refused(tmp_path / "a", ConflictError, "different steps")


def test_a_model_file_of_another_step_under_zero_3(tmp_path: Path) -> None:
    write(FAKE.with_(stage=3), tmp_path / "a")
    write(FAKE.with_(stage=3, step=6.0), tmp_path / "b")
    swap(tmp_path / "a", tmp_path / "b", "*_rank_1_*model*")
    refused(tmp_path / "a", ConflictError, "global_steps")


def test_a_model_file_of_another_step_and_schedule(tmp_path: Path) -> None:
    write(FAKE.with_(model={"lr_scheduler": {"_last_lr": [0.2, 0.05]}, "global_steps": 9}), tmp_path)
    refused(tmp_path, ConflictError, "different steps")


def test_another_step_alone_is_remarked(tmp_path: Path) -> None:
    write(FAKE.with_(model={"lr_scheduler": {"_last_lr": [0.1, 0.05]}, "global_steps": 9}), tmp_path)
    catalog = CONVERTER.read(open_store(str(tmp_path)))
    assert [note for note in catalog.notes if "counted 5 steps, the engine 9" in note]


def test_other_learning_rates_alone_are_remarked(tmp_path: Path) -> None:
    write(FAKE.with_(model={"lr_scheduler": {"_last_lr": [0.2, 0.05]}}), tmp_path)
    catalog = CONVERTER.read(open_store(str(tmp_path)))
    assert [note for note in catalog.notes if "learning rates" in note]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"optim": {"partition_count": [4, 4]}}, "4 ranks"),
        ({"optim": {"zero_stage": 2}}, "ZeRO stage"),
        ({"dtype": torch.float32}, "same rank"),
    ],
    ids=["partition count", "stage", "dtype"],
)
def test_ranks_of_another_kind_of_save(tmp_path: Path, changes: dict, match: str) -> None:
    write(FAKE, tmp_path / "a")
    write(FAKE.with_(**changes), tmp_path / "b")
    swap(tmp_path / "a", tmp_path / "b", "*_rank_1_*optim*")
    refused(tmp_path / "a", CorruptError if match == "same rank" else ConflictError, match)


def test_other_hyper_parameters_on_a_rank(tmp_path: Path) -> None:
    write(FAKE, tmp_path / "a")
    write(FAKE, tmp_path / "b")
    path = next((tmp_path / "b").glob("*_rank_2_*optim*"))
    groups = [{"lr": 0.7, "params": [0]}, {"lr": 0.05, "params": [1]}]
    write(FAKE.with_(optim={"base_optimizer_state": {"state": {}, "param_groups": groups}}), tmp_path / "b")
    swap(tmp_path / "a", tmp_path / "b", path.name)
    refused(tmp_path / "a", ConflictError, "hyper-parameters")


def test_a_narrower_world(tmp_path: Path) -> None:
    write(FAKE.with_(model={"dp_world_size": 2}), tmp_path)
    refused(tmp_path, ConflictError, "no such rank")


def test_a_wider_world(tmp_path: Path) -> None:
    write(FAKE.with_(model={"dp_world_size": 4}), tmp_path)
    refused(tmp_path, NotFoundError, "zero_pp_rank_3_mp_rank_00_optim_states.pt")


def test_another_version_of_deepspeed(tmp_path: Path) -> None:
    write(FAKE.with_(model={"ds_version": "0.10.0"}), tmp_path)
    refused(tmp_path, ConflictError, "DeepSpeed version")


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.9, -1])
def test_a_truncated_file(tmp_path: Path, keep: float) -> None:
    write(FAKE, tmp_path)
    path = next(tmp_path.glob("*_rank_1_*optim*"))
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else int(keep)])
    refused(tmp_path, CorruptError, path.name)


def test_a_foreign_file(tmp_path: Path) -> None:
    write(FAKE, tmp_path)
    path = next(tmp_path.glob("*_rank_1_*optim*"))
    torch.save([1, 2, 3], path)
    with pytest.raises(CorruptError, match="dict is expected"):
        read(tmp_path)


def test_tensor_parallelism_without_metadata_is_refused(tmp_path: Path) -> None:
    for degrees in ({"pp_degree": 1, "tp_degree": 2}, None):
        root = tmp_path / str(degrees)
        write(FAKE.with_(model={"checkpoint_parallel_dimensions": degrees, "mp_world_size": 2}), root)
        for path in list(root.iterdir()):
            shutil.copy(path, root / path.name.replace("mp_rank_00", "mp_rank_01"))
        refused(root, FitError, "2 tensor-parallel ranks, and no universal_checkpoint_info")


def test_experts_named_in_the_model_file_have_files(tmp_path: Path) -> None:
    write(FAKE.with_(model={"num_experts": [0, 4]}), tmp_path)
    refused(tmp_path, NotFoundError, "layer_1_expert_0_mp_rank_00_model_states.pt: missing")


def test_experts_whose_names_do_not_tell_their_numbers_are_refused(tmp_path: Path) -> None:
    groups = [{"lr": 0.1, "params": [0]}, {"lr": 0.1, "params": [1], "moe": True, "name": "ep_size_3"}]
    base = {"base_optimizer_state": {"state": {}, "param_groups": groups}, "partition_count": [3, 1]}
    write(FAKE.with_(optim=base), tmp_path)
    refused(tmp_path, FitError, "experts spread over 3 ranks")


def test_an_unknown_optimizer(tmp_path: Path) -> None:
    write(FAKE, tmp_path)
    for path in tmp_path.glob("*optim*"):
        torch.save({"optimizer_state_dict": {"partition_count": [3], "blocks": []}, "ds_version": "0.19.8"}, path)
    refused(tmp_path, FitError, "not one of DeepSpeed's")


def test_offloaded_states_are_not_in_the_file(tmp_path: Path) -> None:
    write(FAKE.with_(stage=3, optim={"fp32_flat_groups": [torch.zeros(1), torch.zeros(1)]}), tmp_path)
    error = refused(tmp_path, CorruptError, "group 0")
    assert "NVMe" in str(error.hint)


def test_a_module_of_another_shape(tmp_path: Path) -> None:
    write(FAKE.with_(model={"module": {"w": torch.zeros(4, 30), "v": torch.zeros(5), "b": torch.zeros(3)}}), tmp_path)
    with pytest.raises(CorruptError, match="w has shape"):
        read(tmp_path)


def test_a_rank_without_a_state_that_others_have(tmp_path: Path) -> None:
    write(FAKE, tmp_path / "a")
    write(FAKE.with_(states=("exp_avg",)), tmp_path / "b")
    swap(tmp_path / "a", tmp_path / "b", "*_rank_1_*optim*")
    with pytest.raises(CorruptError, match="exp_avg_sq"):
        read(tmp_path / "a")
