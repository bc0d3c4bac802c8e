"""Streams, modes, colours, encodings and exit codes, mostly seen from outside the process."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys

import pytest

from tests.cli import shards
from tests.cli.conftest import REPOSITORY, arrays, environment
from ucp import errors
from ucp.cli import failure
from ucp.cli.output import Output, jsonable
from ucp.cli.text import amount, duration, natural, printable, size


def test_data_on_stdout_and_words_on_stderr(process, checkpoint) -> None:
    done = process("ls", checkpoint)
    assert done.returncode == 0
    assert done.stdout.splitlines()[0].split() == ["NAME", "KIND", "SHAPE", "DTYPE", "STATES", "BYTES"]
    assert done.stderr == "5 tensors, 1.1 kB\n"
    assert "\x1b" not in done.stdout + done.stderr


def test_not_found(process, tmp_path) -> None:
    done = process("info", tmp_path / "nowhere")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == f"error[not-found]: {tmp_path / 'nowhere'}: no such folder, or it is empty\n"


def test_a_folder_that_is_no_checkpoint(process, tmp_path) -> None:
    (tmp_path / "file").write_text("text")
    done = process("info", tmp_path)
    assert done.returncode == 3
    first, empty, hint = done.stderr.splitlines()
    assert first.startswith("error[not-found]: ")
    assert empty == ""
    assert hint.startswith("hint: known: ")
    assert " shards " in hint


def test_errors_in_json(process, tmp_path) -> None:
    done = process("info", tmp_path / "nowhere", "--json")
    assert (done.returncode, done.stderr) == (3, "")
    error = json.loads(done.stdout)["error"]
    assert set(error) == {"code", "message", "hint", "exit_code"}
    assert (error["code"], error["exit_code"]) == ("not-found", 3)


def test_without_a_command_there_is_help(process) -> None:
    done = process()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: ucp ")


@pytest.mark.parametrize("arguments", [["nonsense"], ["info"], ["info", "a", "b"], ["ls", "x", "--sort", "colour"]])
def test_usage_errors(process, arguments) -> None:
    done = process(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error[usage]: ")
    assert "hint: `ucp" in done.stderr
    in_json = process(*arguments, "--json")
    assert in_json.returncode == 2
    assert json.loads(in_json.stdout)["error"]["code"] == "usage"


def test_damaged_metadata(process, checkpoint) -> None:
    (checkpoint / "index.json").write_text("{")
    done = process("info", checkpoint)
    assert done.returncode == 6
    assert done.stderr.startswith("error[corrupt]: ")


def test_a_bug_is_called_one(process, invoke, checkpoint, monkeypatch) -> None:
    (checkpoint / "index.json").write_text("{}")  # the test family trips over this with a KeyError
    done = process("info", checkpoint)
    assert done.returncode == 1
    assert done.stderr.startswith("error[internal]: KeyError: ")
    assert "this is a bug" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in process("info", checkpoint, "-v").stderr


def test_every_option_has_an_environment_variable(process, checkpoint) -> None:
    assert json.loads(process("info", checkpoint, UCP_JSON="1").stdout)["family"] == "shards"
    assert json.loads(process("nonsense", UCP_JSON="true").stdout)["error"]["exit_code"] == 2
    assert process("ls", checkpoint, UCP_QUIET="1").stdout.split()[0] == "embed.weight"
    assert process("ls", checkpoint, UCP_QUIET="1", UCP_LS_SORT="size").stdout.split()[-1] == "norm.running"
    assert process("info", checkpoint, UCP_INFO_FAMILY="nonsense").returncode == 2


def test_ascii_where_stdout_cannot_encode_more(process, checkpoint, tmp_path) -> None:
    done = process("tree", checkpoint, PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "|-- embed" in done.stdout
    assert "`-- norm" in done.stdout
    there = shards.write(tmp_path / "names", {"größe": arrays()["layers.9.bias"]})
    assert process("ls", there, "-q", PYTHONIOENCODING="ascii").stdout == "gr\\xf6\\xdfe\n"
    assert process("ls", there, "-q", PYTHONIOENCODING="utf-8").stdout == "größe\n"


def test_names_cannot_command_the_terminal(process, tmp_path) -> None:
    there = shards.write(tmp_path / "evil", {"a\x1b[2J\u202eb": arrays()["layers.9.bias"]})
    for command in (["ls"], ["tree"], ["info"], ["show"], ["verify", "--deep"]):
        name = ["a\x1b[2J\u202eb"] if command == ["show"] else []
        done = process(command[0], there, *name, *command[1:])
        assert done.returncode == 0
        assert not set("\x1b\u202e") & set(done.stdout + done.stderr)
    assert json.loads(process("ls", there, "--json").stdout)["tensors"][0]["name"] == "a\x1b[2J\u202eb"


def test_a_closed_pipe_is_no_error(tmp_path) -> None:
    there = shards.write(tmp_path / "many", {f"tensor.{i}": arrays()["norm.running"] for i in range(3000)})
    with subprocess.Popen(
        [sys.executable, "-m", "tests.cli.shards", "ls", str(there)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        cwd=REPOSITORY,
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.readline()
        running.stdout.close()
        assert running.stderr.read() == b""
        assert running.wait(timeout=120) == 141


def on_terminal(*arguments: object, **variables: str) -> tuple[int, str]:
    """Exit code and everything printed, on a terminal of 100 columns."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "tests.cli.slow", *map(str, arguments)]
    variables = {"TERM": "xterm", "COLUMNS": "100", **variables}
    with subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=environment(**variables), cwd=REPOSITORY
    ) as running:
        os.close(slave)
        parts = []
        while True:
            try:
                part = os.read(master, 65536)
            except OSError:  # what Linux says when the last writer has closed
                break
            if not part:
                break
            parts.append(part)
        os.close(master)
    return running.returncode, b"".join(parts).decode()


