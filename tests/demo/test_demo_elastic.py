"""``ucp demo elastic`` as users run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from ucp.demo.elastic import warden
from ucp.demo.elastic.ledger import Strike, account
from ucp.demo.elastic.outcome import Outcome, story
from ucp.demo.elastic.picture import picture
from ucp.demo.elastic.run import FIRST_STRUCK, NODES


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="nodes have their memory in /dev/shm")
def test_every_promise_is_held(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ucp", "demo", "elastic", "--json", "--seed", "3", "--keep", str(tmp_path / "kept")],
        capture_output=True,
        text=True,
        timeout=1100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["held"]
    assert (told["samples_missing"], told["samples_repeated"], told["broken"]) == (0, 0, [])
    assert len(told["kills"]) >= 4
    assert {sum(NODES.values()), 3} <= set(told["world_sizes"])
    assert told["largest_loss_difference"] <= told["tolerance"]
    assert "memory" in {recovery["tier"] for recovery in told["recoveries"]}
    assert all(kill["step"] >= FIRST_STRUCK for kill in told["kills"])
    ET.fromstring((tmp_path / "kept" / "picture.svg").read_text())
    assert not [one for one in warden.running("") if str(tmp_path) in _words(one.pid)]


def _words(pid: int) -> str:
    try:
        return Path("/proc", str(pid), "cmdline").read_text()
    except OSError:
        return ""


def test_a_broken_promise_is_told_with_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from tests.elastic.test_ledger import Life, job
    from ucp.cli.app import program
    from ucp.demo.elastic import run as demo

    records, reference = job([Life(2, 1, 0, 4)], 8), job([], 9)
    strikes = [Strike(time=1.0, what="rank", node="a", rank=0, phase="optimizer", step=3)]
    found = account(records, reference, strikes)
    outcome = Outcome(
        account=found,
        strikes=strikes,
        story=story(records, reference, strikes),
        tolerance=1e-9,
        broken=found.broken(tolerance=1e-9),
        seconds=1.0,
        seed=4,
    )
    assert not outcome.held
    ET.fromstring(picture(outcome.story, "<title>"))
    monkeypatch.setattr(demo, "run", lambda folder, *, seed, say: outcome)
    done = CliRunner().invoke(program, ["demo", "elastic", "--json"])
    assert done.exit_code == 6
    told = json.loads(done.stdout)
    assert (told["held"], told["samples_missing"]) == (False, 6)
    assert told["kills"] == [{"what": "rank", "node": "a", "step": 3, "phase": "optimizer"}]
    done = CliRunner().invoke(program, ["demo", "elastic", "--quiet"])
    assert done.exit_code == 6
    assert "6 samples missing" in done.stderr
    done = CliRunner().invoke(program, ["demo", "elastic"])
    assert "samples missing" in done.stdout
