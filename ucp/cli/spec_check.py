"""``ucp spec check``: a program by itself, at a mesh, or against a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ucp.cli.command import Reading, family_options
from ucp.cli.command import command as declare
from ucp.cli.output import Output
from ucp.cli.spec_options import Using, using_options
from ucp.cli.text import plural
from ucp.errors import UsageError

if TYPE_CHECKING:
    from ucp.lang import Program
    from ucp.lang.check import Ready

KEYS = {
    "programs": "list: `file`, and `rules`, a list of `line` (or null), `source`, `targets` (names), `inverse` "
    "(`exact`, `replica-checked`, `lossy` or `one-way`), `coordinates` (how many different shards were compiled, "
    "with --mesh), `lacking` (sizes that would be needed to compile it) and `tensors` (how many shards it "
    "took, with a CHECKPOINT)",
    "checkpoint": "object, or null without a CHECKPOINT: `url`, `mesh`, `shards`, `logical` (number of tensors that "
    "are made of them), `sizes` (object by name: `value`, `why`), `flags`, `ties`, `dropped` (names)",
}


@declare("check", json_keys=KEYS)
@click.argument("words", nargs=-1, required=True, metavar="PROGRAM... [CHECKPOINT]")
@using_options
@family_options
def command(out: Output, words: tuple[str, ...], using: Using, reading: Reading) -> None:
    """Check that a program is sound, and whether it fits.

    By itself: every name is declared, both sides of every equation have the same dims, no two rules can take the same
    tensor. With --mesh and --size every rule whose sizes are known is compiled for every coordinate. With a CHECKPOINT
    the program is bound to its names and shapes: every tensor has one rule, sizes agree, no element is missing.
    Reads metadata only.
    """
    from ucp.lang import load_program

    names, url = _told_apart(words)
    programs = [load_program(name) for name in names]
    if url is not None:
        _against(out, programs[0], url, using, reading)
        return
    found = [_tried(program, using) for program in programs]
    if out.mode == "json":
        out.json({"programs": found, "checkpoint": None})
    elif out.human:
        for facts in found:
            _print_sound(out, facts, using)


def _told_apart(words: Sequence[str]) -> tuple[Sequence[str], str | None]:
    """Programs and the checkpoint: the last word, if there are two and it is no program."""
    from ucp.lang import shipped

    programs = [word for word in words if word.endswith((".ucp", ".json")) or word in shipped()]
    if len(words) == 2 and words[1] not in programs:
        return words[:1], words[1]
    if len(words) > 2 and len(programs) < len(words):
        odd = next(word for word in words if word not in programs)
        raise UsageError(f"{odd}: no program", hint="against a checkpoint programs are checked one at a time")
    return words, None


def _tried(program: Program, using: Using) -> dict[str, Any]:
    from ucp.lang.trial import trial

    rules = [
        {**rule_facts(tried.ready, program), "coordinates": tried.coordinates, "lacking": list(tried.lacking)}
        for tried in trial(program, mesh=using.mesh, sizes=using.sizes, flags=using.flags)
        if not tried.off
    ]
    return {"file": program.file, "rules": rules}


def rule_facts(ready: Ready, program: Program) -> dict[str, Any]:
    """What a program alone says of one rule."""
    from ucp.lang.check import check
    from ucp.lang.match import describe

    equation = ready.equation
    return {
        "line": equation.at[0] if equation.at else None,
        "source": describe(equation.source),
        "targets": [describe(side.name) for side in equation.targets],
        "inverse": ready.inverse(check(program).axes),
        "coordinates": None,
        "lacking": [],
        "tensors": None,
    }


def _print_sound(out: Output, facts: dict[str, Any], using: Using) -> None:
    rules = facts["rules"]
    counts = Counter(rule["inverse"] for rule in rules)
    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
    out.line((facts["file"], "bold"), f"  sound: {plural(len(rules), 'rule')} ({kinds})")
    if not using.mesh.axes and not using.sizes:
        return
    compiled = [rule for rule in rules if rule["coordinates"]]
    shards = sum(rule["coordinates"] for rule in compiled)
    out.line(f"  compiled at {using.mesh}: {plural(len(compiled), 'rule')} for {plural(shards, 'different shard')}")
    lacking = sorted({name for rule in rules for name in rule["lacking"]})
    if lacking:
        out.hint("to compile the rest give " + " ".join(f"--size {name}=N" for name in lacking))


def _against(out: Output, program: Program, url: str, using: Using, reading: Reading) -> None:
    from ucp.cli.spec_source import read_source
    from ucp.lang.evidence import evidence

    source = read_source(url, reading, using.mesh)
    bound = source.bind(program, using)
    why = evidence(bound, source.held, sizes=using.sizes, config=source.sharded.config, cuts=source.sharded.cuts)
    rules = [
        {**rule_facts(ready, program), "tensors": bound.uses.get(ready.equation.number, 0)}
        for ready in bound.checked.rules
    ]
    checkpoint = {
        "url": source.url,
        "mesh": dict(source.sharded.mesh.axes),
        "shards": len(source.held),
        "logical": len({name for name, _ in bound.tensors}),
        "sizes": {name: {"value": n, "why": why.get(name, "given")} for name, n in sorted(bound.sizes.items())},
        "flags": dict(bound.flags),
        "ties": dict(bound.ties),
        "dropped": sorted({source.held[number].name for number in bound.dropped}),
    }
    if out.mode == "json":
        out.json({"programs": [{"file": program.file, "rules": rules}], "checkpoint": checkpoint})
    elif out.human:
        _print_fit(out, program.file, rules, checkpoint)


def _print_fit(out: Output, file: str, rules: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    out.line((file, "bold"), f"  fits {facts['url']}")
    used = [rule for rule in rules if rule["tensors"]]
    mesh = " ".join(f"{axis}={n}" for axis, n in facts["mesh"].items())
    dropped = facts["dropped"]
    pairs = [
        ("rules", f"{len(used)} of {len(rules)} used"),
        ("mesh", mesh),
        ("shards", f"{facts['shards']:,} → {plural(facts['logical'], 'logical tensor')}"),
        ("flags", " ".join(f"{name}={'yes' if value else 'no'}" for name, value in facts["flags"].items())),
        ("ties", ", ".join(f"{alias} = {name}" for alias, name in facts["ties"].items())),
        ("dropped", f"{len(dropped)}: {' '.join(dropped[:4])}{' …' if len(dropped) > 4 else ''}" if dropped else ""),
    ]
    out.fields([pair for pair in pairs if pair[1]])
    if facts["sizes"]:
        out.line()
        rows = [[name, str(size["value"]), size["why"]] for name, size in facts["sizes"].items()]
        out.table(["SIZE", "VALUE", "WHY"], rows, right=("VALUE",))
    out.line()
    rows = [[_line(rule), str(rule["tensors"]), rule["inverse"], _equation(rule)] for rule in used]
    out.table(["LINE", "SHARDS", "INVERSE", "RULE"], rows, right=("LINE", "SHARDS"))


def _line(rule: dict[str, Any]) -> str:
    return "" if rule["line"] is None else str(rule["line"])


def _equation(rule: dict[str, Any]) -> str:
    return f"{rule['source']} → {', '.join(rule['targets'])}"
