"""Everything a command prints: data on standard output, all else on standard error."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TextIO

import click

from ucp.cli.text import printable

Mode = Literal["human", "json", "quiet"]
Span = str | tuple[str, str]
"""Text, or (text, style) where a style is ``bold``, ``dim`` or a colour's name."""

_ASCII = str.maketrans({"├": "|", "└": "`", "─": "-", "│": "|", "…": "...", "×": "x", "→": "->", "·": "-", "–": "-"})


@dataclass(slots=True)
class Output:
    """Where a command's words go.

    In ``json`` mode standard output carries exactly one JSON document; in ``quiet`` mode only errors and bare answers
    are printed.
    """

    mode: Mode = "human"
    verbose: bool = False
    progress: bool = True

    @classmethod
    def before_parsing(cls, arguments: Sequence[str]) -> Output:
        """The output for an error in the options themselves, before they could be parsed."""
        wants_json = "--json" in arguments or os.environ.get("UCP_JSON", "").lower() in ("1", "true", "yes", "on")
        return cls("json" if wants_json else "human")

    @property
    def human(self) -> bool:
        """Whether tables and sentences are wanted."""
        return self.mode == "human"

    def json(self, document: Mapping[str, Any]) -> None:
        """Print the command's one JSON document."""
        _write(sys.stdout, json.dumps(jsonable(document), indent=2))

    def json_line(self, document: Mapping[str, Any]) -> None:
        """Print one of many JSON documents, on a line of its own, at once."""
        _write(sys.stdout, json.dumps(jsonable(document)))
        sys.stdout.flush()

    def line(self, *spans: Span) -> None:
        """One line of data."""
        _write(sys.stdout, _render(spans, colour=_has_colour(sys.stdout)))

    def fields(self, pairs: Sequence[tuple[str, Span]]) -> None:
        """Labels and values, values aligned."""
        width = max((len(label) for label, _ in pairs), default=0)
        for label, value in pairs:
            self.line((label.ljust(width), "dim"), "  ", value)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
        """Aligned columns; `right` names the columns whose cells are numbers."""
        cells = [[printable(cell) for cell in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
        numbers = [name in right for name in header]
        self.line((_aligned(header, widths, numbers), "dim"))
        for row in cells:
            self.line(_aligned(row, widths, numbers))

    def remark(self, *spans: Span) -> None:
        """A sentence for people, on standard error."""
        if self.human:
            _write(sys.stderr, _render(spans, colour=_has_colour(sys.stderr)))

    def complain(self, *spans: Span) -> None:
        """What went wrong and does not end the command, on standard error, unless all is told in JSON."""
        if self.mode != "json":
            _write(sys.stderr, _render(spans, colour=_has_colour(sys.stderr)))

    def hint(self, text: str) -> None:
        """What to do next, on standard error."""
        self.remark(("hint: ", "cyan"), text)

    def trace(self, text: str) -> None:
        """The trace of an exception, on standard error in every mode: its message may hold names from files."""
        _write(sys.stderr, printable(text.rstrip(), keep="\n"))

    def error(self, *, code: str, message: str, hint: str | None, exit_code: int) -> None:
        """An error: on standard error, or as the JSON document."""
        if self.mode == "json":
            self.json({"error": {"code": code, "message": message, "hint": hint, "exit_code": exit_code}})
            return
        colour = _has_colour(sys.stderr)
        marked = code == "program" and ": error[" in message  # it tells the place and its kind first, as compilers do
        lead: list[Span] = [] if marked else [(f"error[{code}]: ", "red")]
        _write(sys.stderr, _render([*lead, message], colour=colour, keep="\n"))
        if hint:
            _write(sys.stderr, ("" if marked else "\n") + _render([("hint: ", "cyan"), hint], colour=colour, keep="\n"))


def jsonable(value: Any) -> Any:
    """`value` with tuples as lists, and with the numbers that JSON lacks as ``nan``, ``inf`` and ``-inf``."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(item) for item in value]
    return value


def _aligned(row: Sequence[str], widths: Sequence[int], numbers: Sequence[bool]) -> str:
    cells = zip(row, widths, numbers, strict=True)
    return "  ".join(cell.rjust(width) if number else cell.ljust(width) for cell, width, number in cells).rstrip()


def _render(spans: Sequence[Span], *, colour: bool, keep: str = "") -> str:
    parts = [(span, "") if isinstance(span, str) else span for span in spans]
    return "".join(_styled(printable(text, keep=keep), style if colour else "") for text, style in parts)


def _styled(text: str, style: str) -> str:
    if not style:
        return text
    return click.style(text, **({style: True} if style in ("bold", "dim") else {"fg": style}))


def _has_colour(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _write(stream: TextIO, text: str) -> None:
    """Print, spelling what the stream cannot encode in ASCII."""
    encoding = stream.encoding or "utf-8"
    try:
        text.encode(encoding, stream.errors or "strict")
    except UnicodeEncodeError:
        text = text.translate(_ASCII).encode(encoding, "backslashreplace").decode(encoding)
    if stream is sys.stderr:
        sys.stdout.flush()
    stream.write(text + "\n")
    if stream is sys.stderr:
        stream.flush()
