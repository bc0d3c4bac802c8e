"""Conversions of a real checkpoint killed with SIGKILL: nothing half-written is one, and resuming ends equal."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.support.cases import CASES
from ucp.run.convert import RECORD

REPOSITORY = Path(__file__).resolve().parents[2]
FAMILIES = ["universal", "deepspeed-universal"]


@pytest.fixture(scope="module")
def source(deepspeed_case):
    return deepspeed_case(CASES["z1_bf16_dp4"]) / "ckpt"


@pytest.fixture
def folder(tmp_path):
    """A folder in memory where there is one: thousands of syncs to a disk prove nothing more, and take minutes."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="ucp-crash-") as found:
        yield Path(found)


def crash(source, folder, family, runs):
    """What tests.run.crash says of each child; `runs` are limits by name of the destination in `folder`."""
    listed = [f"{name}={','.join(map(str, limits))}" for name, limits in runs.items()]
    command = [sys.executable, "-m", "tests.run.crash", str(source), str(folder), family, *listed]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    return [json.loads(line) for line in run.stdout.splitlines()]


def contents(folder):
    """Every file's bytes; the record of the conversion names its own paths and is left out."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def killed_at(source, folder, family, limits):
    """Kill at each of `limits` on a fresh destination, then resume; compare with a conversion left alone."""
    (whole,) = crash(source, folder, family, {"whole": [0]})
    expected = contents(folder / "whole")
    said = crash(source, folder, family, {str(limit): [limit, 0] for limit in limits(whole["operations"])})
    for first, second in zip(said[::2], said[1::2], strict=True):
        limit = first["limit"]
        assert first["killed"], limit
        assert not first["readable"] or second["already"], f"readable but not complete after a kill at {limit}"
        assert second["exit"] == 0
        assert second["readable"]
        assert contents(folder / str(limit)) == expected, limit


@pytest.mark.parametrize("family", FAMILIES)
def test_killed_at_some_operations(source, folder, family):
    """At the first and last ones, where the journal starts and the root is put, and at a few between."""
    killed_at(source, folder, family, lambda n: [1, 2, 3, n // 3, n // 2, *range(n - 6, n + 1)])


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES)
def test_killed_at_every_operation_or_every_fourth(source, folder, family):
    step = 1 if family == "universal" else 4
    killed_at(source, folder, family, lambda n: range(1, n + 1, step))


@pytest.mark.parametrize("family", FAMILIES)
def test_killed_again_and_again_on_the_way(source, folder, family):
    """Each run resumes the last and dies a little later."""
    *deaths, last, _ = crash(source, folder, family, {"often": [*range(5, 400, 37), 0], "whole": [0]})
    assert sum(death["killed"] for death in deaths) >= 2
    assert last["readable"]
    assert contents(folder / "often") == contents(folder / "whole")


@pytest.mark.slow
def test_the_command_killed_at_random_moments(source, folder):
    """The real command, in threads and in processes, killed by the clock; about half of the kills land inside."""
    rng = random.Random(7)
    for number in range(40):
        destination = folder / str(number)
        command = [sys.executable, "-m", "ucp", "convert", str(source), str(destination), "-q"]
        command += ["--processes"] if number % 4 == 0 else []
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.05, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    expected = contents(folder / "0")
    assert all(contents(folder / str(number)) == expected for number in range(1, 40))
