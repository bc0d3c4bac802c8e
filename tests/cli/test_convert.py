"""plan and convert: what they say, and that an interrupted conversion goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.cli import shards
from tests.cli.conftest import REPOSITORY, arrays, environment
from ucp.store import open_store


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_plan_writes_nothing_and_is_what_convert_does(document, invoke, checkpoint, tmp_path) -> None:
    there = tmp_path / "new"
    plan = document("plan", checkpoint, there, "--to", "shards", "--workers", "3")
    assert not there.exists()
    nbytes = 8 * sum(array.size for array in arrays().values())
    assert plan["bytes_read"] == plan["bytes_written"] == nbytes
    assert plan["bytes_checked"] == (2 + 4 + 4) * (13 * 7 + 5 * 6), "bfloat16 copies, and replicas of both states"
    assert plan["peak_bytes"] == 3 * plan["peak_bytes_per_worker"]
    assert plan["state"] == "new"
    assert "tasks" not in plan
    report = document("convert", checkpoint, there, "--to", "shards")
    assert report["bytes_read"] == plan["bytes_read"]
    assert report["objects"] == plan["objects_written"]
    assert document("plan", checkpoint, there, "--to", "shards")["state"] == "done"


def test_plan_hints_at_the_same_conversion(invoke, checkpoint, tmp_path) -> None:
    result = invoke(
        "plan", checkpoint, tmp_path / "a b", "--to", "shards", "--no-check", "--workers", "2", "-v", "-o", "a=b c"
    )
    line = f"`ucp convert {checkpoint} '{tmp_path / 'a b'}' --to shards --workers 2 --no-check --option 'a=b c'`"
    assert line in result.stderr
    assert "data/embed.weight.value.bin" in result.stdout
    assert "to check" not in result.stdout


def test_convert_twice_does_nothing_the_second_time(invoke, document, checkpoint, tmp_path) -> None:
    there = tmp_path / "new"
    first = invoke("convert", checkpoint, there, "--to", "shards")
    assert first.exit_code == 0
    assert "read     1.1 kB, and" in first.stdout
    before = files(there)
    second = invoke("convert", checkpoint, there, "--to", "shards")
    assert (second.exit_code, second.stdout) == (0, f"{there} is already complete\n")
    assert document("convert", checkpoint, there, "--to", "shards")["already_done"] is True
    assert files(there) == before
    assert invoke("convert", checkpoint, there, "--to", "shards", "-q").output == ""


def test_options_of_the_target_are_given_by_name(invoke, document, tmp_path) -> None:
    there = tmp_path / "new"
    checkpoint = shards.write(tmp_path / "source", {"w": np.ones((512, 64), np.float32)})
    for text in ("64KiB", "65536"):
        assert document("plan", checkpoint, there, "-t", f"shard_bytes={text}")["objects_written"] == 4
    assert document("convert", checkpoint, there, "-t", "shard_bytes=64 kib")["objects"] == 4
    hint = invoke("plan", checkpoint, there / "2", "-t", "shard_bytes=1 KiB").stderr
    assert "--target-option 'shard_bytes=1 KiB'" in hint
    for words in (["shard_bytes"], ["shard_bytes=x"], ["=1"], ["to=deepspeed"], ["store=1"], ["nonsense=1"], ["a b=1"]):
        result = invoke("plan", checkpoint, tmp_path / "3", "-t", *words)
        assert (result.exit_code, result.stdout) == (2, ""), words
    assert invoke("plan", checkpoint, tmp_path / "3", "-o", "store=1").exit_code == 2


def test_credentials_are_not_printed(invoke, checkpoint) -> None:
    there = "memory://me:secret@credentials/new"
    for command in ("plan", "convert", "convert", "plan"):
        result = invoke(command, checkpoint, there, "--to", "shards")
        assert result.exit_code == 0
        assert "secret" not in result.output
        assert "memory://***@credentials/new" in result.output
    assert "secret" not in open_store(there).read("ucp-conversion.json").decode()


def test_a_full_destination_is_refused(invoke, checkpoint, tmp_path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    result = invoke("convert", checkpoint, tmp_path / "full", "--to", "shards")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "hint: choose another destination"
    assert files(tmp_path / "full") == {"file": b"mine"}


def test_unknown_families_are_usage_errors(invoke, checkpoint, tmp_path) -> None:
    assert invoke("convert", checkpoint, tmp_path / "new", "--to", "nonsense").exit_code == 2
    assert invoke("info", checkpoint, "--family", "nonsense").exit_code == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_conversion_says_how_to_resume_and_resumes(process, checkpoint, tmp_path, number) -> None:
    there = tmp_path / "new"
    arguments = ["convert", str(checkpoint), str(there), "--to", "shards", "--workers", "1"]
    running = subprocess.Popen(
        [sys.executable, "-m", "tests.cli.slow", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=REPOSITORY,
    )
    deadline = time.monotonic() + 120
    while len(list(there.rglob("*.bin"))) < 3:
        assert running.poll() is None
        assert time.monotonic() < deadline, "it does not begin"
        time.sleep(0.02)
    running.send_signal(number)
    stdout, stderr = running.communicate(timeout=120)
    assert (running.returncode, stdout) == (130, "")
    assert "error[interrupted]: " in stderr
    assert f"hint: `ucp {' '.join(arguments)}` resumes" in stderr
    assert "Traceback" not in stderr
    assert not (there / "index.json").exists()
    assert process("info", there).returncode == 3
    again = process(*arguments, "--json")
    assert again.returncode == 0, again.stderr
    report = json.loads(again.stdout)
    assert report["resumed_objects"] >= 2
    assert process("verify", there, "--against", checkpoint).returncode == 0


def test_a_failing_storage_says_how_to_resume(process, checkpoint, tmp_path) -> None:
    arguments = ["convert", str(checkpoint), str(tmp_path / "new"), "--to", "shards"]
    no_room = ["bash", "-c", 'ulimit -f 0; exec "$@"', "bash", sys.executable, "-m", "tests.cli.shards", *arguments]
    done = subprocess.run(no_room, capture_output=True, text=True, env=environment(), cwd=REPOSITORY, check=False)
    assert (done.returncode, done.stdout) == (7, "")
    assert "error[storage]: " in done.stderr
    assert done.stderr.splitlines()[-1] == f"      `ucp {' '.join(arguments)}` resumes"
    assert process(*arguments).returncode == 0


def test_damage_found_while_converting_is_exit_6(invoke, checkpoint, tmp_path) -> None:
    data = bytearray((checkpoint / "copies.bin").read_bytes())
    data[1] ^= 0x40
    (checkpoint / "copies.bin").write_bytes(data)
    result = invoke("convert", checkpoint, tmp_path / "new", "--to", "shards")
    assert result.exit_code == 6
    assert "error[conflict]: embed.weight" in result.stderr
    assert invoke("convert", checkpoint, tmp_path / "other", "--to", "shards", "--no-check").exit_code == 0


def test_layouts_and_losses_are_asked_for_by_options(invoke, checkpoint, tmp_path) -> None:
    there = tmp_path / "new"
    words = ("--mesh", "tp=2,pp=2", "--to-size", "hidden=4", "--to-flag", "tied=yes", "--lossy")
    refused = invoke("plan", checkpoint, there, *words)
    assert refused.exit_code == 2
    assert "universal checkpoints have no layout to choose" in refused.stderr
    assert invoke("convert", checkpoint, there, "--mesh", "tp").exit_code == 2
    assert invoke("convert", checkpoint, there, "--to-spec", "no_such_program").exit_code == 3
    assert not there.exists()
    assert "--lossy" in invoke("plan", checkpoint, there, "--lossy").stderr, "the hint repeats it"
