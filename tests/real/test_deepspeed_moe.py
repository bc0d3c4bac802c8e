"""Native mixtures of experts: what real DeepSpeed jobs save is read, and loaded into torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ucp
from tests.converters.deepspeed.audit import audit_bytes, audit_entries
from tests.converters.deepspeed.oracle import differences
from tests.real.moe import UNREADABLE, Moe, copied, read, record, refused, rewrite, truth_of
from tests.support.moe_case import CASES
from ucp.errors import NotFoundError
from ucp.run.convert import convert

every = pytest.mark.parametrize("name", [name for name in CASES if name != UNREADABLE])


@every
def test_every_state_equals_the_jobs_own(name: str, moe: Moe) -> None:
    folder = moe(name)
    assert differences(folder / "ckpt", read(folder), truth_of(folder, CASES[name])) == []


@every
def test_every_byte_and_entry_is_accounted_for(name: str, moe: Moe) -> None:
    folder = moe(name)
    catalog = read(folder)
    assert audit_bytes(folder / "ckpt", catalog) == audit_entries(folder / "ckpt", catalog) == []


@every
def test_groups_hold_experts_by_their_global_numbers(name: str, moe: Moe) -> None:
    case, folder = CASES[name], moe(name)
    catalog, told = read(folder), record(folder)
    names = [one for group in catalog.param_groups for one in group.params]
    assert len(set(names)) == len(names)
    assert set(names) == {n for n, t in catalog.tensors.items() if t.kind == "parameter"}
    for layer, count in enumerate(case.experts):
        if case.auto:
            assert catalog.tensors[f"blocks.{layer}.moe.experts.w1"].states["exp_avg"].shape[0] == count
            continue
        if layer and case.tied:
            continue
        block = f"{layer + 1}.block" if case.stages > 1 else f"blocks.{layer}"
        prefix = f"{block}.moe.deepspeed_moe.experts.deepspeed_experts."
        numbers = {int(one.removeprefix(prefix).partition(".")[0]) for one in names if one.startswith(prefix)}
        assert numbers == set(range(count))
    if not case.elastic:
        assert len(catalog.param_groups) == len(told["groups"])
        assert [group.options["lr"] for group in catalog.param_groups] == [group["lr"] for group in told["groups"]]
        degrees = [group["name"] for group in told["groups"] if group.get("moe")]
        assert [g.options["name"] for g in catalog.param_groups if g.options.get("moe")] == degrees
    degrees = sorted(set(case.ep))
    assert catalog.source.detail["expert_parallel"] == (degrees[0] if len(degrees) == 1 else "2 4")
    assert catalog.step == told["global_steps"] == 3
    counted = {tensor.scalars["step"].value for tensor in catalog.tensors.values() if tensor.scalars}
    # The 16-bit wrappers of ZeRO 0 step once to make their states.
    assert counted == {4.0 if (case.stage, case.dtype) == (0, "bf16") else 3.0}
    if case.stages == 1:
        assert catalog.state["num_experts"] == list(case.experts)


def test_experts_that_layers_share_are_ties(moe: Moe) -> None:
    catalog = read(moe("z1_fp16_ep2dp2"))
    pairs = {alias.replace("blocks.1", "blocks.0"): name for alias, name in catalog.ties.items()}
    assert len(pairs) == 16
    assert all(alias == name for alias, name in pairs.items())


def test_old_files_of_all_experts_of_a_number(moe: Moe, tmp_path: Path) -> None:
    """EMULATED: before layers could differ, one file had the experts of a number of all layers."""
    folder = copied(moe("z1_fp32_ep2dp2"), tmp_path)
    tag = folder / "ckpt/global_step3"
    for expert in range(4):
        files = sorted(tag.glob(f"layer_*_expert_{expert}_mp_rank_00_model_states.pt"))
        both = {name: value for path in files for name, value in torch.load(path).items()}
        torch.save(both, tag / f"expert_{expert}_mp_rank_00_model_states.pt")
        for path in files:
            path.unlink()
    rewrite(tag / "mp_rank_00_model_states.pt", lambda root: root.update(num_experts=4))
    assert differences(folder / "ckpt", read(folder), truth_of(folder, CASES["z1_fp32_ep2dp2"])) == []
    (tag / "expert_2_mp_rank_00_model_states.pt").unlink()
    refused(folder, NotFoundError, "/expert_2_mp_rank_00_model_states.pt: missing")


@pytest.mark.parametrize("name", ["z1_bf16_ep2dp4", "z2_fp32_ep4dp4", "z0_bf16_ep2ep4dp4", "auto_z3_bf16_ep2dp4"])
def test_through_the_universal_form(name: str, moe: Moe, tmp_path: Path) -> None:
    folder = moe(name)
    convert(str(folder / "ckpt"), str(tmp_path / "universal"))
    with ucp.open(str(tmp_path / "universal")) as checkpoint:
        for key, value in load_file(folder / "truth.safetensors").items():
            kind, _, own = key.partition("/")
            if kind != "lowp":
                state = "value" if kind in ("param", "frozen", "buffer") else kind
                assert torch.equal(checkpoint[own][state][...], value), key


def test_into_torch_on_one_process(moe: Moe) -> None:
    """A model that holds all experts itself loads what four ranks trained."""
    folder, case = moe("z2_bf16_ep2dp4_residual"), CASES["z2_bf16_ep2dp4_residual"]
    truth = load_file(folder / "truth.safetensors")
    model = torch.nn.Module()
    for key, value in truth.items():
        kind, _, own = key.partition("/")
        if kind in ("param", "buffer"):
            place(model, own, torch.zeros_like(value), buffer=kind == "buffer")
    matrices = {"params": [p for p in model.parameters() if p.ndim > 1], "lr": 1.0, "weight_decay": 0.5}
    vectors = {"params": [p for p in model.parameters() if p.ndim < 2], "lr": 1.0, "weight_decay": 0.5}
    optimizer = torch.optim.AdamW([matrices, vectors])
    ucp.load((model, optimizer), str(folder / "ckpt"))
    for own, parameter in model.named_parameters():
        assert torch.equal(parameter, truth[f"param/{own}"])
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[parameter][kind], truth[f"{kind}/{own}"])
        assert optimizer.state[parameter]["step"] == case.steps
    rates = [group["lr"] for group in record(folder)["groups"]]
    assert [group["lr"] for group in optimizer.param_groups] == rates[:2] == rates[2:]
    for own, buffer in model.named_buffers():
        assert torch.equal(buffer, truth[f"buffer/{own}"])


def place(model: torch.nn.Module, name: str, value: torch.Tensor, *, buffer: bool) -> None:
    """Give `model` a parameter or buffer with this dotted name."""
    *path, last = name.split(".")
    for part in path:
        if part not in model._modules:
            model.add_module(part, torch.nn.Module())
        child = model._modules[part]
        assert child is not None
        model = child
    if buffer:
        model.register_buffer(last, value)
    else:
        model.register_parameter(last, torch.nn.Parameter(value))
