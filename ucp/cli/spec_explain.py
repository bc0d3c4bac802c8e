"""``ucp spec explain``: what a program does with one tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ucp.cli import text
from ucp.cli.command import Reading, family_options
from ucp.cli.command import command as declare
from ucp.cli.output import Output
from ucp.cli.spec_options import Using, using_options

if TYPE_CHECKING:
    from ucp.cli.spec_source import Source
    from ucp.lang import Program
    from ucp.lang.explain import Explanation, Holding

_MOST = 32

KEYS = {
    "program": "file of the program",
    "name": "the tensor that was asked for",
    "rules": "list of the rules that are for it: `line` (or null), `text`, `side` (whether the name is a `source` "
    "name or a `logical` one), `layout`, `filled` (the layout with the sizes of the first shard), `inverse`, "
    "`replicas` (axes along which copies lie), `lacking` (sizes that would be needed), and `shards`: list of `name`, "
    "`coordinate`, `shape`, `object` (or null without a CHECKPOINT) and `regions`: `here` (in the shard), "
    "`name` and `there` (in the logical tensor), `shape` (of the logical tensor), `elements`, `order` "
    "(`transposed`, `reordered` or empty), "
    "`replica` (0 is read, others are compared with it; null without a CHECKPOINT)",
}


@declare("explain", json_keys=KEYS)
@click.argument("program")
@click.argument("name")
@click.argument("checkpoint", required=False)
@click.option("--state", default="value", show_default=True, help="Which state of it; with a CHECKPOINT.")
@using_options
@family_options
def command(
    out: Output, program: str, name: str, checkpoint: str | None, state: str, using: Using, reading: Reading
) -> None:
    """Explain what a program does with the tensor NAME.

    NAME is a name in the source or a logical one. Shown are its rule, the layout with sizes filled in, and for each
    coordinate of the mesh which part of its shard is which part of the logical tensor. Sizes come from --mesh and
    --size, or from a CHECKPOINT. Reads metadata only.
    """
    from ucp.cli.spec_source import read_source
    from ucp.lang import load_program
    from ucp.lang.explain import explain, explain_bound

    loaded = load_program(program)
    source: Source | None = None
    if checkpoint is None:
        found = explain(loaded, name, mesh=using.mesh, sizes=using.sizes, flags=using.flags)
    else:
        source = read_source(checkpoint, reading, using.mesh)
        found = explain_bound(source.bind(loaded, using), source.held, name, state=state)
    if out.mode == "json":
        out.json({"program": loaded.file, "name": name, "rules": [_facts(one, source, state) for one in found]})
    elif out.human:
        for number, one in enumerate(found):
            if number:
                out.line()
            _print(out, loaded, one, source, state)


def _facts(found: Explanation, source: Source | None, state: str) -> dict[str, Any]:
    at = found.ready.equation.at
    return {
        "line": at[0] if at else None,
        "text": found.text,
        "side": found.side,
        "layout": found.layout,
        "filled": found.filled,
        "inverse": found.inverse,
        "replicas": list(found.replicas),
        "lacking": list(found.lacking),
        "shards": [
            {
                "name": holding.name,
                "coordinate": dict(holding.coordinate),
                "shape": list(holding.shape),
                "object": _object(holding, source, state),
                "regions": [
                    {name: getattr(r, name) for name in ("here", "name", "there", "elements", "order", "replica")}
                    | {"shape": list(r.shape)}
                    for r in holding.regions
                ],
            }
            for holding in found.holdings
        ],
    }


def _object(holding: Holding, source: Source | None, state: str) -> str | None:
    """The object that holds the shard; the first of several."""
    if source is None or holding.held is None:
        return None
    catalog = source.sharded.parts[source.origin[holding.held]][1]
    fragments = next((held for key, held in catalog.fragments.items() if tuple(key) == (holding.name, state)), ())
    return fragments[0].extent.object if fragments else None


def _print(out: Output, program: Program, found: Explanation, source: Source | None, state: str) -> None:
    at = found.ready.equation.at
    place = f"{program.file}:{at[0]}" if at else program.file
    out.line((found.name, "bold"), f"  {found.side} name, by the rule of ", (place, "bold"))
    for line in found.text.splitlines():
        out.line("  " + line)
    out.line()
    out.fields([pair for pair in _fields(found) if pair[1]])
    if found.lacking:
        out.hint("for shapes and places give " + " ".join(f"--size {name}=N" for name in found.lacking))
    if found.holdings:
        out.line()
        _table(out, found, source, state)


def _fields(found: Explanation) -> list[tuple[str, str]]:
    lies = found.layout or "as the source records it, one to one"
    if found.filled:
        lies += "".join(f" = {one}" for one in dict.fromkeys((found.filled, text.shape(found.holdings[0].shape))))
    reduced = [f"{reduce.kind} over {' '.join(reduce.axes)}" for reduce in found.ready.equation.reduces]
    others = [axis for axis in found.replicas if not any(axis in r.axes for r in found.ready.equation.reduces)]
    copies = [*reduced, *([f"along {' '.join(others)}, compared with each other"] if others else [])]
    return [("lies", lies), ("copies", "; ".join(copies)), ("inverse", f"{found.inverse}: {_MEANING[found.inverse]}")]


_MEANING = {
    "exact": "written again as it was, bit by bit",
    "replica-checked": "written again as it was, once its copies were found equal",
    "lossy": "values may change on the way there and back",
    "one-way": "one direction only",
}


def _table(out: Output, found: Explanation, source: Source | None, state: str) -> None:
    from ucp.cli.spec_source import at_text

    names = len({holding.name for holding in found.holdings}) > 1 or found.side == "logical"
    header = ["AT", *(["SHARD"] if names else []), "IN THE SHARD", "IS", "IN THE TENSOR", "OF"]
    header += ["OBJECT"] if source else []
    rows = []
    for holding in found.holdings[:_MOST]:
        lead = [at_text(holding.coordinate) or "everywhere", *([holding.name] if names else [])]
        tail = [_object(holding, source, state) or ""] if source else []
        for region in holding.regions:
            extra = "".join(f", {word}" for word in (region.order, _copy(region.replica)) if word)
            rows.append([*lead, region.here, region.name, region.there + extra, text.shape(region.shape), *tail])
        if not holding.regions:
            rows.append([*lead, text.shape(holding.shape), "padding", "", "", *tail])
    out.table(header, rows)
    left = len(found.holdings) - _MOST
    if left > 0:
        out.remark(f"… and {left:,} more; --json shows all")


def _copy(replica: int | None) -> str:
    return f"copy {replica}" if replica else ""
