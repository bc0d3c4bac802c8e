"""What `ucp watch` and `ucp checkpoints` print."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.pipeline.scene import save
from ucp.cli.app import program
from ucp.cli.watch import KEYS


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (9, 10):
        save(str(tmp_path / "run"), step)
    (tmp_path / "run" / "logs").mkdir()
    (tmp_path / "run" / "logs" / "x").write_bytes(b"x")
    return tmp_path / "run"


def invoke(*words: object, **environment: str) -> Result:
    return CliRunner().invoke(program, [str(word) for word in words], prog_name="ucp", env=environment)


def lines(text: str) -> list[str]:
    return [re.sub(r" +", " ", line).strip() for line in text.splitlines()]


def test_for_people(run, tmp_path):
    done = invoke("watch", run, tmp_path / "out", "--once", "--no-progress")
    assert done.exit_code == 0, done.output
    said = [re.sub(r"[\d.]+ kB$", "… kB", line) for line in lines(done.stdout)]
    assert said == ["verified step-10 … kB", f"published step-10 {tmp_path}/out/step-10", "verified step-9 … kB"]
    assert lines(done.stderr)[-1] == "2 results; the newest is step-10; 1 incomplete"


def test_quietly_only_addresses_are_printed(run, tmp_path):
    done = invoke("watch", run, tmp_path / "out", "--once", "-q")
    assert (done.stdout, done.stderr) == (f"{tmp_path}/out/step-10\n", "")
    done = invoke("watch", run, tmp_path / "out", "--once", "-q")
    assert (done.stdout, done.stderr, done.exit_code) == ("", "", 0)


def test_by_variables_alone(run, tmp_path):
    done = invoke(
        "watch",
        UCP_WATCH_SOURCE=str(run),
        UCP_WATCH_DESTINATION=str(tmp_path / "out"),
        UCP_WATCH_ONCE="1",
        UCP_WATCH_KEEP="1",
        UCP_WATCH_GRACE="0s",
        UCP_WATCH_TARGET_OPTION="shard_bytes=1MiB",
        UCP_JSON="1",
    )
    document = json.loads(done.stdout)
    assert set(document) == set(KEYS)
    assert document["kept"] == ["step-10"]
    assert done.exit_code == 0


def test_the_exit_code_is_that_of_the_newest_that_failed(run, tmp_path):
    largest = max((run / "step-10").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    largest.write_bytes(largest.read_bytes()[:-1])
    done = invoke("watch", run, tmp_path / "out", "--once")
    assert done.exit_code == 6
    assert lines(done.stdout)[-1] == f"published step-9 {tmp_path}/out/step-9"
    assert "error[corrupt]: step-10" in done.stderr
    assert "again in 1m00s" in done.stderr
    done = invoke("watch", run, tmp_path / "out", "--once", "--json")
    assert done.exit_code == json.loads(done.stdout)["failed"][0]["exit_code"] == 6


@pytest.mark.parametrize("words", [["--every", "soon"], ["--keep", "0"], ["--grace", "-1s"], ["--pointer", "../x"]])
def test_options_that_are_off(run, tmp_path, words):
    done = invoke("watch", run, tmp_path / "out", "--once", *words)
    assert done.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_checkpoints_of_a_prefix(run, tmp_path):
    shutil.copytree(run / "step-9", run / "step-11")
    manifest = run / "step-11" / "ucp.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"step"', b'"stop"', 1))
    document = json.loads(invoke("checkpoints", run, "--json").stdout)
    assert document["others"] == ["logs"]
    assert [row["name"] for row in document["checkpoints"]] == ["step-9", "step-10", "step-11"]
    nine, ten, eleven = document["checkpoints"]
    assert (nine["family"], nine["step"], nine["bytes"], nine["complete"], nine["error"]) == (
        "native",
        9,
        108,
        True,
        None,
    )
    assert ten["step"] == 10
    assert eleven["error"]["code"] == "corrupt"
    assert eleven["problem"]
    assert document["published"] is None
    assert invoke("checkpoints", run, "-q").stdout == "step-9\nstep-10\nstep-11\n"
    invoke("watch", run, tmp_path / "out", "--once", "--keep", "2", "-q")
    shown = lines(invoke("checkpoints", tmp_path / "out").stdout)
    assert shown == ["NAME FAMILY STEP BYTES", "step-9 universal 9 108 B", "step-10 universal 10 108 B published"]
    assert "damaged" in invoke("checkpoints", run).stdout
    assert invoke("checkpoints", tmp_path / "nowhere").exit_code == 3
