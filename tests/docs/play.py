"""Runs the blocks of a page in order, in one folder and with one set of Python variables, and compares their output.

``python -m tests.docs.play PAGE FOLDER`` does so with real DeepSpeed, in a job of one rank; FOLDER holds what
``ucp demo --keep demo`` made.

In a ``python`` block, lines of the form ``#> text`` are what it prints. A ``ucp`` block is a sound conversion
program. What begins with ``# file: name`` is written to that file. In a ``console`` block, ``$ ucp …`` is run as far
as the first pipe, with everything up to the next ``$`` as its output; ``$ echo $?`` shows an exit code other than 0.
``...`` stands for any text, and ``/data`` for the folder. A ``toml`` block with entry points registers converters.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import shlex
import socket
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from click.testing import CliRunner

import ucp.converter
from tests.docs.pages import NEEDS_DEEPSPEED, NOT_RUN, REAL_OUTPUT, Block, blocks
from ucp.cli.app import program
from ucp.lang import parse
from ucp.lang.check import check

ROOT = "/data"
_GROUP = "ucp.converters"
_LOOSELY = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Player:
    """Runs blocks inside `folder`; with `real`, those that need DeepSpeed too, and all outputs count."""

    def __init__(self, folder: Path, *, real: bool) -> None:
        self.folder, self.real = folder, real
        self.variables: dict[str, Any] = {"__name__": "__main__"}
        self.entries = {entry.name: entry for entry in entry_points(group=_GROUP)}

    def play(self, block: Block) -> None:
        """Run one block; AssertionError if it does not print what the page says."""
        if block.language == "python":
            self._python(block)
        elif block.mark != NOT_RUN and block.language == "ucp":
            self._program(block)
        elif block.mark != NOT_RUN and block.language == "console":
            self._console(block)
        elif block.language == "toml":
            found = tomllib.loads(block.text).get("project", {}).get("entry-points", {}).get(_GROUP, {})
            self.entries.update((name, EntryPoint(name, value, _GROUP)) for name, value in found.items())

    def _program(self, block: Block) -> None:
        check(parse(block.text, file=block.where))
        if (name := _file(block)) is not None:
            name.write_text(block.text)

    def _python(self, block: Block) -> None:
        # Blank lines in front make tracebacks tell the line of the page.
        code = compile("\n" * (block.line - 1) + block.text, block.page, "exec", dont_inherit=True)
        if block.mark == NOT_RUN or (block.mark == NEEDS_DEEPSPEED and not self.real):
            return
        if (name := _file(block)) is not None:
            name.write_text(block.text)
            return
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, self.variables)  # noqa: S102 - the documentation is ours
        lines = (line.strip() for line in block.text.splitlines())
        wanted = [line[2:].removeprefix(" ") for line in lines if line.startswith("#>")]
        got = printed.getvalue()
        if block.mark == NEEDS_DEEPSPEED:
            # DeepSpeed has words of its own, though not in every block.
            wanted.insert(0, "...")
            got = f"words\n{got}"
        self._compare(block, "\n".join(wanted), got)

    def _console(self, block: Block) -> None:
        code = 0
        for command, output in _commands(block.text):
            if command == "echo $?":
                assert output.strip() == str(code), f"{block.where}: the exit code is {code}"
                code = 0
                continue
            assert code == 0, f"{block.where}: exit code {code} before {command!r}"
            words = shlex.split(command.partition("|")[0])
            if words[0] == "ucp":
                done = CliRunner().invoke(program, words[1:], prog_name="ucp")
                code = done.exit_code
                self._compare(block, output if "|" not in command else "...", done.output)
        assert code == 0, f"{block.where}: exit code {code}"

    def _compare(self, block: Block, wanted: str, got: str) -> None:
        if block.mark == REAL_OUTPUT and not self.real:
            return
        wanted, got = (f"{text.strip()}\n" for text in (wanted, got.replace(str(self.folder), ROOT)))
        same = doctest.OutputChecker().check_output(wanted, got, _LOOSELY)
        assert same, f"{block.where}\n--- the page says\n{wanted}--- it is\n{got}"


def _file(block: Block) -> Path | None:
    """Where the block is to be written, if it says so in its first line."""
    first = block.text.partition("\n")[0]
    return Path(first.removeprefix("# file: ")) if first.startswith("# file: ") else None


def _commands(text: str) -> Iterator[tuple[str, str]]:
    """Each command of a console block with its output; a command goes on after a backslash."""
    for part in f"\n{text}".split("\n$ ")[1:]:
        command, _, output = part.replace("\\\n", " ").partition("\n")
        yield command.strip(), output


def play(page: Path, folder: Path, *, real: bool = False) -> int:
    """Run the blocks of `page` inside `folder`; gives their number."""
    found = blocks(page)
    player = Player(folder, real=real)
    with _inside(folder), mock.patch.object(ucp.converter, "_entries", return_value=player.entries):
        for block in found:
            player.play(block)
    return len(found)


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Work and import inside `folder`, as the only rank of a job; leave no trace of it."""
    before = set(sys.modules)
    port = _free_port()
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with (
        contextlib.chdir(folder),
        mock.patch.dict(os.environ, rank),
        mock.patch.object(sys, "path", [str(folder), *sys.path]),
    ):
        try:
            yield
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            for name in set(sys.modules) - before:
                if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
                    del sys.modules[name]


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


if __name__ == "__main__":
    play(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), real=True)
