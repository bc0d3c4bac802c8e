"""``ucp info``: a checkpoint on one screen."""

from __future__ import annotations

from typing import Any

import click

from ucp.cli import text
from ucp.cli.command import Reading, reading_options
from ucp.cli.command import command as declare
from ucp.cli.describe import overview
from ucp.cli.output import Output, Span

KEYS = {
    "url": "where the checkpoint lies",
    "family": "who wrote it",
    "version": "the writer's or the format's version",
    "detail": "object: what else the writer says about itself, such as the ZeRO stage",
    "mesh": "object: size of each mesh axis, outermost first",
    "step": "training step, or null",
    "complete": "whether the metadata accounts for every element of every tensor once",
    "problem": "why it is not complete, or null",
    "tensors": "number of logical tensors",
    "kinds": "object: number of tensors that are `parameter`, `frozen` or `buffer`",
    "parameters": "number of elements of all parameters, frozen ones included",
    "bytes": "bytes of all states, padding not counted",
    "states": "object by state: `tensors` that have it, and `bytes`",
    "dtypes": "object: bytes by dtype",
    "ties": "object: alias to the name that holds the data",
    "param_groups": "list of `params` (names) and `options` (hyper-parameters)",
    "training_state": "names of the parts of the rest of the training state",
    "objects": "number of files or objects used",
    "objects_bytes": "their size",
    "integrity": "object: `digests` (bytes under a checksum by algorithm), `low_precision_copies`, `replicas`",
    "notes": "list of remarks, such as inferences that were made",
}


@declare("info", json_keys=KEYS)
@click.argument("url")
@reading_options
def command(out: Output, url: str, reading: Reading) -> None:
    """Show a checkpoint on one screen.

    Who wrote it, what it holds, whether it is complete. Reads metadata only.
    """
    catalog, _ = reading.catalog(url)
    facts = overview(catalog)
    if out.mode == "json":
        out.json(facts)
    elif out.human:
        _print(out, facts)


def _print(out: Output, facts: dict[str, Any]) -> None:
    out.line((f"{facts['family']} {facts['version']}".rstrip(), "bold"), "  ", facts["url"])
    out.fields([pair for pair in _fields(facts) if pair[1]])
    for note in facts["notes"]:
        out.line(("note", "yellow"), "  ", note)


def _fields(facts: dict[str, Any]) -> list[tuple[str, Span]]:
    states = (f"{name} {text.size(entry['bytes'])} ({entry['tensors']})" for name, entry in facts["states"].items())
    return [
        ("step", "unknown" if facts["step"] is None else str(facts["step"])),
        ("mesh", " ".join(f"{axis}{size}" for axis, size in facts["mesh"].items()) or "not recorded"),
        ("detail", ", ".join(f"{key} {_word(value)}" for key, value in facts["detail"].items())),
        ("tensors", f"{facts['tensors']:,}: {', '.join(_kinds(facts))}"),
        ("parameters", f"{text.amount(facts['parameters'])}{_exact(facts['parameters'])}"),
        ("bytes", text.size(facts["bytes"])),
        ("states", ", ".join(states)),
        ("dtypes", ", ".join(f"{dtype} {text.size(count)}" for dtype, count in facts["dtypes"].items())),
        ("groups", _groups(facts["param_groups"])),
        ("ties", ", ".join(f"{alias} = {name}" for alias, name in facts["ties"].items())),
        ("carried", ", ".join(facts["training_state"])),
        ("objects", f"{facts['objects']:,}, {text.size(facts['objects_bytes'])}"),
        ("integrity", _integrity(facts["integrity"])),
        ("complete", "yes" if facts["complete"] else (f"no: {facts['problem']}", "red")),
    ]


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _exact(count: int) -> str:
    return f" ({count:,})" if count >= 10**6 else ""


def _kinds(facts: dict[str, Any]) -> list[str]:
    kinds = facts["kinds"]
    counted = [text.plural(kinds[kind], kind) for kind in ("parameter", "buffer") if kind in kinds]
    return [*counted, *([f"{kinds['frozen']:,} frozen"] if "frozen" in kinds else [])]


def _groups(groups: list[dict[str, Any]]) -> str:
    return ", ".join(f"{len(g['params'])} at lr {g['options'].get('lr', 'unknown')}" for g in groups)


def _integrity(facts: dict[str, Any]) -> str:
    parts = [f"{algorithm} of {text.size(count)}" for algorithm, count in facts["digests"].items()]
    if facts["low_precision_copies"]:
        parts.append(text.plural(facts["low_precision_copies"], "low-precision copy", "low-precision copies"))
    if facts["replicas"]:
        parts.append(text.plural(facts["replicas"], "replica"))
    return ", ".join(parts) or "the source keeps no checksums"
