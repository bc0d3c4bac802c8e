"""``ucp state``: the training state that is no tensor of the model, as a tree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from ucp.cli.command import Reading, reading_options
from ucp.cli.command import command as declare
from ucp.cli.describe import leaf_text
from ucp.cli.output import Output
from ucp.errors import NotFoundError
from ucp.tree import Opaque, TensorLeaf, Tree, children

KEYS = {
    "url": "where the checkpoint lies",
    "path": "the path that was asked for, empty for all",
    "state": "the tree. JSON values stand for themselves; every other node is an object with `$type`: `tuple`, `set` "
    "and `frozenset` (`items`), `bytes` (`length`), `complex` (`text`), `tensor` and `array` (`dtype`, `shape`, "
    "`object`, `offset`), `dict` with keys that are no text (`pairs`), or `object` (`class`, `parts`)",
}
_LONGEST = 60


@declare("state", json_keys=KEYS)
@click.argument("url")
@click.argument("path", default="")
@click.option("--depth", type=click.IntRange(min=1), help="Levels to show; all by default.")
@reading_options
def command(out: Output, url: str, path: str, depth: int | None, reading: Reading) -> None:
    """Show the training state that is not in tensors.

    Schedulers, loss scale, random states, client state. PATH picks a part, such as 'lr_scheduler.last_epoch'. Objects
    are shown by the name of their class and are never built. Reads metadata only.
    """
    catalog, _ = reading.catalog(url)
    node = find(dict(catalog.state), path)
    if out.mode == "json":
        out.json({"url": catalog.url, "path": path, "state": encode(node)})
        return
    for line in draw(path or "state", node, depth or 100):
        out.line(*line)


def find(root: Tree, path: str) -> Tree:
    """The node at a dotted path; keys may contain dots. NotFoundError with what is there instead."""
    node, rest, seen = root, path, ""
    while rest:
        found = [(name, child) for name, child in children(node) if rest == name or rest.startswith(f"{name}.")]
        if not found:
            there = " ".join(name for name, _ in children(node))[:200]
            raise NotFoundError(
                f"no {rest!r} in {seen or 'the training state'}", hint=f"there is: {there or 'nothing'}"
            )
        name, node = max(found, key=lambda pair: len(pair[0]))
        rest, seen = rest[len(name) + 1 :], f"{seen}.{name}" if seen else name
    return node


def draw(name: str, node: Tree, depth: int, indent: str = "") -> Iterator[tuple[str | tuple[str, str], ...]]:
    """Lines of a tree; lists of plain values stay on one line."""
    parts = [] if _is_row(node) else list(children(node))
    yield (indent, name, "  ", (_label(node), "dim"))
    if not depth:
        return
    for key, child in parts:
        yield from draw(key, child, depth - 1, indent + "  ")


def _label(node: Tree) -> str:
    if isinstance(node, Opaque):
        return f"<{node.path}>"
    if isinstance(node, dict) or (isinstance(node, list | tuple | set | frozenset) and not _is_row(node)):
        return f"{type(node).__name__} of {len(node)}"
    shown = repr(node) if isinstance(node, list | tuple | set | frozenset | str) else leaf_text(node)
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 1]}…"


def _is_row(node: Tree) -> bool:
    plain = bool | int | float | complex | str | bytes | None
    return isinstance(node, list | tuple | set | frozenset) and all(isinstance(item, plain) for item in node)


def encode(node: Tree) -> Any:
    """A tree as JSON; what JSON lacks becomes an object with ``$type``."""
    if node is None or isinstance(node, bool | int | float | str):
        return node
    if isinstance(node, list):
        return [encode(item) for item in node]
    if isinstance(node, dict):
        return _dict(node)
    if isinstance(node, tuple | set | frozenset):
        return {"$type": type(node).__name__, "items": [encode(item) for item in node]}
    if isinstance(node, bytes):
        return {"$type": "bytes", "length": len(node)}
    if isinstance(node, TensorLeaf):
        kind, extent = "array" if node.numpy else "tensor", node.extent
        place = {"dtype": extent.dtype, "shape": list(extent.shape), "object": extent.object, "offset": extent.offset}
        return {"$type": kind, **place}
    if isinstance(node, Opaque):
        return {"$type": "object", "class": node.path, "parts": [encode(child) for _, child in children(node)]}
    return {"$type": type(node).__name__, "text": str(node)}


def _dict(node: dict[Any, Tree]) -> Any:
    if all(isinstance(key, str) and not key.startswith("$") for key in node):
        return {key: encode(value) for key, value in node.items()}
    return {"$type": "dict", "pairs": [[encode(key), encode(value)] for key, value in node.items()]}
