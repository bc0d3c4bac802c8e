"""Writing killed with SIGKILL: without ``.metadata`` there is no checkpoint; the next run ends with the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.converters.dcp.write_support import Trained
from ucp.run.convert import RECORD, convert

REPOSITORY = Path(__file__).resolve().parents[3]


def crash(source: str, folder: Path, **runs: str) -> list[dict[str, object]]:
    listed = [f"{name}={limits}" for name, limits in runs.items()]
    command = [sys.executable, "-m", "tests.run.crash", source, str(folder), "dcp", *listed]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    return [json.loads(line) for line in run.stdout.splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != RECORD}


def test_killed_anywhere_it_is_no_checkpoint_and_is_finished_later(tmp_path: Path) -> None:
    trained = Trained(tmp_path, "stack")
    (whole,) = crash(trained.url, tmp_path, whole="0")
    last = int(str(whole["operations"]))
    said = crash(trained.url, tmp_path, **{f"at{limit}": f"{limit},0" for limit in (1, 5, last // 2, last - 1, last)})
    for first, second in zip(said[::2], said[1::2], strict=True):
        assert first["killed"]
        assert second["readable"]
        assert not first["readable"] or second["already"]
        assert contents(tmp_path / f"at{first['limit']}") == contents(tmp_path / "whole")
    assert not said[4]["readable"], "half of it is no checkpoint"


def test_a_finished_folder_is_left_alone(tmp_path: Path) -> None:
    trained = Trained(tmp_path, "stack")
    convert(trained.url, str(tmp_path / "dcp"), to="dcp")
    before = contents(tmp_path / "dcp")
    assert convert(trained.url, str(tmp_path / "dcp"), to="dcp").already_done
    assert contents(tmp_path / "dcp") == before
