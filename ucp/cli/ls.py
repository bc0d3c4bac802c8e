"""``ucp ls``: the tensors of a checkpoint, one per line."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import click

from ucp.catalog import Catalog
from ucp.cli import text
from ucp.cli.command import Reading, reading_options
from ucp.cli.command import command as declare
from ucp.cli.describe import objects_of, tensor_row
from ucp.cli.output import Output
from ucp.errors import NotFoundError
from ucp.plan import Key

KEYS = {
    "url": "where the checkpoint lies",
    "tensors": "list of tensors: `name`, `kind` (`parameter`, `frozen`, `buffer`), `shape`, `dtype`, `bytes`, and "
    "`states`: for each state its `dtype`, `shape` and `bytes`",
    "ties": "object: alias to the name that holds the data, for the aliases that match",
}


@declare("ls", json_keys=KEYS)
@click.argument("url")
@click.argument("glob", default="*")
@click.option("--state", help="Only tensors with this state, such as exp_avg; shows that state.")
@click.option("--sort", type=click.Choice(["name", "size"]), default="name", help="Order; size is largest first.")
@click.option("-l", "--long", is_flag=True, help="One line per state, with its fragments and objects.")
@reading_options
def command(out: Output, url: str, glob: str, state: str | None, sort: str, long: bool, reading: Reading) -> None:
    """List tensors: name, kind, shape, dtype, states, bytes.

    GLOB picks names, such as '*.attn.*' (quote it); `*` matches dots too. Reads metadata only.
    """
    catalog, _ = reading.catalog(url)
    rows = _select(catalog, glob, state)
    ties = {alias: name for alias, name in catalog.ties.items() if fnmatchcase(alias, glob) and state is None}
    if not rows and not ties:
        what = f"matches {glob!r}" + (f" and has state {state!r}" if state else "")
        raise NotFoundError(f"{catalog.url}: no tensor {what}", hint=f"`ucp ls {url}` lists all")
    rows.sort(key=(lambda row: -row["bytes"]) if sort == "size" else (lambda row: text.natural(row["name"])))
    if out.mode == "json":
        out.json({"url": catalog.url, "tensors": rows, "ties": ties})
    elif out.mode == "quiet":
        for row in rows:
            out.line(row["name"])
    elif long:
        out.table(_LONG, list(_long(catalog, rows)), right=_LONG[-3:])
    else:
        _print(out, rows, ties)


_LONG = ("NAME", "STATE", "SHAPE", "DTYPE", "FRAGMENTS", "OBJECTS", "BYTES")


def _select(catalog: Catalog, glob: str, state: str | None) -> list[dict[str, Any]]:
    rows = [tensor_row(catalog, name) for name in catalog.tensors if fnmatchcase(name, glob)]
    return rows if state is None else [_only(row, state) for row in rows if state in row["states"]]


def _only(row: dict[str, Any], state: str) -> dict[str, Any]:
    """The row of a tensor as if it had that state alone."""
    return {**row, **row["states"][state], "states": {state: row["states"][state]}}


def _long(catalog: Catalog, rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    for row in rows:
        for state, spec in row["states"].items():
            key = Key(row["name"], state)
            fragments, objects = len(catalog.fragments[key]), len(objects_of(catalog, key))
            where = [str(fragments), str(objects), text.size(spec["bytes"])]
            yield [row["name"], state, text.shape(spec["shape"]), spec["dtype"], *where]


def _print(out: Output, rows: list[dict[str, Any]], ties: dict[str, str]) -> None:
    cells = [
        [r["name"], r["kind"], text.shape(r["shape"]), r["dtype"], " ".join(r["states"]), text.size(r["bytes"])]
        for r in rows
    ]
    cells += [[alias, f"= {name}", "", "", "", ""] for alias, name in ties.items()]
    out.table(["NAME", "KIND", "SHAPE", "DTYPE", "STATES", "BYTES"], cells, right=("BYTES",))
    total = sum(row["bytes"] for row in rows)
    out.remark((f"{text.plural(len(rows), 'tensor')}, {text.size(total)}", "dim"))
