"""``ucp spec fmt``: programs in their one form."""

from __future__ import annotations

import difflib
import os
import sys
import tempfile
from pathlib import Path

import click

from ucp.cli.command import command as declare
from ucp.cli.output import Output
from ucp.errors import ContentError, NotFoundError, UsageError

STDIN = "-"

KEYS = {
    "files": "list: `file`, `changed` (whether its form is another one)",
    "written": "whether the files were rewritten",
}


@declare("fmt", json_keys=KEYS)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--check", is_flag=True, help="Write nothing; exit code 6 if a file would change.")
@click.option("--diff", is_flag=True, help="Write nothing; show what would change.")
def command(out: Output, files: tuple[str, ...], check: bool, diff: bool) -> None:
    """Format program files in place.

    There is one form: comments stay, columns are aligned, and what it means does not change. The file `-` is standard
    input, and goes to standard output. Nothing is written unless every file is a program.
    """
    if STDIN in files and len(files) > 1:
        raise UsageError("`-` stands for standard input, and alone", hint="format the files in a command of their own")
    texts = {name: _read(name) for name in files}
    formed = {name: _formatted(text, name) for name, text in texts.items()}
    changed = [name for name in texts if texts[name] != formed[name]]
    write = not (check or diff)
    if write:
        for name in changed:
            if name != STDIN:
                _replace(Path(name), formed[name])
    _report(out, texts, formed, changed, write=write, diff=diff)
    if check and changed:
        raise ContentError(f"not formatted: {' '.join(changed)}", hint=f"`ucp spec fmt {' '.join(changed)}` does it")


def _report(
    out: Output, texts: dict[str, str], formed: dict[str, str], changed: list[str], *, write: bool, diff: bool
) -> None:
    if out.mode == "json":
        if write or not changed or diff:
            out.json({"files": [{"file": name, "changed": name in changed} for name in texts], "written": write})
        return
    for name in changed if diff else ():
        for line in difflib.unified_diff(texts[name].splitlines(), formed[name].splitlines(), name, name, lineterm=""):
            out.line((line, "green" if line.startswith("+") else "red" if line.startswith("-") else ""))
    if write and STDIN in texts:
        sys.stdout.write(formed[STDIN])
    elif write:
        for name in changed:
            out.remark("formatted ", name)


def _read(name: str) -> str:
    try:
        data = sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes()
        return data.decode("utf-8")
    except FileNotFoundError:
        raise NotFoundError(f"{name}: no such file") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise UsageError(f"{name}: no text file") from None


def _formatted(text: str, name: str) -> str:
    from ucp.lang import format_program, parse

    return format_program(parse(text, file="<stdin>" if name == STDIN else name))


def _replace(path: Path, text: str) -> None:
    """Write the file whole or not at all, with the permissions it had."""
    target = path.resolve()
    handle, made = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        Path(made).chmod(target.stat().st_mode & 0o7777)
        Path(made).replace(target)
    except BaseException:
        Path(made).unlink(missing_ok=True)
        raise
