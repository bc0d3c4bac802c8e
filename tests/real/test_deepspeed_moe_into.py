"""Native mixtures of experts as folders of DeepSpeed for other degrees, which real DeepSpeed resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ucp
from tests.real.moe import Moe, read, record
from tests.support.moe_case import CASES, MoeCase
from tests.support.moe_job import resume
from ucp.errors import FitError
from ucp.run.convert import convert, prepare

UNIVERSAL = "deepspeed-universal"

RESUMES: list[tuple[str, dict[str, Any]]] = [
    ("z1_bf16_ep2dp4", {}),
    ("z1_bf16_ep2dp4", {"ep": (4, 4)}),
    ("z1_bf16_ep2dp4", {"ep": (2, 2), "data_first": True}),
    ("z1_bf16_ep2dp4", {"ep": (4, 4), "grad_accum_fp32": True}),
    ("z1_fp32_ep2dp2", {"ep": (1, 1), "world": 2}),
    ("z1_fp32_ep2dp2", {"ep": (4, 4), "world": 4, "stage": 2}),
    ("z2_bf16_ep2dp4_residual", {"ep": (1, 1), "world": 1, "stage": 1}),
    ("z2_fp32_ep4dp4", {"ep": (2, 2), "world": 2}),
    ("z0_fp32_ep2dp4", {"stage": 2}),
    ("z1_fp16_ep2dp2", {}),
    ("z1_bf16_pp2dp2", {}),
    ("z1_bf16_pp2dp2", {"ep": (1, 1, 1), "world": 2}),
    ("auto_z1_fp32_ep2dp2", {"ep": (1, 1)}),
    ("auto_z2_fp32_ep2dp2_frozen", {"ep": (1, 1)}),
    ("auto_z2_bf16_ep2dp4", {"stage": 3}),
    ("auto_z3_bf16_ep2dp4", {"ep": (1, 1), "world": 2, "stage": 1}),
    ("auto_z3_fp32_ep4dp4", {"ep": (2, 2), "world": 2}),
]


@pytest.mark.slow
def test_stock_deepspeed_resumes_at_another_degree(moe: Moe, tmp_path: Path) -> None:
    requests, sources = [], []
    for number, (name, changes) in enumerate(RESUMES):
        folder, case = moe(name), CASES[name].replace(seed=99, **changes)
        root = tmp_path / f"universal-{number}"
        convert(str(folder / "ckpt"), str(root), to=UNIVERSAL, ep=case.ep[0])
        requests.append({"case": case, "root": root, "finish": True, "first": 3})
        sources.append((folder, case))
    for (folder, case), result in zip(sources, resume(requests, tmp_path / "resumed"), strict=True):
        truth, state = load_file(folder / "truth.safetensors"), load_file(result / "state.safetensors")
        for key in truth.keys() - {k for k in truth if k.startswith("lowp/")}:
            assert torch.equal(state[key], truth[key]), (case, key)
        source, after = record(folder), record(result)
        assert after["global_steps"] == 3
        hyper = [{k: v for k, v in group.items() if k != "name"} for group in after["groups"]]
        assert hyper == [{k: v for k, v in group.items() if k != "name"} for group in source["groups"]]
        assert {g["name"] for g in after["groups"] if g.get("moe")} == {f"ep_size_{case.ep[0]}"}
        original = MoeCase.from_json(source["case"])
        if replace(case, seed=original.seed, grad_accum_fp32=original.grad_accum_fp32) == original:
            assert after["losses"] == source["losses_after"]
        elif case.world == original.world:
            near = 1e-6 if case.dtype == "fp32" else 2e-3
            assert after["losses"] == pytest.approx(source["losses_after"], rel=near)


@pytest.mark.parametrize(
    ("laid", "job"), [(2, 1), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((1, 2), (4, 2), (2, 4)))]
)
def test_a_job_of_another_degree_than_the_folder_fails_on_loading(
    laid: int, job: int, moe: Moe, tmp_path: Path
) -> None:
    folder = moe("z1_fp32_ep2dp2")
    convert(str(folder / "ckpt"), str(tmp_path / "universal"), to=UNIVERSAL, ep=laid)
    case = CASES["z1_fp32_ep2dp2"].replace(ep=(job, job), world=job)
    with pytest.raises(RuntimeError, match="AssertionError"):
        resume([{"case": case, "root": tmp_path / "universal", "first": 3}], tmp_path / "resumed")


def test_a_folder_is_read_back_with_global_numbers(moe: Moe, tmp_path: Path) -> None:
    folder = moe("z2_fp32_ep4dp4")
    convert(str(folder / "ckpt"), str(tmp_path / "universal"), to=UNIVERSAL, ep=2)
    with ucp.open(str(tmp_path / "universal")) as back, ucp.open(str(folder / "ckpt")) as source:
        assert set(back.catalog.tensors) == set(source.catalog.tensors)
        for name, tensor in source.catalog.tensors.items():
            assert back.catalog.tensors[name].kind == tensor.kind
            for state in tensor.states:
                assert torch.equal(back[name][state][...], source[name][state][...]), name
        groups = [sorted(group.params) for group in source.catalog.param_groups]
        assert [sorted(group.params) for group in back.catalog.param_groups] == groups
    convert(str(tmp_path / "universal"), str(tmp_path / "again"), to=UNIVERSAL, ep=4)
    with ucp.open(str(tmp_path / "again")) as again:
        name = "blocks.1.moe.deepspeed_moe.experts.deepspeed_experts.5.up.weight"
        truth = load_file(folder / "truth.safetensors")
        assert torch.equal(again[name]["exp_avg"][...], truth[f"exp_avg/{name}"])


def test_shared_experts_are_still_shared_in_a_folder(moe: Moe, tmp_path: Path) -> None:
    folder = moe("z1_fp16_ep2dp2")
    convert(str(folder / "ckpt"), str(tmp_path / "universal"), to=UNIVERSAL, ep=4)
    with ucp.open(str(tmp_path / "universal")) as back:
        assert back.catalog.ties == read(folder).ties
        assert [g.options["name"] for g in back.catalog.param_groups if g.options.get("moe")] == ["ep_size_2"] * 2


def test_a_degree_that_does_not_divide_the_experts(moe: Moe, tmp_path: Path) -> None:
    folder = moe("z1_fp32_ep1dp2")
    with pytest.raises(FitError, match="3 experts cannot be spread over 2"):
        prepare(str(folder / "ckpt"), str(tmp_path / "universal"), to=UNIVERSAL, ep=2)


def test_a_folder_says_for_which_degree_it_is(moe: Moe, tmp_path: Path) -> None:
    notes = prepare(str(moe("z1_fp32_ep2dp2") / "ckpt"), str(tmp_path / "universal"), to=UNIVERSAL).target.notes
    assert any("expert-parallel degree 2" in note for note in notes)
