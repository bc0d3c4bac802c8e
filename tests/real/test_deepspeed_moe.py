"""Native mixtures of experts: what real DeepSpeed jobs save is read, loaded into torch, and resumed by DeepSpeed."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

import ucp
from tests.converters.deepspeed.audit import audit_bytes, audit_entries
from tests.converters.deepspeed.oracle import differences, load_truth
from tests.support.moe_case import CASES, MoeCase
from tests.support.moe_job import resume, run_jobs
from ucp.catalog import Catalog
from ucp.converters.deepspeed import CONVERTER
from ucp.errors import ConflictError, CorruptError, FitError, NotFoundError, UcpError
from ucp.run.convert import convert, prepare
from ucp.store import open_store

Made = Callable[[str], Path]
UNIVERSAL = "deepspeed-universal"


@pytest.fixture(scope="session")
def made(real_cases_folder: Path, request: pytest.FixtureRequest) -> Made:
    """Call with a case's name to get its folder.

    Each is made once per session; the first call makes those that selected tests have as a parameter, in one process.
    """
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed; this test reads what the real deepspeed writes")
    calls = [getattr(item, "callspec", None) for item in request.session.items if item.path == Path(__file__)]
    named = {call.params.get("name") for call in calls if call is not None}

    def folder(name: str) -> Path:
        path = real_cases_folder / f"moe-{name}"
        with FileLock(real_cases_folder / "moe.lock"):
            if not (path / "case.json").exists():
                make(real_cases_folder, {name, *named} & CASES.keys())
        return path

    return folder


def make(folder: Path, names: Iterable[str]) -> None:
    missing = {path: CASES[n] for n in sorted(names) if not ((path := folder / f"moe-{n}") / "case.json").exists()}
    for path in missing:
        shutil.rmtree(path, ignore_errors=True)
    run_jobs(missing)


def read(folder: Path, **options: Any) -> Catalog:
    return CONVERTER.read(open_store(str(folder / "ckpt")), **options)


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "case.json").read_text())
    return found


def truth_of(folder: Path, case: MoeCase) -> dict[str, Any]:
    truth = load_truth(folder / "truth.safetensors")
    plain = (case.stage == 0 and case.dtype == "fp32") or case.stage == 3
    return {key: held for key, held in truth.items() if not (plain and key.startswith("lowp/"))}


UNREADABLE = "auto_z0_fp32_ep2dp2"
every = pytest.mark.parametrize("name", [name for name in CASES if name != UNREADABLE])


@every
def test_every_state_equals_the_jobs_own(name: str, made: Made) -> None:
    folder = made(name)
    assert differences(folder / "ckpt", read(folder), truth_of(folder, CASES[name])) == []


@every
def test_every_byte_and_entry_is_accounted_for(name: str, made: Made) -> None:
    folder = made(name)
    catalog = read(folder)
    assert audit_bytes(folder / "ckpt", catalog) == audit_entries(folder / "ckpt", catalog) == []


@every
def test_groups_hold_experts_by_their_global_numbers(name: str, made: Made) -> None:
    case, folder = CASES[name], made(name)
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


def test_experts_that_layers_share_are_ties(made: Made) -> None:
    catalog = read(made("z1_fp16_ep2dp2"))
    pairs = {alias.replace("blocks.1", "blocks.0"): name for alias, name in catalog.ties.items()}
    assert len(pairs) == 16
    assert all(alias == name for alias, name in pairs.items())


def test_old_files_of_all_experts_of_a_number(made: Made, tmp_path: Path) -> None:
    """EMULATED: before layers could differ, one file had the experts of a number of all layers."""
    folder = copied(made("z1_fp32_ep2dp2"), tmp_path)
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


def test_a_model_file_of_one_rank_is_not_enough(made: Made, tmp_path: Path) -> None:
    """Without ZeRO, rank 0's model file holds an optimizer, but of its own experts alone."""
    folder = copied(made("z0_fp32_ep2dp4"), tmp_path)
    (folder / "ckpt/global_step3/expp_rank_1_mp_rank_00_optim_states.pt").unlink()
    refused(folder, NotFoundError, "expp_rank_1_mp_rank_00_optim_states.pt: missing")


def test_autoep_without_zero_is_refused(made: Made) -> None:
    refused(made(UNREADABLE), FitError, "AutoEP without ZeRO")


def test_autoeps_experts_in_another_order_are_refused(made: Made, tmp_path: Path) -> None:
    folder = copied(made("auto_z1_fp32_ep2dp2"), tmp_path)
    model = folder / "ckpt/global_step3/mp_rank_00_model_states.pt"
    rewrite(model, lambda root: root["ds_autoep_layers"][0]["expert_placement"]["ranks"][0].update(experts=[1, 0]))
    with pytest.raises(FitError, match="consecutive order"):
        read(folder)


