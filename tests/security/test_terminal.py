"""Names come from files, and terminals obey: nothing that the command line prints can command one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.real.hostile import ROOT

EVIL = "\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202e[red]bold[/red]\u2028x"
NAME = EVIL.replace("/", "")
"""The same as the name of a folder."""

CONTROLS = set("\x1b\x07\r\x9b\u202e\u2028")


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A checkpoint with a name that commands terminals, in a folder with another."""
    folder = tmp_path / f"run {NAME}"
    folder.mkdir()
    save_file({EVIL: np.ones((2, 3), "f4"), "w": np.ones(3, "f4")}, folder / "a.safetensors")
    return folder


def said(*arguments: object, exit_code: int = 0) -> str:
    """Everything that the real command prints."""
    command = [sys.executable, "-m", "ucp", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, check=False, cwd=ROOT)
    text = (done.stdout + done.stderr).decode()
    assert done.returncode == exit_code, text
    assert not CONTROLS & set(text), text
    return text


COMMANDS = [["ls"], ["tree"], ["info"], ["show", EVIL], ["plan", f"new {NAME}"], ["verify", "--deep"]]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(evil: Path, command: list[str]) -> None:
    text = said(command[0], evil, *command[1:])
    if command[0] in ("ls", "tree", "show"):
        assert "[red]bold[/red]" in text, "markup is text like any other"


def test_conversion(evil: Path, tmp_path: Path) -> None:
    said("convert", evil, tmp_path / f"new {NAME}")
    text = said("ls", tmp_path / f"new {NAME}")
    assert "[red]bold[/red]" in text


@pytest.mark.parametrize("options", [[], ["-v"], ["--json"]])
def test_errors(evil: Path, options: list[str]) -> None:
    """With all that -v tells, the trace of the exception among it."""
    file = evil / "a.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header[EVIL]["shape"] = [7, 7]
    bad = json.dumps(header).encode()
    file.write_bytes(len(bad).to_bytes(8, "little") + bad + data[8 + size :])
    text = said("info", evil, *options, exit_code=6)
    assert "[red]bold[/red]" in text


def test_names_that_were_asked_for(evil: Path) -> None:
    assert "no tensor" in said("show", evil, f"no {EVIL}", "-v", exit_code=3)
