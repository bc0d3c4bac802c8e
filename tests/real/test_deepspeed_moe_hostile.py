"""Native mixtures of experts that lack files, have others, or were changed: each is refused by its name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.real.moe import UNREADABLE, Moe, copied, read, refused, rewrite
from ucp.errors import ConflictError, CorruptError, FitError, NotFoundError, UcpError
from ucp.run.convert import convert


def test_a_model_file_of_one_rank_is_not_enough(moe: Moe, tmp_path: Path) -> None:
    """Without ZeRO, rank 0's model file holds an optimizer, but of its own experts alone."""
    folder = copied(moe("z0_fp32_ep2dp4"), tmp_path)
    (folder / "ckpt/global_step3/expp_rank_1_mp_rank_00_optim_states.pt").unlink()
    refused(folder, NotFoundError, "expp_rank_1_mp_rank_00_optim_states.pt: missing")


def test_autoep_without_zero_is_refused(moe: Moe) -> None:
    refused(moe(UNREADABLE), FitError, "AutoEP without ZeRO")


def test_autoeps_experts_in_another_order_are_refused(moe: Moe, tmp_path: Path) -> None:
    folder = copied(moe("auto_z1_fp32_ep2dp2"), tmp_path)
    model = folder / "ckpt/global_step3/mp_rank_00_model_states.pt"
    rewrite(model, lambda root: root["ds_autoep_layers"][0]["expert_placement"]["ranks"][0].update(experts=[1, 0]))
    with pytest.raises(FitError, match="consecutive order"):
        read(folder)


def test_a_missing_expert_of_autoep_is_named(moe: Moe, tmp_path: Path) -> None:
    folder = copied(moe("auto_z1_fp32_ep2dp2"), tmp_path)
    (folder / "ckpt/global_step3/layer_0_expert_3_mp_rank_00_model_states.pt").unlink()
    refused(folder, NotFoundError, "layer_0_expert_3_mp_rank_00_model_states.pt: missing")


def test_zero_3_partitions_over_other_ranks(moe: Moe, tmp_path: Path) -> None:
    folder = copied(moe("auto_z3_bf16_ep2dp4"), tmp_path)
    path = optimizers(folder)[2]
    groups = "ds_zero_partition_groups"
    rewrite(path, lambda root: root["optimizer_state_dict"][groups][1].update(partition_ranks=[1, 2]))
    refused(folder, ConflictError, "ranks \\[1, 2\\], not \\[0, 2\\]")


def test_a_missing_expert_is_named(moe: Moe, tmp_path: Path) -> None:
    folder = copied(moe("z1_fp32_ep2dp2"), tmp_path)
    (folder / "ckpt/global_step3/layer_1_expert_2_mp_rank_00_model_states.pt").unlink()
    refused(folder, NotFoundError, "layer_1_expert_2_mp_rank_00_model_states.pt: missing")


@pytest.mark.parametrize(
    "name", ["layer_1_expert_4_mp_rank_00_model_states.pt", "layer_2_expert_0_mp_rank_00_model_states.pt"]
)
def test_an_expert_too_many_is_named(name: str, moe: Moe, tmp_path: Path) -> None:
    folder = copied(moe("z1_fp32_ep2dp2"), tmp_path)
    tag = folder / "ckpt/global_step3"
    shutil.copy(tag / "layer_1_expert_2_mp_rank_00_model_states.pt", tag / name)
    refused(folder, ConflictError, name)


def test_a_file_of_another_expert(moe: Moe, tmp_path: Path) -> None:
    folder = copied(moe("z1_fp32_ep2dp2"), tmp_path)
    tag = folder / "ckpt/global_step3"
    shutil.copy(
        tag / "layer_1_expert_2_mp_rank_00_model_states.pt", tag / "layer_1_expert_3_mp_rank_00_model_states.pt"
    )
    refused(folder, CorruptError, "layer_1_expert_3_mp_rank_00_model_states.pt: holds blocks.1.*another expert")


