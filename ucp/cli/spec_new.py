"""``ucp spec new``: a first program for a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ucp.cli.command import Reading, family_options
from ucp.cli.command import command as declare
from ucp.cli.output import Output
from ucp.cli.spec_options import parse_sizes
from ucp.cli.text import plural
from ucp.errors import UsageError

if TYPE_CHECKING:
    from ucp.cli.spec_source import Source
    from ucp.lang.draft import Draft

SAMPLE_BYTES = 1 << 16

KEYS = {
    "url": "where the checkpoint lies",
    "text": "the program",
    "file": "the file that it was written to, or null",
    "undecided": "list of what has to be decided by hand, each with the name it is about",
    "fits": "list of programs that come with ucp and take this checkpoint, with options that they ask for",
    "problem": "why the draft does not fit the checkpoint yet, or null",
}


@declare("new", json_keys=KEYS)
@click.argument("checkpoint")
@click.option("--out", "path", metavar="FILE", help="Write the program to this new file instead of printing it.")
@click.option("--size", multiple=True, metavar="NAME=N", help="Length of a whole dim, such as ffn=11008; helps to tell "
              "pieces from replicas; may be repeated.")  # fmt: skip
@click.option("--no-data", is_flag=True, help="Read metadata only; replicas and pieces are then told apart by --size.")
@family_options
def command(
    out: Output, checkpoint: str, path: str | None, size: tuple[str, ...], no_data: bool, reading: Reading
) -> None:
    """Draft a program from CHECKPOINT.

    It comes from names, shapes and the first and last 64 KiB of shards: numbers in names are collapsed, equal layouts
    grouped, and dims named by their sizes. What these do not tell is marked `# undecided` in the program: edit it, then
    prove it with `ucp spec check`.
    """
    from ucp.cli.spec_source import read_source
    from ucp.lang.draft import draft
    from ucp.layout import Mesh

    if path is not None and Path(path).exists():
        raise UsageError(f"{path} exists", hint="name a new file, or remove it first")
    source = read_source(checkpoint, reading, Mesh({}))
    sizes = {**source.sharded.config, **parse_sizes(size)}
    found = draft(source.held, source.sharded.mesh, same=None if no_data else comparison(source), sizes=sizes)
    if path is not None:
        with Path(path).open("x", encoding="utf-8") as file:
            file.write(found.text)
    _report(out, source, found, path)


def _report(out: Output, source: Source, found: Draft, path: str | None) -> None:
    if out.mode == "json":
        out.json(
            {
                "url": source.url,
                "text": found.text,
                "file": path,
                "undecided": list(found.notes),
                "fits": list(found.fits),
                "problem": found.problem,
            }
        )
        return
    if path is None:
        for line in found.text.splitlines():
            out.line(line)
    count = len(found.notes)
    left = f"{plural(count, 'question')} left open, marked `undecided`" if count else "nothing left open"
    out.remark(path or "draft", ": ", left)
    if found.problem:
        out.remark(("it does not fit yet: ", "yellow"), found.problem)
    for name in found.fits:
        out.hint(f"a program that comes with ucp fits already: {name}")
    if path is not None:
        out.hint(f"`ucp spec check {path} {source.url}` proves it once it is edited")


def comparison(source: Source) -> Callable[[int, int], bool | None]:
    """Compares the first and last bytes of two shards; None where both hold one value over and over."""
    kept: dict[int, tuple[bytes, bool]] = {}

    def sample(number: int) -> tuple[bytes, bool]:
        if number not in kept:
            kept[number] = _sample(source, number)
        return kept[number]

    def same(first: int, second: int) -> bool | None:
        (one, flat), (two, _) = sample(first), sample(second)
        return None if one == two and flat else one == two

    return same


def _sample(source: Source, number: int) -> tuple[bytes, bool]:
    """Bytes from both ends of a shard's value, and whether they are one value over and over."""
    from ucp.layout import FlatRange
    from ucp.run.gather import read_region

    shard = source.held[number]
    cover = source.sharded.parts[source.origin[number]][1].cover(shard.name, shard.state)
    size, width = cover.spec.size, max(1, cover.spec.nbytes // max(1, cover.spec.size))
    some = max(1, SAMPLE_BYTES // width)
    regions = [FlatRange(0, min(size, some)), FlatRange(max(0, size - some), size)] if size else []
    data = b"".join(read_region(source.store, cover, region).tobytes() for region in regions)
    return data, data == data[:width] * (len(data) // width)
