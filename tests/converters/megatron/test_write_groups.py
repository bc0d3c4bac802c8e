"""Groups as Megatron-Core has them, made of those of any source."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.converters.deepspeed_universal.made import Made
from ucp.catalog import ParamGroup
from ucp.converters._megatron.write_groups import regroup

OPTIONS = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}


@pytest.fixture
def made() -> Made:
    made = Made("groups")
    for name in ("embed.weight", "layers.0.attn.o.weight"):
        made.add(name, value=np.zeros((2, 3), "float32"), exp_avg=np.zeros((2, 3), "float32"))
    return made


def test_steps_that_groups_keep_are_all_looked_at(made: Made) -> None:
    """Optimizers such as Apex's count in their groups and not per parameter."""
    made.tensors = {name: replace(tensor, scalars={}) for name, tensor in made.tensors.items()}
    groups = [ParamGroup((name,), {**OPTIONS, "step": 5 + i}) for i, name in enumerate(made.tensors)]
    found = regroup(made.catalog(groups=tuple(groups)), ep=1)
    assert found.step == 6
    assert any(loss.startswith("steps differ, 6 of layers.0.attn.o.weight and 5") for loss in found.losses)


def test_a_group_may_list_a_tied_parameter_by_its_other_name(made: Made) -> None:
    group = ParamGroup(("lm_head.weight", "layers.0.attn.o.weight"), {**OPTIONS, "step": 5})
    found = regroup(replace(made.catalog(groups=(group,)), ties={"lm_head.weight": "embed.weight"}), ep=1)
    assert not found.losses
    assert [group.options["lr"] for group in found.catalog.param_groups] == [0.1]


def test_states_of_frozen_tensors_are_a_loss(made: Made) -> None:
    made.tensors["embed.weight"] = replace(made.tensors["embed.weight"], kind="frozen")
    found = regroup(made.catalog(groups=(ParamGroup(tuple(made.tensors), {**OPTIONS, "step": 5}),)), ep=1)
    assert any("of 1 tensors that are not trained, such as embed.weight, are left out" in loss for loss in found.losses)
