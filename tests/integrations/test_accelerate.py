from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.integrations.accelerate_jobs import first_part, hooks, hooks_refused, second_part, whole, with_manager
from tests.support.gloo import spawn


def differing(one: dict[str, Any], other: dict[str, Any], *, exactly: bool = True) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        if not isinstance(a, torch.Tensor):
            return bool(a == b)
        return torch.equal(a, b) if exactly else torch.allclose(a, b, rtol=1e-5, atol=1e-6)

    return [name for name in {**one, **other} if not same(one[name], other[name])]


@pytest.mark.parametrize(
    ("before", "after"),
    [(("fsdp2", 2), ("ddp", 1)), pytest.param(("ddp", 2), ("fsdp2", 3), marks=pytest.mark.slow)],
    ids=lambda layout: "x".join(map(str, layout)),
)
def test_state_goes_from_layout_to_layout(tmp_path: Path, before: Any, after: Any) -> None:
    url = str(tmp_path / "state")
    saved = spawn(first_part, before[1], url, before[0])[0]
    truth = spawn(whole, 1, "ddp")[0]
    for loaded, trained in spawn(second_part, after[1], url, after[0]):
        assert not differing(loaded, saved)
        assert not differing(trained, truth, exactly=False)
    assert set(ucp.open(url).names) == {"0.weight", "0.bias", "2.weight", "2.bias"}


@pytest.mark.slow
def test_a_manager_takes_what_an_accelerator_has_prepared(tmp_path: Path) -> None:
    step, kept, again = spawn(with_manager, 1, str(tmp_path / "run"))[0]
    assert step == 4
    assert not differing(kept, again)


@pytest.mark.slow
def test_hooks_take_the_place_of_the_accelerators_weights(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    for kept, loaded, weights in spawn(hooks, 2, str(folder)):
        assert weights == []
        assert not differing(kept, loaded)
    assert "0.weight" in ucp.open(folder / "ucp").names


def test_hooks_are_refused_where_they_would_not_be_asked() -> None:
    assert "save_state(accelerator, url)" in spawn(hooks_refused, 2)[0]
