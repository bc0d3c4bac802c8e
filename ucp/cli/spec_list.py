"""``ucp spec list``: the programs that come with ucp."""

from __future__ import annotations

from typing import Any

from ucp.cli.command import command as declare
from ucp.cli.output import Output

KEYS = {"programs": "list of the programs that come with ucp: `name`, `about` (its first comment)"}


@declare("list", json_keys=KEYS)
def command(out: Output) -> None:
    """List the programs that come with ucp.

    Any of them may be named where a PROGRAM is asked for.
    """
    from ucp.lang import shipped

    found = [{"name": name, "about": about(file.read_text(encoding="utf-8"))} for name, file in shipped().items()]
    if out.mode == "json":
        out.json({"programs": found})
        return
    width = max((len(row["name"]) for row in found), default=0)
    for row in found:
        spans: list[Any] = [(row["name"].ljust(width), "bold"), "  ", row["about"]]
        out.line(*(spans if out.human else [row["name"]]))


def about(text: str) -> str:
    """The first sentence of the comment that a program begins with."""
    lines = []
    for line in text.splitlines():
        if line.startswith("#"):
            lines.append(line.lstrip("# ").rstrip())
        elif lines or (line.strip() and not line.startswith("format")):
            break
    sentence, _, _ = " ".join(lines).partition(". ")
    return sentence.rstrip(".:")
