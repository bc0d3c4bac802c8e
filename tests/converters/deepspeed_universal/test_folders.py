"""What each tensor's folder holds: states, made-up zeros, one step per group, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest

from ucp.catalog import Catalog, ParamGroup, Scalar, Source, Tensor
from ucp.converters._deepspeed_universal.folders import content
from ucp.converters._deepspeed_universal.names import check_name, check_paths
from ucp.errors import FitError
from ucp.layout import Mesh
from ucp.plan import TensorSpec

FP32 = TensorSpec((5, 7), "float32")
ADAM = {"value": FP32, "exp_avg": FP32, "exp_avg_sq": FP32}


def parameter(name: str, states: dict[str, TensorSpec], step: float | None = 3.0, **scalars: float) -> Tensor:
    numbers = {**({} if step is None else {"step": step}), **scalars}
    return Tensor(name, "parameter", states, {key: Scalar(value, "float32") for key, value in numbers.items()})


def catalog(tensors: Iterable[Tensor], groups: tuple[tuple[str, ...], ...] = ()) -> Catalog:
    return Catalog(
        url="memory://none",
        source=Source("test", "1", Mesh({})),
        tensors={tensor.name: tensor for tensor in tensors},
        fragments={},
        param_groups=tuple(ParamGroup(names, {"lr": 0.1}) for names in groups),
    )


def test_adam_is_for_every_stage():
    found = content(catalog([parameter("a", ADAM), parameter("b", ADAM)], (("a",), ("b",))))
    assert found.zero3
    assert found.notes == ()
    assert found.step == Scalar(3.0, "float32")
    assert [folder.states for folder in found.folders] == [("value", "exp_avg", "exp_avg_sq")] * 2


def test_parameters_that_never_stepped_start_as_zero_at_their_groups_step():
    found = content(catalog([parameter("a", ADAM), parameter("spare", {"value": FP32}, None)], (("a", "spare"),)))
    spare = found.folders[1]
    assert spare.states == ("value",)
    assert spare.zeros == {"exp_avg": FP32, "exp_avg_sq": FP32}
    assert spare.step == Scalar(3.0, "float32")
    assert "1 parameters never took an optimizer step (spare" in found.notes[0]


def test_a_missing_state_that_may_not_start_as_zero_is_refused():
    odd = {"value": FP32, "sum": FP32}
    with pytest.raises(FitError, match=r"b: has no state 'sum'"):
        content(catalog([parameter("a", odd), parameter("b", {"value": FP32})], (("a", "b"),)))


def test_states_of_another_shape_are_refused():
    factored = {"value": FP32, "exp_avg_sq_row": TensorSpec((5,), "float32")}
    with pytest.raises(FitError, match=r"a: state 'exp_avg_sq_row' has shape \[5\]"):
        content(catalog([parameter("a", factored)], (("a",),)))


def test_two_steps_in_a_group_are_refused():
    with pytest.raises(FitError, match=r"optimizer group 0: a is at step 3.0 and b at step 2.0"):
        content(catalog([parameter("a", ADAM), parameter("b", ADAM, 2.0)], (("a", "b"),)))


def test_groups_at_different_steps_are_not_for_zero_3():
    found = content(catalog([parameter("a", ADAM), parameter("b", ADAM, 2.0)], (("a",), ("b",))))
    assert not found.zero3
    assert "one step for all groups" in found.notes[0]


def test_states_that_zero_3_would_drop_are_not_for_zero_3():
    found = content(catalog([parameter("a", {**ADAM, "max_exp_avg_sq": FP32})], (("a",),)))
    assert not found.zero3
    assert "would drop max_exp_avg_sq" in found.notes[0]


def test_states_that_zero_3_misses_are_noted():
    found = content(catalog([parameter("a", {"value": FP32, "momentum_buffer": FP32}, None)], (("a",),)))
    assert found.zero3
    assert "these are momentum_buffer" in found.notes[0]


def test_other_scalars_are_noted():
    found = content(catalog([parameter("a", ADAM, 3.0, mu_product=0.5)], (("a",),)))
    assert "mu_product" in found.notes[0]


def test_frozen_parameters_and_second_names_in_groups_are_left_out():
    tensors = [parameter("a", ADAM), Tensor("b", "frozen", {"value": FP32})]
    tied = dataclasses.replace(catalog(tensors, (("a", "b", "alias"),)), ties={"alias": "a"})
    found = content(tied)
    assert found.groups[0].params == ("a",)
    assert [(folder.name, folder.states, folder.zeros) for folder in found.folders] == [
        ("a", ("value", "exp_avg", "exp_avg_sq"), {}),
        ("b", ("value",), {}),
    ]


def test_weights_alone_need_no_groups():
    found = content(catalog([parameter("a", {"value": FP32}, None), Tensor("b", "buffer", {"value": FP32})]))
    assert [folder.name for folder in found.folders] == ["a", "b"]
    assert found.groups[0].params == ("a",)
    assert found.step is None


@pytest.mark.parametrize("name", ["", "/a", "a//b", "a/../b", "..", ".", "a/.", "a\0b", "a\\b", "x" * 256, "é" * 128])
def test_names_that_are_no_folder_are_refused(name):
    with pytest.raises(FitError, match="DeepSpeed makes a folder of a parameter's name"):
        check_name(name)


@pytest.mark.parametrize("name", ["a.b.c", "a/b", "...", "a b", "é" * 127, "x" * 255])
def test_odd_names_are_folders(name):
    check_name(name)


def test_one_path_for_two_things_is_refused():
    with pytest.raises(FitError, match="two states"):
        check_paths(["zero/a/fp32.pt", "zero/a/fp32.pt"])
    with pytest.raises(FitError, match=r"its folder zero/a/fp32.pt would also be a file"):
        check_paths(["zero/a/fp32.pt", "zero/a/fp32.pt/step.pt"])
    check_paths(["zero/a/fp32.pt", "zero/a/exp_avg.pt"])