def test_a_missing_expert_of_autoep_is_named(made: Made, tmp_path: Path) -> None:
    folder = copied(made("auto_z1_fp32_ep2dp2"), tmp_path)
    (folder / "ckpt/global_step3/layer_0_expert_3_mp_rank_00_model_states.pt").unlink()
    refused(folder, NotFoundError, "layer_0_expert_3_mp_rank_00_model_states.pt: missing")


def test_zero_3_partitions_over_other_ranks(made: Made, tmp_path: Path) -> None:
    folder = copied(made("auto_z3_bf16_ep2dp4"), tmp_path)
    path = optimizers(folder)[2]
    groups = "ds_zero_partition_groups"
    rewrite(path, lambda root: root["optimizer_state_dict"][groups][1].update(partition_ranks=[1, 2]))
    refused(folder, ConflictError, "ranks \\[1, 2\\], not \\[0, 2\\]")


def copied(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def refused(folder: Path, kind: type[UcpError], match: str) -> None:
    with pytest.raises(kind, match=match) as error:
        read(folder)
    assert error.value.hint


def test_a_missing_expert_is_named(made: Made, tmp_path: Path) -> None:
    folder = copied(made("z1_fp32_ep2dp2"), tmp_path)
    (folder / "ckpt/global_step3/layer_1_expert_2_mp_rank_00_model_states.pt").unlink()
    refused(folder, NotFoundError, "layer_1_expert_2_mp_rank_00_model_states.pt: missing")


@pytest.mark.parametrize(
    "name", ["layer_1_expert_4_mp_rank_00_model_states.pt", "layer_2_expert_0_mp_rank_00_model_states.pt"]
)
def test_an_expert_too_many_is_named(name: str, made: Made, tmp_path: Path) -> None:
    folder = copied(made("z1_fp32_ep2dp2"), tmp_path)
    tag = folder / "ckpt/global_step3"
    shutil.copy(tag / "layer_1_expert_2_mp_rank_00_model_states.pt", tag / name)
    refused(folder, ConflictError, name)


def test_a_file_of_another_expert(made: Made, tmp_path: Path) -> None:
    folder = copied(made("z1_fp32_ep2dp2"), tmp_path)
    tag = folder / "ckpt/global_step3"
    shutil.copy(
        tag / "layer_1_expert_2_mp_rank_00_model_states.pt", tag / "layer_1_expert_3_mp_rank_00_model_states.pt"
    )
    refused(folder, CorruptError, "layer_1_expert_3_mp_rank_00_model_states.pt: holds blocks.1.*another expert")


def test_a_missing_rank(made: Made, tmp_path: Path) -> None:
    folder = copied(made("z2_fp32_ep4dp4"), tmp_path)
    (folder / "ckpt/global_step3/zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    refused(folder, NotFoundError, "zero_pp_rank_2_mp_rank_00_optim_states.pt: missing")


def rewrite(path: Path, change: Callable[[Any], None]) -> None:
    root = torch.load(path, weights_only=False)
    change(root)
    torch.save(root, path)


def base(root: Any) -> Any:
    """The torch optimizer's own state dict in a ZeRO file."""
    return root["optimizer_state_dict"]["base_optimizer_state"]


def optimizers(folder: Path) -> list[Path]:
    return sorted((folder / "ckpt/global_step3").glob("*optim_states.pt"))


def test_a_degree_that_does_not_divide_the_ranks(made: Made, tmp_path: Path) -> None:
    folder = copied(made("z1_bf16_ep2dp4"), tmp_path)
    for path in optimizers(folder):
        rewrite(path, lambda root: root["optimizer_state_dict"]["partition_count"].__setitem__(2, 3))
    refused(folder, ConflictError, "partitioned over 3 ranks, but the model was saved by 4")


def test_a_group_called_after_another_degree(made: Made, tmp_path: Path) -> None:
    folder = copied(made("z1_bf16_ep2dp4"), tmp_path)
    for path in optimizers(folder):
        rewrite(path, lambda root: base(root)["param_groups"][2].update(name="ep_size_4"))
    refused(folder, ConflictError, "called ep_size_4")


def test_a_dense_group_over_some_of_the_ranks(made: Made, tmp_path: Path) -> None:
    folder = copied(made("z1_bf16_ep2dp4"), tmp_path)
    for path in optimizers(folder):
        rewrite(path, lambda root: root["optimizer_state_dict"]["partition_count"].__setitem__(0, 2))
    refused(folder, ConflictError, "partitioned over 2 ranks, but the model was saved by 4")


def test_experts_at_another_step(made: Made, tmp_path: Path) -> None:
    folder = copied(made("z1_fp32_ep2dp2"), tmp_path)
    path = optimizers(folder)[1]
    rewrite(path, lambda root: base(root)["state"][2]["step"].add_(1))
    refused(folder, ConflictError, "different steps")


def test_optimizers_of_different_saves_without_zero(made: Made, tmp_path: Path) -> None:
    folder = copied(made("z0_fp32_ep2dp4"), tmp_path)
    rewrite(optimizers(folder)[0], lambda root: root["optimizer"]["state"][0]["exp_avg"].add_(1))
    refused(folder, ConflictError, "hold different optimizers")


@pytest.mark.parametrize("name", ["z1_bf16_ep2dp4", "z1_fp32_ep2dp2"])
def test_ranks_that_were_swapped_are_found_by_the_weights(name: str, made: Made, tmp_path: Path) -> None:
    folder = copied(made(name), tmp_path)
    first, second = optimizers(folder)[:2]
    one, two = (torch.load(path, weights_only=False) for path in (first, second))
    a, b = (root["optimizer_state_dict"]["single_partition_of_fp32_groups"] for root in (one, two))
    a[2:], b[2:] = b[2:], a[2:]
    torch.save(one, first)
    torch.save(two, second)
    with pytest.raises(ConflictError, match="deepspeed_experts"):
        convert(str(folder / "ckpt"), str(tmp_path / "converted"))


def test_replicas_without_zero_are_compared(made: Made, tmp_path: Path) -> None:
    """Every rank saves what is no expert; one copy that differs is found."""
    folder = copied(made("z0_bf16_ep2ep4dp4"), tmp_path)
    rewrite(
        folder / "ckpt/global_step3/expp_rank_3_mp_rank_00_optim_states.pt",
        lambda root: root["optimizer"]["optimizer_state_dict"]["state"][0]["exp_avg"].add_(1),
    )
    with pytest.raises(UcpError, match=r"embed\.weight"):
        convert(str(folder / "ckpt"), str(tmp_path / "converted"))


@pytest.mark.parametrize("name", ["z1_bf16_ep2dp4", "z2_fp32_ep4dp4", "z0_bf16_ep2ep4dp4", "auto_z3_bf16_ep2dp4"])
def test_through_the_universal_form(name: str, made: Made, tmp_path: Path) -> None:
    folder = made(name)
    convert(str(folder / "ckpt"), str(tmp_path / "universal"))
    with ucp.open(str(tmp_path / "universal")) as checkpoint:
        for key, value in load_file(folder / "truth.safetensors").items():
            kind, _, own = key.partition("/")
            if kind != "lowp":
                state = "value" if kind in ("param", "frozen", "buffer") else kind
                assert torch.equal(checkpoint[own][state][...], value), key


def test_into_torch_on_one_process(made: Made) -> None:
    """A model that holds all experts itself loads what four ranks trained."""
    folder, case = made("z2_bf16_ep2dp4_residual"), CASES["z2_bf16_ep2dp4_residual"]
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
def test_stock_deepspeed_resumes_at_another_degree(made: Made, tmp_path: Path) -> None:
    requests, sources = [], []
    for number, (name, changes) in enumerate(RESUMES):
        folder, case = made(name), CASES[name].replace(seed=99, **changes)
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
    laid: int, job: int, made: Made, tmp_path: Path
) -> None:
    folder = made("z1_fp32_ep2dp2")
    convert(str(folder / "ckpt"), str(tmp_path / "universal"), to=UNIVERSAL, ep=laid)
    case = CASES["z1_fp32_ep2dp2"].replace(ep=(job, job), world=job)
    with pytest.raises(RuntimeError, match="AssertionError"):
        resume([{"case": case, "root": tmp_path / "universal", "first": 3}], tmp_path / "resumed")


def test_a_folder_is_read_back_with_global_numbers(made: Made, tmp_path: Path) -> None:
    folder = made("z2_fp32_ep4dp4")
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


def test_shared_experts_are_still_shared_in_a_folder(made: Made, tmp_path: Path) -> None:
    folder = made("z1_fp16_ep2dp2")
    convert(str(folder / "ckpt"), str(tmp_path / "universal"), to=UNIVERSAL, ep=4)
    with ucp.open(str(tmp_path / "universal")) as back:
        assert back.catalog.ties == read(folder).ties
        assert [g.options["name"] for g in back.catalog.param_groups if g.options.get("moe")] == ["ep_size_2"] * 2


def test_a_degree_that_does_not_divide_the_experts(made: Made, tmp_path: Path) -> None:
    folder = made("z1_fp32_ep1dp2")
    with pytest.raises(FitError, match="3 experts cannot be spread over 2"):
        prepare(str(folder / "ckpt"), str(tmp_path / "universal"), to=UNIVERSAL, ep=2)


def test_a_folder_says_for_which_degree_it_is(made: Made, tmp_path: Path) -> None:
    notes = prepare(str(made("z1_fp32_ep2dp2") / "ckpt"), str(tmp_path / "universal"), to=UNIVERSAL).target.notes
    assert any("expert-parallel degree 2" in note for note in notes)