def test_a_missing_rank(moe: Moe, tmp_path: Path) -> None:
    folder = copied(moe("z2_fp32_ep4dp4"), tmp_path)
    (folder / "ckpt/global_step3/zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    refused(folder, NotFoundError, "zero_pp_rank_2_mp_rank_00_optim_states.pt: missing")


def base(root: Any) -> Any:
    """The torch optimizer's own state dict in a ZeRO file."""
    return root["optimizer_state_dict"]["base_optimizer_state"]


def optimizers(folder: Path) -> list[Path]:
    return sorted((folder / "ckpt/global_step3").glob("*optim_states.pt"))


def test_a_degree_that_does_not_divide_the_ranks(moe: Moe, tmp_path: Path) -> None:
    folder = copied(moe("z1_bf16_ep2dp4"), tmp_path)
    for path in optimizers(folder):
        rewrite(path, lambda root: root["optimizer_state_dict"]["partition_count"].__setitem__(2, 3))
    refused(folder, ConflictError, "partitioned over 3 ranks, but the model was saved by 4")


def test_a_group_called_after_another_degree(moe: Moe, tmp_path: Path) -> None:
    folder = copied(moe("z1_bf16_ep2dp4"), tmp_path)
    for path in optimizers(folder):
        rewrite(path, lambda root: base(root)["param_groups"][2].update(name="ep_size_4"))
    refused(folder, ConflictError, "called ep_size_4")


def test_a_dense_group_over_some_of_the_ranks(moe: Moe, tmp_path: Path) -> None:
    folder = copied(moe("z1_bf16_ep2dp4"), tmp_path)
    for path in optimizers(folder):
        rewrite(path, lambda root: root["optimizer_state_dict"]["partition_count"].__setitem__(0, 2))
    refused(folder, ConflictError, "partitioned over 2 ranks, but the model was saved by 4")


def test_experts_at_another_step(moe: Moe, tmp_path: Path) -> None:
    folder = copied(moe("z1_fp32_ep2dp2"), tmp_path)
    path = optimizers(folder)[1]
    rewrite(path, lambda root: base(root)["state"][2]["step"].add_(1))
    refused(folder, ConflictError, "different steps")


def test_optimizers_of_different_saves_without_zero(moe: Moe, tmp_path: Path) -> None:
    folder = copied(moe("z0_fp32_ep2dp4"), tmp_path)
    rewrite(optimizers(folder)[0], lambda root: root["optimizer"]["state"][0]["exp_avg"].add_(1))
    refused(folder, ConflictError, "hold different optimizers")


@pytest.mark.parametrize("name", ["z1_bf16_ep2dp4", "z1_fp32_ep2dp2"])
def test_ranks_that_were_swapped_are_found_by_the_weights(name: str, moe: Moe, tmp_path: Path) -> None:
    folder = copied(moe(name), tmp_path)
    first, second = optimizers(folder)[:2]
    one, two = (torch.load(path, weights_only=False) for path in (first, second))
    a, b = (root["optimizer_state_dict"]["single_partition_of_fp32_groups"] for root in (one, two))
    a[2:], b[2:] = b[2:], a[2:]
    torch.save(one, first)
    torch.save(two, second)
    with pytest.raises(ConflictError, match="deepspeed_experts"):
        convert(str(folder / "ckpt"), str(tmp_path / "converted"))


def test_replicas_without_zero_are_compared(moe: Moe, tmp_path: Path) -> None:
    """Every rank saves what is no expert; one copy that differs is found."""
    folder = copied(moe("z0_bf16_ep2ep4dp4"), tmp_path)
    rewrite(
        folder / "ckpt/global_step3/expp_rank_3_mp_rank_00_optim_states.pt",
        lambda root: root["optimizer"]["optimizer_state_dict"]["state"][0]["exp_avg"].add_(1),
    )
    with pytest.raises(UcpError, match=r"embed\.weight"):
        convert(str(folder / "ckpt"), str(tmp_path / "converted"))
