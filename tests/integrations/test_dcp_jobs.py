from __future__ import annotations

from pathlib import Path

import pytest

import ucp
from tests.integrations.dcp_jobs import fail, save_and_load, save_async
from tests.support.gloo import spawn
from ucp.errors import NotFoundError

MOVES = [
    ("ucp", "fsdp2", "ddp", "nested"),
    ("torch", "fsdp2", "hsdp", "torchtitan"),
    ("ucp", "hsdp", "fsdp2_tp", "flat"),
    ("torch", "ddp", "fsdp2_tp", "nested"),
]
MORE = [
    ("ucp", "ddp", "fsdp2", "torchtitan"),
    ("ucp", "fsdp2_tp", "fsdp2", "nested"),
    ("torch", "fsdp2_tp", "fsdp2", "flat"),
    ("ucp", "fsdp1", "fsdp2", "nested"),
    ("torch", "fsdp1", "fsdp2", "nested"),
    ("ucp", "hsdp", "fsdp1", "nested"),
    ("torch", "fsdp2_ep", "fsdp2_ep", "nested"),
    ("ucp", "fsdp2_ep", "fsdp2_ep", "torchtitan"),
    ("ucp", "fsdp2_bf16", "fsdp2_bf16", "nested"),
]


@pytest.mark.parametrize(
    "moves", [pytest.param(MOVES, id="some"), pytest.param(MORE, id="more", marks=pytest.mark.slow)]
)
def test_any_layout_loads_into_any_other(tmp_path: Path, moves: list[tuple[str, str, str, str]]) -> None:
    spawn(save_and_load, 4, str(tmp_path), moves, timeout=300)


@pytest.mark.parametrize("process", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["thread", "process"])
def test_what_changes_after_staging_is_not_saved(tmp_path: Path, process: bool) -> None:
    spawn(save_async, 2, str(tmp_path), process)


def test_all_ranks_hear_of_a_failure(tmp_path: Path) -> None:
    for odd, pieces, again, missing, damaged in spawn(fail, 2, str(tmp_path)):
        assert "extra.odd: a object cannot be saved" in odd
        assert "extra.odd: a tensor in pieces inside an object" in pieces
        assert "there is a checkpoint already" in again
        assert "model.unheard_of" in missing
        assert "fail their crc32c" in damaged
    with pytest.raises(NotFoundError):
        ucp.open(str(tmp_path / "odd"), family="native")
