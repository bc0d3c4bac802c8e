"""The worked example of spot instances runs as its page says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="nodes have their memory in /dev/shm")
def test_a_day_on_spot_instances_comes_to_its_end(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "spot" / "day.py"), "day"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    words = [line.partition(": ")[2] for line in done.stdout.splitlines()]
    page = (ROOT / "docs" / "spot.md").read_text()
    assert words[:4] == re.findall(r"(?m)^step \d+: (.*)$", page)
    assert words[1] == "node c is killed, its memory lost"
    ET.fromstring((tmp_path / "day" / "picture.svg").read_text())
    steps = [json.loads(line) for line in (tmp_path / "day" / "log").read_text().splitlines()]
    assert {4, 3, 2} == {step["ranks"] for step in steps}
    assert {step["step"] for step in steps} == set(range(1, 151))
