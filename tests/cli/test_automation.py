"""What scripts and schedulers rely on, for every command: variables, streams, exit codes, signals."""

from __future__ import annotations

import ast
import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import ucp.cli
from ucp.cli.app import program
from ucp.cli.command import Command
from ucp.cli.reference import commands

ALL = [pytest.param(name, command, id=name) for name, command in commands() if isinstance(command, Command)]
"""Those that do something themselves, also where others stand below them; `ucp spec` only has others below it."""
COMMON = {"json", "quiet", "verbose", "no_progress"}
ESCAPE = "\x1b"


def variable(name: str, parameter: click.Parameter) -> str:
    if parameter.name in COMMON:
        return f"UCP_{parameter.name.upper()}"
    return f"UCP_{name.replace(' ', '_').replace('-', '_').upper()}_{(parameter.name or '').upper()}"


def value(parameter: click.Parameter) -> str:
    """Something that a parameter takes."""
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return "1"
    if isinstance(parameter.type, click.Choice):
        return str(parameter.type.choices[-1])
    return "7" if parameter.type.name in ("integer", "integer range", "float", "duration") else "word=1"


@pytest.mark.parametrize(("name", "command"), ALL)
def test_every_parameter_can_be_given_by_a_variable(name, command, monkeypatch):
    """Each is given by itself, and arrives as if it had been a word of the command line."""
    got: dict[str, object] = {}

    def note(ctx: click.Context) -> None:
        got.update(ctx.params)
        assert ctx.command is command

    monkeypatch.setattr(command, "invoke", note)
    required = {variable(name, p): value(p) for p in command.params if p.required}
    for parameter in command.params:
        if parameter.name == "help" or not parameter.expose_value:
            continue
        environment = {**required, variable(name, parameter): value(parameter)}
        done = CliRunner().invoke(program, name.split(), env=environment, prog_name="ucp")
        assert done.exit_code == 0, (parameter.name, done.output)
        said = got[parameter.name]
        several = parameter.multiple or parameter.nargs == -1
        word = (value(parameter),) if several else value(parameter)
        wanted = parameter.type_cast_value(click.Context(command), word)
        assert said == (True if value(parameter) == "1" else wanted), parameter.name


@pytest.mark.parametrize(("name", "command"), ALL)
def test_no_parameter_asks(name, command):
    assert not [p.name for p in command.params if isinstance(p, click.Option) and p.prompt]


def test_no_command_asks():
    folder = Path(ucp.cli.__file__).parent
    calls = {
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    }
    assert not calls & {"prompt", "confirm", "getchar", "pause", "input", "getpass"}


def arguments(name: str, command: click.Command, checkpoint: str, folder: Path) -> list[str]:
    """Words with which a command does something with a checkpoint; each argument is guessed by its name."""
    words = {"destination": str(folder / "out"), "name": "weight", "tensor": "weight", "glob": "*", "shell": "bash"}
    return [
        *name.split(),
        *(words.get(p.name or "", checkpoint) for p in command.params if isinstance(p, click.Argument)),
    ]


LEFT_OUT = {
    "demo": "trains for a minute",
    "demo elastic": "trains for minutes",
    "completion": "has no output of its own kind",
}
RUN = [param for param in ALL if param.id not in LEFT_OUT]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    import torch

    folder = tmp_path_factory.mktemp("automation") / "run" / "step-1"
    ucp.save({"weight": torch.arange(6.0)}, str(folder), step=1)
    return str(folder)


@pytest.mark.parametrize(("name", "command"), RUN)
def test_json_is_all_that_is_on_standard_output(name, command, checkpoint, tmp_path):
    """Whether it works or not: one document, with the documented keys or an error, and an exit code that fits."""
    extra = ["--once"] if name == "watch" else []
    words = [*arguments(name, command, checkpoint, tmp_path), "--json", *extra]
    done = CliRunner().invoke(program, words, prog_name="ucp")
    document = json.loads(done.stdout)
    if "error" in document:
        assert set(document["error"]) == {"code", "message", "hint", "exit_code"}
        assert document["error"]["exit_code"] == done.exit_code != 0
        assert document["error"]["code"] != "internal", document
    else:
        assert set(document) <= set(command.json_keys)
        assert done.exit_code in (0, 6)
    assert ESCAPE not in done.stdout + done.stderr


@pytest.mark.parametrize(("name", "command"), RUN)
def test_there_are_no_control_characters_where_there_is_no_terminal(name, command, checkpoint, tmp_path):
    extra = ["--once"] if name == "watch" else []
    words = [*arguments(name, command, checkpoint, tmp_path), *extra]
    done = CliRunner().invoke(program, words, prog_name="ucp", env={"FORCE_COLOR": "1", "TERM": "xterm-256color"})
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", done.stdout + done.stderr)


SLOW = """
import sys, time
import ucp.converter, ucp.mapping
def slowly(*args, **kwargs):
    print("begun", file=sys.stderr, flush=True)
    time.sleep(60)
ucp.converter.find_converter = slowly
ucp.mapping.read_source = slowly
from ucp.cli import main
main()
"""


@pytest.mark.parametrize("name", ["info", "ls", "verify", "plan", "convert"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_a_command_in_order(name, number, checkpoint, tmp_path):
    command = dict(commands())[name]
    words = [*arguments(name, command, checkpoint, tmp_path), "--json"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "begun\n"
    process.send_signal(number)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert json.loads(out)["error"]["code"] == "interrupted"
    assert "Traceback" not in errors


def test_progress_is_on_standard_error_and_a_terminal_there_changes_nothing_on_standard_output(checkpoint, tmp_path):
    leader, follower = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "ucp", "convert", checkpoint, str(tmp_path / "out"), "--json"],
        stdout=subprocess.PIPE,
        stderr=follower,
        text=True,
        check=False,
        env={**os.environ, "TERM": "xterm-256color"},
    )
    os.close(follower)
    os.close(leader)
    assert done.returncode == 0
    assert ESCAPE not in done.stdout
    assert json.loads(done.stdout)["objects"] >= 1
