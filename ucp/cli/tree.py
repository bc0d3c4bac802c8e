"""``ucp tree``: the tensors of a checkpoint by their dotted names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import click

from ucp.catalog import Catalog
from ucp.cli import text
from ucp.cli.command import Reading, reading_options
from ucp.cli.command import command as declare
from ucp.cli.describe import elements
from ucp.cli.output import Output

KEYS = {
    "url": "where the checkpoint lies",
    "tree": "the root node; a node has `name`, `tensors`, `parameters` (elements, buffers not counted), `bytes` (of "
    "all states) and, down to the depth asked for, `children`",
}


_DEEPEST = 100
"""Levels of a name; what is below stays one component."""


@dataclass(slots=True)
class Node:
    """A name component with what lies at or below it. `label` is set for a tensor."""

    name: str
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    label: str = ""
    children: dict[str, Node] = field(default_factory=dict)


@declare("tree", json_keys=KEYS)
@click.argument("url")
@click.option("--depth", type=click.IntRange(min=1), help="Levels to show; all by default.")
@reading_options
def command(out: Output, url: str, depth: int | None, reading: Reading) -> None:
    """Show tensors as a tree of their dotted names.

    With counts, and bytes of all states. Reads metadata only.
    """
    catalog, _ = reading.catalog(url)
    root = grow(catalog)
    limit = depth or 1_000_000
    if out.mode == "json":
        out.json({"url": catalog.url, "tree": _document(root, limit)})
        return
    out.line((root.name, "bold"), "  ", (_totals(root), "dim"))
    for branch, node in draw(root, limit):
        out.line((branch, "dim"), node.name, "  ", (_totals(node) if node.children else node.label, "dim"))


def grow(catalog: Catalog) -> Node:
    """The tree of all names of a catalog."""
    root = Node(catalog.url)
    for name, tensor in catalog.tensors.items():
        count = elements(tensor) if tensor.kind != "buffer" else 0
        node = root
        for node in (root, *_path(root, name)):
            node.tensors += 1
            node.parameters += count
            node.bytes += tensor.nbytes
        value = tensor.states.get("value") or next(iter(tensor.states.values()))
        node.label = f"{value.dtype} {text.shape(value.shape)}  {text.size(tensor.nbytes)}"
    return root


def _path(root: Node, name: str) -> Iterable[Node]:
    """Nodes of the components of `name`, made where there are none."""
    found = []
    for part in name.split(".", _DEEPEST):
        root = root.children.setdefault(part, Node(part))
        found.append(root)
    return found


def draw(root: Node, depth: int, indent: str = "") -> Iterator[tuple[str, Node]]:
    """(branch, node) for each line below `root`."""
    nodes = sorted(root.children.values(), key=lambda node: text.natural(node.name)) if depth else []
    for node in nodes:
        last = node is nodes[-1]
        yield indent + ("└── " if last else "├── "), node
        yield from draw(node, depth - 1, indent + ("    " if last else "│   "))


def _totals(node: Node) -> str:
    return f"{text.plural(node.tensors, 'tensor')}, {text.amount(node.parameters)} parameters, {text.size(node.bytes)}"


def _document(node: Node, depth: int) -> dict[str, Any]:
    document = {"name": node.name, "tensors": node.tensors, "parameters": node.parameters, "bytes": node.bytes}
    if depth and node.children:
        document["children"] = [_document(child, depth - 1) for child in node.children.values()]
    return document
