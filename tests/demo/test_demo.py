"""The demo as a user runs it: real training, real processes, its words, its verdict, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import ucp
import ucp.demo
from tests.cli.conftest import REPOSITORY, environment
from ucp.demo import TOLERANCE
from ucp.errors import UsageError

LIMIT = 400
"""Seconds; a machine that is busy with other tests takes several times what the demo needs alone."""


def start(*arguments, tmp_path: Path, module: str = "ucp", **variables: str) -> subprocess.Popen[str]:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(TMPDIR=str(temporary), PYTHONWARNINGS="default", **variables),
        cwd=REPOSITORY,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], *, exit_code: int = 0) -> tuple[str, str]:
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == exit_code, (out, err)
    assert not others_in_session(process.pid)
    return out, err


def others_in_session(session: int) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and os.getsid(process.pid) == session:
                found.append(process.pid)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return found


def left_behind(tmp_path: Path) -> list[str]:
    """What lies in the folder for temporary files; torch keeps an empty cache folder of its own there."""
    return [path.name for path in (tmp_path / "tmp").rglob("*") if path.is_file() or path.name.startswith("ucp-")]


def test_torch_alone_trains_saves_converts_and_resumes(tmp_path) -> None:
    kept = tmp_path / "kept"
    out, err = finish(start("demo", "--engine", "fsdp2", "--steps", 6, "--keep", kept, tmp_path=tmp_path))
    told = err.splitlines()
    assert [line.split()[0] for line in told] == ["training", "ucp", "resuming", "resuming", "resuming", "took"]
    header, *rows, empty, verdict = out.splitlines()
    assert "FSDP2 on 4  FSDP2 on 3  FSDP2 2 × TP 2  DDP on 2, direct  difference" in header
    assert rows[3].startswith("saved ─")
    numbers = [row.split() for row in rows if not row.startswith("saved")]
    assert [(row[0], len(row)) for row in numbers] == [("0", 2), ("1", 2), ("2", 2), ("3", 6), ("4", 6), ("5", 6)]
    assert float(numbers[-1][1]) < 0.8 * float(numbers[0][1])
    assert max(float(row[-1]) for row in numbers[3:]) <= TOLERANCE
    assert empty == ""
    assert verdict.startswith("resumed as if never interrupted  largest relative difference")
    shards, universal = (ucp.open(str(kept / name)) for name in ("shards", "universal"))
    assert (shards.family, universal.family, shards.step, universal.step) == ("native", "universal", 3, 3)
    assert set(shards) == set(universal)
    assert left_behind(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["zeroed", "forgetful"])
def test_a_wrong_state_fails(tmp_path, fault) -> None:
    arguments = (fault, "demo", "--engine", "fsdp2", "--steps", 4, "--json")
    out, err = finish(start(*arguments, tmp_path=tmp_path, module="tests.demo.sabotaged"), exit_code=6)
    assert err == ""
    document = json.loads(out)
    assert document["held"] is False
    assert document["largest_difference"] > 100 * document["tolerance"]
    first = [curve["losses"][0] / document["uninterrupted"]["losses"][2] for curve in document["resumed"]]
    assert first == pytest.approx([1, 1, 1], rel=TOLERANCE), "the values themselves were right"
    assert left_behind(tmp_path) == []


@pytest.mark.slow
def test_a_failing_rank_is_shown(tmp_path) -> None:
    arguments = ("broken", "demo", "--engine", "fsdp2", "--steps", 2)
    out, err = finish(start(*arguments, tmp_path=tmp_path, module="tests.demo.sabotaged"), exit_code=1)
    assert out == ""
    assert "ValueError: this rank is broken" in err
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    "how", ["ctrl-c", *(pytest.param(how, marks=pytest.mark.slow) for how in ("SIGKILL", "SIGTERM"))]
)
def test_stopped_it_leaves_no_process(tmp_path, how) -> None:
    arguments = ("hanging", "demo", "--engine", "fsdp2", "--steps", 2)
    process = start(*arguments, tmp_path=tmp_path, module="tests.demo.sabotaged")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("resuming"):
            break
    deadline = time.monotonic() + 60
    while len(others_in_session(process.pid)) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    if how == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(getattr(signal, how))
    _, err = process.communicate(timeout=60)
    assert process.returncode == (-9 if how == "SIGKILL" else 130)
    while others_in_session(process.pid) and time.monotonic() < deadline + 60:
        time.sleep(0.1)
    assert others_in_session(process.pid) == []
    if how != "SIGKILL":
        assert "interrupted" in err
        assert left_behind(tmp_path) == []


@pytest.mark.slow
def test_deepspeed_trains_saves_and_resumes_without_a_compiler(tmp_path) -> None:
    variables = {"PATH": "/nonexistent", "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    out, err = finish(start("demo", "--engine", "deepspeed", "--steps", 16, "--json", tmp_path=tmp_path, **variables))
    assert err == ""
    document = json.loads(out)
    assert (document["engine"], document["saved_at"], document["held"]) == ("deepspeed", 8, True)
    assert document["largest_difference"] <= TOLERANCE
    whole = document["uninterrupted"]
    assert whole["layout"] == "ZeRO-1 on 4"
    assert len(whole["losses"]) == 16
    assert whole["losses"][-1] < 0.6 * whole["losses"][0]
    layouts = {curve["layout"]: curve["losses"] for curve in document["resumed"]}
    assert list(layouts) == ["ZeRO-3 on 3", "FSDP2 on 2", "FSDP2 on 4, direct"]
    for losses in layouts.values():
        assert losses == pytest.approx(whole["losses"][8:], rel=TOLERANCE)
    assert not (tmp_path / "extensions").exists()
    assert left_behind(tmp_path) == []


def test_an_engine_that_is_not_installed_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ucp.demo, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match="DeepSpeed is not installed"):
        ucp.demo.run(tmp_path, engine="deepspeed")
    assert ucp.demo._choose("auto") == "fsdp2"


def test_a_folder_with_something_in_it_is_left_alone(tmp_path) -> None:
    (tmp_path / "mine").touch()
    _, err = finish(start("demo", "--keep", tmp_path, tmp_path=tmp_path), exit_code=2)
    assert "needs a new folder" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "tmp"]
