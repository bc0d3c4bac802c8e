"""Pipeline engines: every stage holds its layers, and tied layers lie in several stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.case import Case
from tests.support.deepspeed_live import run
from tests.train.deepspeed.moves import problems, resumed, source

pytestmark = pytest.mark.usefixtures("needs_deepspeed")


def case(world: int, *, stages: int = 2, stage: int = 1, **changes: Any) -> Case:
    plain: dict[str, Any] = {"launcher": "pipeline", "frozen": False, "dtype": "bf16"}
    return Case(name="pipeline", world=world, pipeline_stages=stages, stage=stage, **plain, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_stages_and_replicas_change(tied: bool, tmp_path: Path) -> None:
    """DeepSpeed keeps only the weight of a tied layer in step; of what else is in it, the first stage's counts."""
    url = str(tmp_path / "saved")
    jobs = [
        source(case(4, tied=tied), url),
        resumed(case(2, tied=tied), url),
        resumed(case(2, tied=tied, grad_accum_fp32=True), url),
        resumed(case(2, tied=tied, stage=0), url),
        resumed(case(3, tied=tied, stages=3), url),
    ]
    before, *after = run(jobs, tmp_path / "jobs")
    assert [problems(before, one, "bf16") for one in after] == [[]] * len(after)
