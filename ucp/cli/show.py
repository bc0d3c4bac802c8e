"""``ucp show``: one tensor, with every fragment of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import click

from ucp.catalog import Catalog
from ucp.cli import text
from ucp.cli.command import Reading, reading_options
from ucp.cli.command import command as declare
from ucp.cli.describe import groups_of, tensor_row
from ucp.cli.output import Output
from ucp.layout import FlatRange, Region
from ucp.plan import BLOCK_BYTES, Fragment, Section
from ucp.store import Store

WITNESS = "low-precision copy"

KEYS = {
    "url": "where the checkpoint lies",
    "name": "the tensor; the one an alias stands for",
    "aliases": "other names of the same tensor",
    "kind": "`parameter`, `frozen` or `buffer`",
    "shape": "shape of its value",
    "dtype": "dtype of its value",
    "dims": "names of its dims, or null",
    "bytes": "bytes of all states",
    "states": "object by state: `dtype`, `shape`, `bytes`",
    "scalars": "object: numbers kept per parameter, each `value` and `dtype`",
    "options": "list of hyper-parameters, one object per parameter group that the tensor is in",
    "low_precision_copy": "`dtype` and `shape` of a copy that must agree with the value, or null",
    "fragments": "list: `state`, `replica` (0 is read first), `region` (`start` and `stop` of elements in row-major "
    "order, or `start` and `shape` of a box), `object`, `offset` of its first byte, `strides` in elements, `dtype`, "
    "`bytes`, and `text`, the region as people read it",
    "stats": "object by state, or null without --stats: `count`, `nan`, `inf`, and of the finite elements `min`, "
    "`max`, `mean`, `std`",
}


@declare("show", json_keys=KEYS)
@click.argument("url")
@click.argument("tensor")
@click.option("--stats", is_flag=True, help="Read the data: min, max, mean, std, NaN and infinite elements.")
@reading_options
def command(out: Output, url: str, tensor: str, stats: bool, reading: Reading) -> None:
    """Show one tensor, and where each fragment of it lies.

    Also its states and hyper-parameters. Reads metadata only, unless --stats is given.
    """
    catalog, store = reading.catalog(url)
    name = catalog.resolve(tensor)
    facts = describe(catalog, name)
    facts["stats"] = {state: _stats(catalog, store, name, state) for state in facts["states"]} if stats else None
    if out.mode == "json":
        out.json(facts)
    elif out.human:
        _print(out, facts)


def describe(catalog: Catalog, name: str) -> dict[str, Any]:
    """Everything about a tensor but its data."""
    tensor, witness = catalog.tensors[name], catalog.witnesses.get(name)
    return {
        "url": catalog.url,
        **tensor_row(catalog, name),
        "aliases": [alias for alias, held in catalog.ties.items() if held == name],
        "dims": list(tensor.dims) if tensor.dims else None,
        "scalars": {key: {"value": s.value, "dtype": s.dtype} for key, s in tensor.scalars.items()},
        "options": groups_of(catalog, name),
        "low_precision_copy": {"dtype": witness[0].dtype, "shape": list(witness[0].shape)} if witness else None,
        "fragments": list(_fragments(catalog, name)),
    }


def _fragments(catalog: Catalog, name: str) -> Iterator[dict[str, Any]]:
    for (tensor, state), fragments in catalog.fragments.items():
        if tensor == name:
            yield from (_fragment(state, fragment) for fragment in fragments)
    if name in catalog.witnesses:
        yield from (_fragment(WITNESS, fragment) for fragment in catalog.witnesses[name][1])


def _fragment(state: str, fragment: Fragment) -> dict[str, Any]:
    extent = fragment.extent
    return {
        "state": state,
        "replica": fragment.replica,
        "region": _region(fragment.region),
        "object": extent.object,
        "offset": extent.offset,
        "strides": list(extent.strides),
        "dtype": extent.dtype,
        "bytes": extent.nbytes,
        "text": text.region(fragment.region) + ("" if extent.is_contiguous else f" strides {list(extent.strides)}"),
    }


def _region(region: Region) -> dict[str, Any]:
    if isinstance(region, FlatRange):
        return {"start": region.start, "stop": region.stop}
    return {"start": list(region.start), "shape": list(region.shape)}


def _stats(catalog: Catalog, store: Store, name: str, state: str) -> dict[str, Any]:
    from ucp.run.gather import read_region
    from ucp.run.numbers import Statistics, values

    cover = catalog.cover(name, state)
    found = Statistics()
    for block in Section(0, FlatRange(0, cover.spec.size), cover).blocks(BLOCK_BYTES):
        found.add(values(read_region(store, cover, block), cover.spec.dtype))
    names = ("count", "nan", "inf", "min", "max", "mean", "std")
    return {key: getattr(found, key) for key in names}


def _print(out: Output, facts: dict[str, Any]) -> None:
    out.line((facts["name"], "bold"), "  ", f"{facts['kind']} {facts['dtype']} {text.shape(facts['shape'])}")
    out.fields([pair for pair in _fields(facts) if pair[1]])
    out.line()
    rows = [
        [f["state"], str(f["replica"]), f["text"], f["dtype"], f["object"], str(f["offset"]), str(f["bytes"])]
        for f in facts["fragments"]
    ]
    header = ["STATE", "REPLICA", "REGION", "DTYPE", "OBJECT", "OFFSET", "BYTES"]
    out.table(header, rows, right=("REPLICA", "OFFSET", "BYTES"))
    if facts["stats"]:
        out.line()
        out.table(*_stats_table(facts["stats"]), right=("MIN", "MAX", "MEAN", "STD", "NAN", "INF"))


def _fields(facts: dict[str, Any]) -> list[tuple[str, str]]:
    states = (f"{s} {spec['dtype']} {text.size(spec['bytes'])}" for s, spec in facts["states"].items())
    low = facts["low_precision_copy"]
    return [
        ("states", ", ".join(states)),
        ("dims", " ".join(facts["dims"] or ())),
        ("aliases", ", ".join(facts["aliases"])),
        ("scalars", ", ".join(f"{key} {s['value']} ({s['dtype']})" for key, s in facts["scalars"].items())),
        *[("options", ", ".join(f"{key} {value}" for key, value in group.items())) for group in facts["options"]],
        ("copy", f"{low['dtype']}, must agree with the value" if low else ""),
    ]


def _stats_table(stats: dict[str, dict[str, Any]]) -> tuple[Sequence[str], list[list[str]]]:
    rows = [
        [state, *(_number(found[key]) for key in ("min", "max", "mean", "std", "nan", "inf"))]
        for state, found in stats.items()
    ]
    return ["STATE", "MIN", "MAX", "MEAN", "STD", "NAN", "INF"], rows


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"
