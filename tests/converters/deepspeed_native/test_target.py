"""What native folders hold of made-up checkpoints, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.converters.deepspeed_universal.made import Made
from ucp.catalog import Catalog, ParamGroup, Scalar, Source
from ucp.container.leaves import leaf_bytes
from ucp.container.torchfile import read_torch_file
from ucp.converter import Layout
from ucp.converters._deepspeed_native.target import NativeFolder
from ucp.converters.deepspeed import CONVERTER
from ucp.errors import FitError, UsageError
from ucp.layout import Box, Mesh
from ucp.plan import Extent, Key
from ucp.run.gather import read_region
from ucp.run.integrity import Ledger, Spans
from ucp.run.worker import write_object
from ucp.tree import Opaque, TensorLeaf, Tree

ADAM = {"lr": 0.1, "betas": (0.9, 0.99)}


class Native(Made):
    """Made-up checkpoints and the native folders written of them."""

    def plan(self, catalog: Catalog, *, dp: int = 2, **options: Any) -> NativeFolder:
        return CONVERTER.target(catalog, self.store, layout=Layout(Mesh({"dp": dp})), **options)

    def save(self, catalog: Catalog, *, dp: int = 2, **options: Any) -> NativeFolder:
        target = self.plan(catalog, dp=dp, **options)
        ledger = Ledger(Spans(()))
        for task in target.tasks:
            write_object(self.store, self.out, task, ledger=ledger, advance=lambda _: None)
        for path, data in target.finish({}):
            self.out.put(path, data)
        return target

    def file(self, name: str) -> Tree:
        return read_torch_file(self.out, f"global_step3/{name}").root

    def array(self, leaf: TensorLeaf) -> np.ndarray[Any, Any]:
        kind = {"bfloat16": "uint16"}.get(leaf.extent.dtype, leaf.extent.dtype)
        return np.frombuffer(leaf_bytes(self.out, leaf), kind).reshape(leaf.extent.shape)

    def back(self) -> Catalog:
        return CONVERTER.read(self.out)

    def value(self, catalog: Catalog, name: str, state: str = "value") -> np.ndarray[Any, Any]:
        spec = catalog.tensors[name].states[state]
        data = read_region(self.out, catalog.cover(name, state), Box.whole(spec.shape))
        return data.view(spec.dtype).reshape(spec.shape)


def two_groups(name: str) -> Native:
    made = Native(name)
    made.adam("gain", 1)
    made.adam("a.weight", 3, 5)
    made.adam("a.bias", 5)
    made.add("frozen", "frozen", value=np.arange(7, dtype="float32"))
    made.add("seen", "buffer", value=np.int64([4]))
    return made


GROUPS = (ParamGroup(("a.weight",), ADAM), ParamGroup(("a.bias", "gain"), {**ADAM, "lr": 0.2}))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dp", [1, 2, 3, 7])
def test_everything_comes_back(stage: int, dp: int) -> None:
    made = two_groups(f"everything-{stage}-{dp}")
    source = made.catalog(GROUPS, ties={"head.weight": "a.weight"})
    target = made.save(source, dp=dp, stage=stage)
    assert target.losses == ()
    found = made.back()
    assert found.tensors.keys() == source.tensors.keys()
    for name, tensor in source.tensors.items():
        assert found.tensors[name].kind == tensor.kind
        for state in tensor.states:
            raw = made.store.read(source.fragments[Key(name, state)][0].extent.object)
            assert made.value(found, name, state).tobytes() == raw
        assert found.tensors[name].scalars == tensor.scalars
    assert [(group.params, dict(group.options)) for group in found.param_groups] == [
        (group.params, dict(group.options)) for group in GROUPS
    ]
    assert dict(found.ties) == {"head.weight": "a.weight"}
    assert (found.step, found.source.mesh["dp"], found.source.detail["zero_stage"]) == (3, dp, stage)


def test_module_copies_are_rounded_and_checked() -> None:
    made = two_groups("rounded")
    made.save(made.catalog(GROUPS), stage=1, dtype="bf16")
    module = made.file("mp_rank_00_model_states.pt")["module"]
    assert [module[name].extent.dtype for name in ("a.weight", "frozen", "seen")] == ["bfloat16", "float32", "int64"]
    found = made.back()
    assert set(found.witnesses) == {"gain", "a.weight", "a.bias"}
    assert found.tensors["a.weight"].states["value"].dtype == "float32"
    assert made.array(module["a.weight"]).tolist()[0][1] == np.float32([2.0]).view("uint32")[0] >> 16


def test_low_precision_sources_become_fp32_masters() -> None:
    made = Native("low")
    made.add("w", value=np.float16([1.5, 2.25]), exp_avg=np.float16([1, 2]), exp_avg_sq=np.float16([3, 4]))
    target = made.save(made.catalog(), stage=2)
    assert target.losses == ()
    optimizer = made.file("zero_pp_rank_0_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
    assert optimizer["base_optimizer_state"]["state"][0]["exp_avg"].extent.dtype == "float32"
    assert made.array(made.file("mp_rank_00_model_states.pt")["module"]["w"]).dtype == np.float16
    assert made.value(made.back(), "w").tolist() == [1.5, 2.25]


def test_sub_groups_and_empty_groups_of_stage_3() -> None:
    made = two_groups("sub-groups")
    groups = (*GROUPS, ParamGroup(("frozen",), ADAM))
    made.save(made.catalog(groups), stage=3, dp=2, sub_group_size="3")
    optimizer = made.file("zero_pp_rank_1_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
    assert [leaf.extent.shape for leaf in optimizer["fp32_flat_groups"]] == [(8,), (3,), (1,)]
    assert [group["params"] for group in optimizer["optimizer_state_dict"]["param_groups"]] == [[0], [1, 2], []]
    model = made.file("zero_pp_rank_0_mp_rank_00_model_states.pt")
    assert [list(group) for group in model["param_shapes"]] == [["a.weight"], ["a.bias"], ["gain"]]
    assert made.back().param_groups[1].params == ("a.bias", "gain")
    target = made.plan(made.catalog(groups), stage=2)
    assert any("group 2 trains nothing" in note for note in target.notes)


def test_parameters_that_never_took_a_step_have_zeros() -> None:
    made = Native("zeros")
    made.adam("a", 3)
    made.add("b", step=None, value=np.float32([5, 6]))
    target = made.save(made.catalog(), stage=1)
    assert any("1 parameters never took an optimizer step (b, …)" in note for note in target.notes)
    found = made.back()
    assert made.value(found, "b", "exp_avg").tolist() == [0, 0]
    assert made.value(found, "b").tolist() == [5, 6]
    assert found.tensors["b"].scalars["step"].value == 3


def test_large_tensors_of_the_training_state_are_not_read_while_planning(monkeypatch: pytest.MonkeyPatch) -> None:
    made = two_groups("large-state")
    data = np.arange(1 << 17, dtype="uint8")
    made.store.put("state.bin", data.tobytes())
    leaf = TensorLeaf(Extent.contiguous("state.bin", 0, data.shape, "uint8"))
    small = TensorLeaf(Extent.contiguous("state.bin", 5, (2,), "uint8"))
    catalog = made.catalog(GROUPS, state={"rng": {"torch": leaf, "small": small, "again": leaf}})
    made.save(catalog, stage=2)
    saved = made.file("mp_rank_00_model_states.pt")["rng"]
    assert made.array(saved["torch"]).tobytes() == made.array(saved["again"]).tobytes() == data.tobytes()
    assert made.array(saved["small"]).tolist() == [5, 6]
    sections = [section for task in made.plan(catalog, stage=2).tasks for section in task.sections]
    assert any(section.cover.key.name == "state.bin:0" for section in sections)


def test_of_the_training_state_nothing_runs_code() -> None:
    made = two_groups("hostile")
    state = {"client_state": {"bad": Opaque("posix", "system", ("true",)), "note": "kept"}, "rng": [1, 2]}
    target = made.save(made.catalog(GROUPS, state=state), stage=1)
    assert any("posix.system" in note for note in target.notes)
    model = made.file("mp_rank_00_model_states.pt")
    assert (model["note"], model["rng"], "bad" in model) == ("kept", [1, 2], False)


def test_loss_scales() -> None:
    made = two_groups("scales")
    told = made.catalog(GROUPS, state={"loss_scale": {"scale": 1024.0, "growth_interval": 50}})
    made.save(told, stage=3, dtype="fp16")
    scaler = made.file("zero_pp_rank_0_mp_rank_00_optim_states.pt")["optimizer_state_dict"]["loss_scaler"]
    assert (scaler.name, scaler.attribute("cur_scale"), scaler.attribute("scale_window")) == (
        "DynamicLossScaler",
        1024.0,
        50,
    )
    target = made.plan(told, stage=3, dtype="bf16")
    assert any("left out: the loss scale 1024.0" in note for note in target.notes)
    target = made.plan(made.catalog(GROUPS), stage=3, dtype="fp16")
    assert any("no loss scale" in note for note in target.notes)
    made.save(made.catalog(GROUPS), stage=2, dtype="fp16")
    assert "loss_scaler" not in made.file("zero_pp_rank_0_mp_rank_00_optim_states.pt")["optimizer_state_dict"]


def test_a_loss_scale_that_is_no_number_is_none() -> None:
    """Scripts save what they like under this name."""
    made = two_groups("odd-scale")
    leaf = TensorLeaf(Extent.contiguous("", 0, (), "float32"), inline=bytes(4))
    told = made.catalog(GROUPS, state={"loss_scale": {"scale": leaf, "growth_factor": leaf}})
    assert any("no loss scale" in note for note in made.plan(told, dtype="fp16", stage=3).notes)
    told = made.catalog(GROUPS, state={"loss_scale": {"scale": 8.0, "growth_factor": leaf}})
    made.save(told, dtype="fp16", stage=3)


def test_files_around_may_have_any_name() -> None:
    made = two_groups("names-around")
    made.save(made.catalog(GROUPS, state={"around": {"scheduler": {"last_epoch": 3}}}))
    assert read_torch_file(made.out, "scheduler").root == {"last_epoch": 3}


def test_weights_alone() -> None:
    made = Native("weights")
    made.add("w", step=None, value=np.float32([1, 2, 3]))
    target = made.save(replace(made.catalog(), param_groups=()), stage=3)
    assert any("no optimizer states" in note for note in target.notes)
    assert made.value(made.back(), "w").tolist() == [1, 2, 3]


def with_step(made: Made, name: str, value: float, scalar: str = "step") -> None:
    tensor = made.tensors[name]
    made.tensors[name] = replace(tensor, scalars={**tensor.scalars, scalar: Scalar(value, "float32")})


def test_differing_steps_are_a_loss() -> None:
    made = two_groups("steps")
    with_step(made, "gain", 2.0)
    target = made.plan(made.catalog(GROUPS), stage=1)
    assert target.losses == (
        "optimizer group 1: step is 2.0 for gain and 3.0 for a.bias; ZeRO keeps one per group, and 3.0 is written",
    )
    with_step(made, "gain", 3.0)
    with_step(made, "a.weight", 9.0)
    assert made.plan(made.catalog(GROUPS), stage=3).losses == ()


def test_wide_values_are_a_loss() -> None:
    made = Native("wide")
    made.add("w", value=np.float64([1 / 3]), exp_avg=np.float64([1]), exp_avg_sq=np.float64([1]))
    target = made.plan(made.catalog(), stage=1)
    assert target.losses == ("3 tensors in float64 are rounded to float32, which is what ZeRO keeps (w[value], …)",)


def refused(made: Native, says: str, **others: Any) -> None:
    with pytest.raises(FitError, match=says):
        made.plan(made.catalog(**others), stage=2)


def test_states_that_flat_tensors_cannot_hold_are_refused() -> None:
    made = Native("shapes")
    made.add("w", value=np.zeros((2, 3), "float32"), row=np.zeros(2, "float32"))
    refused(made, r"state 'row' has shape \[2\]")
    made = Native("types")
    made.add("w", value=np.zeros(2, "float32"), exp_avg=np.zeros(2, "uint8"))
    refused(made, "'exp_avg' is uint8")
    made = Native("missing")
    made.add("a", value=np.zeros(2, "float32"), prev=np.zeros(2, "float32"))
    made.add("b", value=np.zeros(2, "float32"))
    refused(made, "b: has no state 'prev'")
    made = two_groups("undecided")
    made.tensors["gain"] = replace(made.tensors["gain"], undecided="tell which")
    refused(made, "cannot be told which optimizer states are those of gain")
    made = two_groups("flat")
    refused(made, "row_var is of the source's flat partitions", state={"optimizer": {"state": {0: {"row_var": 1}}}})


def test_states_of_what_no_group_trains_are_a_loss() -> None:
    made = two_groups("ungrouped")
    plain = made.plan(made.catalog(groups=GROUPS))
    assert not plain.losses
    target = made.plan(made.catalog(groups=GROUPS[1:]))
    assert any("optimizer states of 1 tensors are left out" in loss and "a.weight" in loss for loss in target.losses)
    made.tensors["gain"] = replace(made.tensors["gain"], kind="frozen")
    target = made.plan(made.catalog(groups=GROUPS))
    assert any("optimizer states of 1 tensors are left out" in loss and "gain" in loss for loss in target.losses)


def test_groups_that_no_job_has_are_refused() -> None:
    made = two_groups("groups")
    refused(made, "gain is in two optimizer groups", groups=(*GROUPS, ParamGroup(("gain",), ADAM)))
    refused(made, "experts", groups=(ParamGroup(("gain", "a.weight", "a.bias"), {**ADAM, "moe": True}),))
    refused(made, "no hyper-parameters", groups=(ParamGroup(("gain", "a.weight", "a.bias"), {}),))
    made = Native("nothing")
    made.add("seen", "buffer", value=np.int64([4]))
    refused(made, "no parameter is trained")
    made = two_groups("pipeline")
    catalog = made.catalog(GROUPS)
    pipeline = replace(catalog, source=Source("deepspeed", "1", Mesh({"pp": 2, "dp": 1}), {"zero_stage": 1}))
    with pytest.raises(FitError, match="a file per layer"):
        made.plan(pipeline, stage=1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stage": 0}, "stage is a number from 1 to 3"),
        ({"stage": "four"}, "stage is a number"),
        ({"stage": True}, "stage is a number"),
        ({"dtype": "fp8"}, "dtype is fp32, bf16 or fp16"),
        ({"tag": "a/b"}, "not a tag"),
        ({"tag": "latest"}, "not a tag"),
        ({"tag": " x"}, "not a tag"),
        ({"sub_group_size": "0"}, "sub_group_size is a number"),
        ({"round_robin": "maybe"}, "round_robin is yes or no"),
        ({"stage": 3, "round_robin": True}, "round_robin is of ZeRO 1 and 2"),
        ({"stage": 2, "bf16_optimizer": True, "dtype": "bf16"}, "BF16_Optimizer is for stage 1"),
        ({"bf16_optimizer": True, "dtype": "fp32"}, "BF16_Optimizer is for stage 1"),
        ({"levels": 3}, "unknown option 'levels'"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], says: str) -> None:
    made = two_groups("options")
    with pytest.raises(UsageError, match=says):
        made.plan(made.catalog(GROUPS), **options)


def test_other_axes_are_refused() -> None:
    made = two_groups("axes")
    with pytest.raises(UsageError, match="pp"):
        CONVERTER.target(made.catalog(GROUPS), made.store, layout=Layout(Mesh({"pp": 2, "dp": 2})))


def test_the_layout_is_the_sources_where_nothing_is_said() -> None:
    made = two_groups("defaults")
    config = {"zero_optimization": {"stage": 3, "sub_group_size": 3.0}, "bf16": {"enabled": True}}
    source = Source("deepspeed", "0.19.8", Mesh({"dp": 3}), {"zero_stage": 3})
    catalog = replace(made.catalog(GROUPS, state={"ds_config": config}), source=source)
    target = CONVERTER.target(catalog, made.store)
    names = sorted(task.object for task in target.tasks)
    assert names[0] == "global_step3/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    assert names[-1] == "global_step3/zero_pp_rank_2_mp_rank_00_model_states.pt"
    assert len(names) == 6
    assert any("ZeRO 3 over 3 ranks in bfloat16" in note for note in target.notes)


def test_round_robin_sources_are_written_in_the_jobs_order() -> None:
    """The source's groups are in the order of the data; the job's own is the one before it was dealt out."""
    made = Native("round-robin")
    for number in range(5):
        made.adam(f"p{number}", number + 1)
    dealt = tuple(f"p{number}" for number in (0, 2, 4, 1, 3))
    state = {"ds_config": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "dp_world_size": 2}
    catalog = made.catalog((ParamGroup(dealt, ADAM),), state=state)
    made.save(catalog, dp=3, stage=1, round_robin="no")
    shapes = made.file("mp_rank_00_model_states.pt")["param_shapes"]
    assert list(shapes[0]) == ["p0", "p1", "p2", "p3", "p4"]
    made.save(catalog, dp=3, stage=2, tag="dealt")
    shapes = read_torch_file(made.out, "dealt/mp_rank_00_model_states.pt").root["param_shapes"]
    assert list(shapes[0]) == ["p0", "p3", "p1", "p4", "p2"]


def test_files_around_that_would_run_code_or_lie_elsewhere_are_left_out() -> None:
    made = two_groups("around")
    around = {
        "trainer_state.json": b"{}",
        "scheduler.pt": {"last_epoch": 3},
        "args.bin": {"kept": 1, "bad": Opaque("posix", "system", ("true",))},
        "latest": b"elsewhere",
        "../outside.json": b"{}",
        ".hidden": b"{}",
        "global_step3": b"{}",
    }
    target = made.save(made.catalog(GROUPS, state={"around": around}), stage=1)
    assert [name for name in made.out.children() if "/" not in name] == ["latest", "scheduler.pt", "trainer_state.json"]
    assert made.out.read("latest") == b"global_step3"
    assert read_torch_file(made.out, "scheduler.pt").root == {"last_epoch": 3}
    note = "left out of what lies around the tag folder: ../outside.json .hidden args.bin global_step3 latest"
    assert note in target.notes
