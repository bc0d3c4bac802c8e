"""gc and convert --share: what they say, and what scripts read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.share.made import check, exported, pool, source


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two checkpoints that share, something that is nobody's any more, a folder of somebody else's, and remains."""
    folder = exported(tmp_path, 1, 2, 3)
    shutil.rmtree(folder / "step-3")
    (folder / "theirs").mkdir()
    (folder / "theirs" / "notes").write_text("theirs")
    (folder / "step-4" / "shards").mkdir(parents=True)
    (folder / "step-4" / "shards" / "rank-00000-0-0123abcd.safetensors").write_text("cut short")
    return folder


def test_two_runs_remove_what_is_needless(document, run: Path) -> None:
    first = document("gc", str(run))
    assert (first["removed"], first["bytes_removed"], first["dry_run"]) == ([], 0, False)
    assert {one["kind"] for one in first["condemned"]} == {"shared", "incomplete"}
    assert all(0 < one["due"] <= 86400 for one in first["condemned"])
    assert (first["complete"], first["foreign"]) == (["step-1", "step-2"], ["theirs/"])
    plan = document("gc", str(run), "--grace", "0", "--dry-run")
    assert (len(plan["removed"]), plan["bytes_removed"], len(pool(run))) == (2, 0, 5)
    second = document("gc", str(run), "--grace", "0")
    assert second["removed"] == plan["removed"]
    assert second["bytes_removed"] == sum(one["nbytes"] for one in second["removed"]) > 0
    assert len(pool(run)) == 4
    assert sorted(os.listdir(run)) == ["shared", "step-1", "step-2", "theirs"]
    check(run / "step-2", 2)


def test_what_people_read(invoke, run: Path) -> None:
    told = invoke("gc", str(run)).stdout
    assert "checkpoints  2" in told
    assert "1 shared object" in told
    assert "the first in 24h00m" in told
    assert "left alone   theirs/" in told
    assert "step-4/" in invoke("gc", str(run), "--grace", "0", "-v").stdout
    assert invoke("gc", str(run), "-q").output == ""


@pytest.mark.parametrize(
    ("arguments", "code"), [(["nothing"], 3), (["run/step-1"], 2), (["run", "--grace", "soon"], 2)]
)
def test_errors(invoke, run: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int) -> None:
    monkeypatch.chdir(run.parent)
    assert invoke("gc", *arguments).exit_code == code


def test_convert_shares(document, tmp_path: Path) -> None:
    for step in (1, 2):
        document("convert", source(tmp_path, step), str(tmp_path / "run" / f"step-{step}"), "--share")
        check(tmp_path / "run" / f"step-{step}", step)
    assert len(pool(tmp_path / "run")) == 4
    document("convert", source(tmp_path, 1), str(tmp_path / "x"), "--share", "--to", "torch", exit_code=2)
