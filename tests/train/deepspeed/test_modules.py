"""Modules of engines, given without the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ucp
from tests.support.gloo import spawn

pytestmark = pytest.mark.usefixtures("needs_deepspeed")


def job(rank: int, world: int, folder: str) -> tuple[list[float], list[str]]:
    """How far a step without gradients moves weights that were loaded into ZeRO-2's; what is said of ZeRO-3's."""
    import deepspeed

    torch.manual_seed(5)
    plain = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    ucp.save(plain, f"{folder}/plain")
    moved: list[float] = []
    said: list[str] = []
    for stage in (2, 3):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.0, "torch_adam": True}},
        }
        engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)
        if stage == 2:
            ucp.load(engine.module, f"{folder}/plain")
            loss = engine(torch.zeros(1, 6, dtype=torch.bfloat16)).sum() * 0
            engine.backward(loss)
            engine.step()
            pairs = zip(engine.module.parameters(), plain.parameters(), strict=True)
            moved += [float((own - given.bfloat16()).abs().max()) for own, given in pairs]
        else:
            works: list[Any] = [ucp.save, ucp.load]
            for work in works:
                with pytest.raises(ucp.UsageError) as caught:
                    work(engine.module, f"{folder}/plain" if work is ucp.load else f"{folder}/cut")
                said.append(f"{caught.value} ({caught.value.hint})")
    return moved, said


@pytest.mark.slow
def test_a_load_into_the_module_lasts_and_zero_3_refuses(tmp_path: Path) -> None:
    for moved, said in spawn(job, 2, str(tmp_path), env={"DS_ACCELERATOR": "cpu"}):
        assert moved == [0.0] * 4
        assert len(said) == 2
        assert all("0.weight: ZeRO-3 holds" in one and "give the DeepSpeed engine itself" in one for one in said)
