"""``ucp checkpoints``: which checkpoints lie under a prefix."""

from __future__ import annotations

from typing import Any

import click

from ucp.cli import text
from ucp.cli.command import command as declare
from ucp.cli.describe import incomplete
from ucp.cli.output import Output
from ucp.errors import NotFoundError, StorageError, UcpError

KEYS = {
    "url": "the prefix",
    "checkpoints": "list of the folders under it that are checkpoints, oldest first: `name`, `url`, `family`, `step` "
    "(or null), `bytes` of tensor data, `complete` (whether the metadata accounts for everything), `problem` (why not, "
    "or null), and `error`: null, or the error of reading it, as of a failed command",
    "others": "list of names of folders that are none, or none yet",
    "published": "what latest.json says, as that of `ucp watch`, or null",
}
_POINTER = "latest.json"


@declare("checkpoints", json_keys=KEYS)
@click.argument("prefix")
def command(out: Output, prefix: str) -> None:
    """List the checkpoints under a prefix: name, family, step, size.

    PREFIX is the folder of a run, or of results of `ucp watch`. Each folder in it that is a checkpoint is shown, sorted
    by name, with numbers as numbers. Reads metadata only. One that cannot be read is listed with its error.
    """
    from ucp.pipeline.pointer import Pointer
    from ucp.store import open_store

    store = open_store(prefix)
    names = sorted((name[:-1] for name in store.children() if _may_be(name)), key=text.natural)
    if not names:
        raise NotFoundError(f"{store.url}: no folder lies there")
    published, _ = Pointer(store, _POINTER).read()
    rows, others = [], []
    for name in names:
        row = _row(f"{prefix.rstrip('/')}/{name}", name)
        others.append(name) if row is None else rows.append(row)
    if out.mode == "json":
        latest = None if published is None else {"name": published.name, **published.about}
        out.json({"url": store.url, "checkpoints": rows, "others": others, "published": latest})
    elif out.mode == "quiet":
        for row in rows:
            out.line(row["name"])
    else:
        _print(out, rows, others, published.name if published else None)


def _may_be(name: str) -> bool:
    return name.endswith("/") and not name.startswith(".")


def _row(url: str, name: str) -> dict[str, Any] | None:
    """What is known of a folder; None if it is no checkpoint."""
    from ucp.converter import read_catalog

    facts: dict[str, Any] = {"name": name, "url": url, "family": None, "step": None, "bytes": None}
    try:
        catalog, _ = read_catalog(url)
    except NotFoundError:
        return None
    except StorageError:
        raise
    except UcpError as error:
        told = {"code": error.code, "message": error.message, "hint": error.hint, "exit_code": error.exit_code}
        return {**facts, "complete": False, "problem": error.message, "error": told}
    facts |= {"url": catalog.url, "family": catalog.source.family, "step": catalog.step, "bytes": catalog.nbytes}
    problem = incomplete(catalog)
    return {**facts, "complete": problem is None, "problem": problem, "error": None}


def _print(out: Output, rows: list[dict[str, Any]], others: list[str], published: str | None) -> None:
    header = ["NAME", "FAMILY", "STEP", "BYTES", ""]
    cells = []
    for row in rows:
        step = "" if row["step"] is None else f"{row['step']:,}"
        size = "" if row["bytes"] is None else text.size(row["bytes"])
        mark = "damaged" if row["error"] else "incomplete" if row["problem"] else ""
        mark = mark or ("published" if row["name"] == published else "")
        cells.append([row["name"], row["family"] or "", step, size, mark])
    out.table(header, cells, right=("STEP", "BYTES"))
    for row in rows:
        if row["problem"]:
            out.complain(("problem: ", "red"), row["problem"])
    if others:
        out.remark((f"no checkpoints: {' '.join(others)}", "dim"))
