"""``ucp plan``: what a conversion would read and write, before it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ucp.cli import text
from ucp.cli.command import command as declare
from ucp.cli.conversion import Asked, conversion_options, rerun
from ucp.cli.output import Output

if TYPE_CHECKING:
    from ucp.run.convert import Conversion

KEYS = {
    "source": "URL of the source",
    "destination": "URL of the result",
    "from": "family of the source",
    "to": "family of the result",
    "state": "`new`, `partial` (an earlier run will be resumed) or `done`",
    "tensors": "number of states of tensors to write",
    "objects_read": "number of objects to read from",
    "objects_written": "number of large objects to write",
    "bytes_read": "bytes of tensor data to read",
    "bytes_checked": "bytes of low-precision copies and replicas to read for comparison",
    "bytes_written": "bytes of large objects to write",
    "workers": "number of workers assumed for `peak_bytes`",
    "peak_bytes_per_worker": "bound of one worker's buffers",
    "peak_bytes": "bound of all workers' buffers",
    "carried": "object: what is carried beside tensors: `training_state` (names), and counts of `param_groups`, "
    "`scalars` and `ties`",
    "notes": "list of remarks of the reader",
    "tasks": "with -v, list of large objects: `object`, `size`, `tensors` (names with states)",
}


@declare("plan", json_keys=KEYS)
@conversion_options
def command(out: Output, asked: Asked) -> None:
    """Show what `ucp convert` would do; nothing is written.

    -v lists each object with the tensors in it.
    """
    from ucp.run.executor import default_workers

    conversion = asked.prepare()
    facts = describe(conversion, asked.workers or default_workers(conversion.source, conversion.destination))
    if out.verbose:
        facts["tasks"] = _tasks(conversion)
    if out.mode == "json":
        out.json(facts)
    elif out.human:
        _print(out, facts)
        out.hint(f"`{rerun()}` runs exactly this" if facts["state"] != "done" else "it is done already")


def describe(conversion: Conversion, workers: int) -> dict[str, Any]:
    """The plan's cost and what is carried, as plain values."""
    cost, catalog = conversion.plan.cost, conversion.catalog
    workers = max(1, min(workers, cost.objects_written))
    return {
        "source": conversion.source_url,
        "destination": conversion.destination_url,
        "from": catalog.source.family,
        "to": conversion.to,
        "state": conversion.state,
        "tensors": cost.tensors,
        "objects_read": cost.objects_read,
        "objects_written": cost.objects_written,
        "bytes_read": cost.bytes_read,
        "bytes_checked": cost.bytes_checked,
        "bytes_written": cost.bytes_written,
        "workers": workers,
        "peak_bytes_per_worker": cost.peak_bytes_per_worker,
        "peak_bytes": workers * cost.peak_bytes_per_worker,
        "carried": {
            "training_state": sorted(catalog.state),
            "param_groups": len(catalog.param_groups),
            "scalars": sum(len(tensor.scalars) for tensor in catalog.tensors.values()),
            "ties": len(catalog.ties),
        },
        "notes": list(conversion.notes),
    }


def _tasks(conversion: Conversion) -> list[dict[str, Any]]:
    return [
        {
            "object": task.object,
            "size": task.size,
            "tensors": list(dict.fromkeys(str(section.cover.key) for section in task.sections)),
        }
        for task in conversion.plan.tasks
    ]


def _print(out: Output, facts: dict[str, Any]) -> None:
    out.line((f"{facts['from']} → {facts['to']}", "bold"))
    checked = f", and {text.size(facts['bytes_checked'])} to check" if facts["bytes_checked"] else ""
    each = f"{text.plural(facts['workers'], 'worker')} at {text.size(facts['peak_bytes_per_worker'])}"
    out.fields(
        [
            ("source", facts["source"]),
            ("result", facts["destination"]),
            ("tensors", f"{facts['tensors']:,} states"),
            ("read", f"{text.size(facts['bytes_read'])} from {text.plural(facts['objects_read'], 'object')}{checked}"),
            ("write", f"{text.size(facts['bytes_written'])} in {text.plural(facts['objects_written'], 'object')}"),
            ("buffers", f"at most {text.size(facts['peak_bytes'])}: {each}"),
            ("carried", _carried(facts["carried"])),
            ("status", _STATUS[facts["state"]]),
        ]
    )
    for note in facts["notes"]:
        out.line(("note", "yellow"), "  ", note)
    if "tasks" in facts:
        out.line()
        rows = [[task["object"], " ".join(task["tensors"]), text.size(task["size"])] for task in facts["tasks"]]
        out.table(["OBJECT", "TENSORS", "BYTES"], rows, right=("BYTES",))


_STATUS = {
    "new": "nothing is there yet",
    "partial": "an earlier run was cut short; it will be resumed",
    "done": "already complete",
}


def _carried(carried: dict[str, Any]) -> str:
    counted = [
        text.plural(carried[key], noun)
        for key, noun in (("param_groups", "parameter group"), ("scalars", "scalar"), ("ties", "tie"))
        if carried[key]
    ]
    return ", ".join([*carried["training_state"], *counted]) or "nothing else"
