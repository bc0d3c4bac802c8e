from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import ucp
from tests.support.gloo import spawn

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("torchtitan") is None,
        reason="torchtitan is not installed (its requirements exclude those of transformers: just torchtitan)",
    ),
]


def check_goes_on(one: tuple[Any, list[float]], other: list[Any]) -> None:
    held, losses = one
    for found, next_losses, *_ in other:
        assert found == held
        assert next_losses == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_training_goes_on_at_another_layout(tmp_path: Path, mode: str) -> None:
    from tests.integrations.torchtitan_jobs import first, second

    folder = str(tmp_path / "run")
    begun = spawn(first, 2, folder, mode)[0]
    with ucp.open(f"{folder}/step-4") as ckpt:
        assert (ckpt.family, ckpt.step) == ("native", 4)
        assert ckpt["blocks.0.up.weight"]["exp_avg"][...].any()
        assert ckpt.state["train_state"]["step"][...].item() == 4
        assert ckpt.state["dataloader"] == {"dp_rank_0": b"row 3 of 0", "dp_rank_1": b"row 3 of 1"}
    # As in torchtitan, data loaders are for the same number of data-parallel ranks.
    check_goes_on(begun, spawn(second, 4, folder, {"exclude": ["dataloader"]}))


def test_training_starts_from_another_form(tmp_path: Path) -> None:
    from tests.integrations.torchtitan_jobs import first, second

    begun = spawn(first, 2, str(tmp_path / "run"), "disabled")[0]
    ucp.convert(str(tmp_path / "run" / "step-4"), str(tmp_path / "universal"), to="universal")
    options = {"initial_load_path": str(tmp_path / "universal"), "initial_load_model_only": False}
    found = spawn(second, 2, str(tmp_path / "other"), options)
    check_goes_on(begun, found)
    assert [place for _, _, place in found] == [b"row 3 of 0", b"row 3 of 1"]


def test_a_last_step_may_have_weights_alone(tmp_path: Path) -> None:
    from tests.integrations.torchtitan_jobs import last

    names = spawn(last, 2, str(tmp_path / "run"))[0]
    assert "blocks.0.up.weight torch.bfloat16 value" in names
