"""``ucp cp``, ``ucp sync`` and ``ucp repair``: what they print, their documents, and how they leave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import ucp
from ucp.cli import cp, repair, sync
from ucp.cli.app import program
from ucp.format.universal import CONVERTER
from ucp.testing.example import example, write

Invoke = Callable[..., Result]


@pytest.fixture
def invoke() -> Invoke:
    return lambda *words: CliRunner().invoke(program, [str(word) for word in words], prog_name="ucp")


@pytest.fixture
def document(invoke: Invoke) -> Callable[..., dict[str, Any]]:
    def run(*words: object, code: int = 0) -> dict[str, Any]:
        done = invoke(*words, "--json")
        assert done.exit_code == code, done.output
        return json.loads(done.stdout)

    return run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    catalog, store = example(tmp_path / "made")
    write(CONVERTER, catalog, store, tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Path:
    shutil.copytree(source, tmp_path / "run" / "step-00000003")
    return tmp_path / "run"


def test_cp(invoke: Invoke, source: Path, tmp_path: Path) -> None:
    done = invoke("cp", source, tmp_path / "there", "--verify")
    assert done.exit_code == 0
    assert "universal" in done.stdout
    assert "digests" in done.stdout
    assert ucp.open(tmp_path / "there").catalog.tensors == ucp.open(source).catalog.tensors
    again = invoke("cp", source, tmp_path / "there")
    assert "already complete" in again.stdout


def test_cp_json(document: Callable[..., dict[str, Any]], source: Path, tmp_path: Path) -> None:
    found = document("cp", source, tmp_path / "there", "--verify")
    assert found.keys() == cp.KEYS.keys()
    assert found["bytes_copied"] == found["bytes_verified"] > 0
    assert found["family"] == "universal"
    assert document("cp", source, tmp_path / "there")["already_done"] is True


@pytest.mark.parametrize(("harm", "code"), [("damage", 6), ("remove", 3), ("fill", 2)])
def test_cp_leaves_with_the_code_of_what_is_wrong(
    document: Callable[..., dict[str, Any]], source: Path, tmp_path: Path, harm: str, code: int
) -> None:
    if harm == "damage":
        path = next(path for path in (source / "tensors").rglob("c/**/0") if path.is_file())
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    elif harm == "remove":
        (source / "zarr.json").unlink()
    else:
        (tmp_path / "there").mkdir()
        (tmp_path / "there" / "thesis").write_text("mine")
    assert document("cp", source, tmp_path / "there", code=code)["error"]["exit_code"] == code


def test_sync(invoke: Invoke, run: Path, tmp_path: Path) -> None:
    done = invoke("sync", run, tmp_path / "mirror")
    assert done.exit_code == 0
    assert "step 3: " in done.stdout
    assert "nothing is missing" in invoke("sync", run, tmp_path / "mirror").stdout


def test_sync_json(document: Callable[..., dict[str, Any]], run: Path, tmp_path: Path) -> None:
    found = document("sync", run, tmp_path / "mirror")
    assert found.keys() == sync.KEYS.keys()
    assert found["copied"] == [3]
    shutil.copytree(run / "step-00000003", run / "step-00000004")
    shutil.rmtree(run / "step-00000003")
    found = document("sync", run, tmp_path / "mirror", "--delete", "--verify")
    assert (found["copied"], found["deleted"]) == ([4], [3])


def test_repair(invoke: Invoke, source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "copy")
    assert "nothing to repair" in invoke("repair", source).stdout
    (source / "state.json").write_text("{}")
    told = invoke("repair", source, "--from", tmp_path / "copy", "--dry-run")
    assert told.exit_code == 0
    assert "can be repaired  state.json" in told.stdout
    assert (source / "state.json").read_text() == "{}"
    assert invoke("verify", source).exit_code == 6
    done = invoke("repair", source, "--from", tmp_path / "copy")
    assert "repaired  state.json" in done.stdout
    assert invoke("verify", source, "--deep").exit_code == 0


def test_what_cannot_be_repaired_is_told(invoke: Invoke, document: Callable[..., dict[str, Any]], source: Path) -> None:
    (source / "state.json").unlink()
    done = invoke("repair", source)
    assert done.exit_code == 6
    assert "lost  state.json" in done.stdout
    assert "--from" in done.stderr
    found = document("repair", source, code=6)
    assert found.keys() == repair.KEYS.keys()
    assert found["ok"] is False
    assert found["lost"][0]["path"] == "state.json"
