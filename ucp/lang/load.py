"""Programs from files, and those that are shipped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from ucp.errors import NotFoundError
from ucp.lang.ast import Program
from ucp.lang.error import nearest, program_error
from ucp.lang.json_read import from_json
from ucp.lang.parser import parse

_SUFFIXES = (".ucp", ".json")
_MOST_BYTES = 1 << 26
_PIECE_BYTES = 1 << 20


def load_program(name_or_path: str | Path) -> Program:
    """The program of a file, ``*.ucp`` (text) or ``*.json`` (its syntax tree), or one that is shipped, by its name.

    What ends in ``.ucp`` or ``.json`` is a path; anything else is the name of a shipped program: `shipped` lists them.
    NotFoundError if there is none, ProgramError if it is no valid program.
    """
    path = Path(name_or_path)
    if path.suffix in _SUFFIXES:
        if not path.is_file():
            raise NotFoundError(f"{name_or_path}: no such file", hint=_shipped_hint(path.stem))
        return _read(path, name=str(name_or_path))
    found = shipped().get(str(name_or_path))
    if found is None:
        hint = _shipped_hint(str(name_or_path))
        raise NotFoundError(f"no program is called {str(name_or_path)[:200]!r}", hint=hint)
    return _read(found, name=found.name)


def shipped() -> Mapping[str, Traversable]:
    """The programs that come with ucp, by name."""
    folder = files("ucp.converters") / "programs"
    if not folder.is_dir():
        return {}
    found = {item.name.removesuffix(".ucp"): item for item in folder.iterdir() if item.name.endswith(".ucp")}
    return dict(sorted(found.items()))


def _shipped_hint(name: str) -> str:
    return nearest(name, shipped()) or "a program is a file that ends in .ucp or .json"


def _read(source: Traversable, *, name: str) -> Program:
    data = b""
    with source.open("rb") as file:
        while chunk := file.read(_PIECE_BYTES):  # one read of the most that it may be would take that much memory
            data += chunk
            if len(data) > _MOST_BYTES:
                raise program_error(None, at=None, kind="limit", cause=f"longer than {_MOST_BYTES} bytes", file=name)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        cause = f"byte {data[error.start]:#04x} on line {line} is not UTF-8"
        raise program_error(None, at=None, kind="syntax", cause=cause, file=name) from None
    return from_json(_document(text, name), file=name) if name.endswith(".json") else parse(text, file=name)


def _document(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        cause = f"no JSON: {error}"
    except RecursionError:
        cause = "no JSON that can be read: too deep"
    raise program_error(None, at=None, kind="syntax", cause=cause, file=name)
