"""Engines whose state lies where it can be neither saved nor filled are refused by name, with what to do instead."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ucp.errors import FitError
from ucp.train.frameworks import deepspeed as walker
from ucp.train.frameworks.deepspeed_masters import base_optimizer, kept_by


def engine(**changes: Any) -> Any:
    plain: dict[str, Any] = {
        "has_moe_layers": False,
        "pipeline_parallelism": False,
        "mp_world_size": 1,
        "autotp_size": lambda: 1,
        "optimizer": None,
        "zenflow": False,
    }
    return SimpleNamespace(**{**plain, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"has_moe_layers": True}, "mixtures of experts"),
        ({"mp_world_size": 2}, "tensor-parallel"),
        ({"autotp_size": lambda: 2}, "tensor-parallel"),
        (
            {"pipeline_parallelism": True, "grid": SimpleNamespace(get_slice_parallel_world_size=lambda: 2)},
            "tensor-parallel",
        ),
        ({"optimizer": SimpleNamespace(offloaded_states={"hp_params"})}, "moved states of this engine away"),
        ({"zenflow": True}, "ZenFlow"),
    ],
)
def test_layouts_that_a_module_does_not_tell(changes: dict[str, Any], words: str) -> None:
    walker._check(engine())
    with pytest.raises(FitError, match=words):
        walker._check(engine(**changes))


class DeepSpeedZeroOptimizer_Stage3:  # noqa: N801  DeepSpeed's own name, by which it is known
    def __init__(self, **changes: Any) -> None:
        plain = {"swap_optimizer": False, "params_in_nvme_and_cpu": False, "sub_group_to_group_id": {0: 0}}
        self.__dict__.update({**plain, "optimizer": SimpleNamespace(param_groups=[{}]), **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"swap_optimizer": True}, "NVMe"),
        ({"params_in_nvme_and_cpu": True}, "NVMe"),
        ({"backup_optimizer": object()}, "over two optimizers"),
        ({"sub_group_to_group_id": {0: 1}}, "joined the parameter groups"),
    ],
)
def test_zero_3_that_keeps_states_elsewhere(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(FitError, match=words):
        kept_by(DeepSpeedZeroOptimizer_Stage3(**changes))


def test_optimizers_that_are_not_known() -> None:
    with pytest.raises(FitError, match="OnebitSomething is not known"):
        kept_by(type("OnebitSomething", (), {})())
    plain = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    assert kept_by(plain) is None
    assert base_optimizer(SimpleNamespace(optimizer=plain)) is plain
    assert base_optimizer(None) is None