def test_a_terminal_gets_colours_and_a_bar(checkpoint, tmp_path) -> None:
    code, text = on_terminal("convert", checkpoint, tmp_path / "new", "--to", "shards", "--workers", "1")
    assert code == 0
    assert "\x1b[" in text
    assert re.search(r"converting.*\d+ B/1\.1 kB .*\d+%.*/s.*eta", text, re.DOTALL)
    assert "hint: " in re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_no_colour_and_no_bar_when_asked(checkpoint, tmp_path) -> None:
    arguments = ("convert", checkpoint, tmp_path / "new", "--to", "shards", "--no-progress")
    code, text = on_terminal(*arguments, NO_COLOR="1")
    assert code == 0
    assert "\x1b" not in text
    assert "converting" not in text


def test_off_a_terminal_there_is_a_line_now_and_then(process, checkpoint, tmp_path, monkeypatch, capsys) -> None:
    from ucp.cli import progress
    from ucp.run.progress import Progress

    clock = iter([0.0, 4.0, 11.0, 11.0, 15.0, 22.0, 22.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.shown(Output(), "converting") as show:
        for done in (1, 2, 3, 4):
            show(Progress(done * 10**9, 8 * 10**9, 0, 1, float(done), 0))
    assert capsys.readouterr().err.splitlines() == [
        "converting  2.0 GB/8.0 GB   25%  1.0 GB/s  eta 6.0 s",
        "converting  4.0 GB/8.0 GB   50%  1.0 GB/s  eta 4.0 s",
    ]


def test_progress_counts_only_what_this_run_did() -> None:
    from ucp.cli.progress import describe
    from ucp.run.progress import Progress

    assert describe(Progress(6 * 10**9, 8 * 10**9, 0, 1, 2.0, 4 * 10**9)).endswith("75%  1.0 GB/s  eta 2.0 s")
    assert describe(Progress(0, 0, 0, 0, 0.0, 0)) == "0 B/0 B  100%"


def test_every_error_class_has_its_exit_code_and_code(capsys) -> None:
    classes = [getattr(errors, name) for name in errors.__all__]
    for kind in classes:
        assert failure.report(kind("what", hint="do"), Output()) == kind.exit_code
        assert capsys.readouterr().err == f"error[{kind.code}]: what\n\nhint: do\n"
    assert failure.report(KeyboardInterrupt(), Output()) == 130


def test_version_and_launchers() -> None:
    for launcher in (["-m", "ucp"], ["cli.py"]):
        done = subprocess.run(
            [sys.executable, *launcher, "--version"],
            capture_output=True, text=True, cwd=REPOSITORY, env=environment(), check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert re.fullmatch(r"ucp \d+\.\d+.*\n", done.stdout)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(process, shell) -> None:
    done = process("completion", shell)
    assert done.returncode == 0
    assert "_UCP_COMPLETE" in done.stdout


def test_completion_completes() -> None:
    variables = {"_UCP_COMPLETE": "bash_complete", "COMP_WORDS": "ucp in", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "ucp"],
        capture_output=True,
        text=True,
        env=environment(**variables),
        cwd=REPOSITORY,
        check=False,
    )
    assert done.stdout == "plain,info\n"


def test_words_for_numbers() -> None:
    assert [size(n) for n in (0, 999, 1000, 999_950, 653_800_000_000, 10**19)] == [
        "0 B", "999 B", "1.0 kB", "1.0 MB", "653.8 GB", "10000.0 PB"
    ]  # fmt: skip
    assert [amount(n) for n in (12_345, 46_700_000_000)] == ["12,345", "46.7 B"]
    assert [duration(s) for s in (4.21, 158, 3900)] == ["4.2 s", "2m38s", "1h05m"]
    assert sorted(["l.10", "l.9", "l"], key=natural) == ["l", "l.9", "l.10"]
    assert printable("a\x00\x9b\nb") == "a\\x00\\x9b\\nb"
    assert printable("a\nb\tc", keep="\n") == "a\nb\\tc"
    assert jsonable({"a": (float("nan"), float("-inf"), 1.5)}) == {"a": ["nan", "-inf", 1.5]}
