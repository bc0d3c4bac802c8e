"""A first program for a checkpoint, from the names and shapes of its shards, and from bytes where they can be compared.

What is concluded from weak grounds, or could not be decided, is said in a comment at the rule, ``# inferred: …`` and
``# undecided: …``. Nothing is guessed silently: what may be cut or whole is taken for replicas, which are compared when
tensors are read, so that a wrong guess is an error and never a wrong number.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ucp.errors import FitError, UsageError
from ucp.lang.ast import In, Program, Rule, Sizes, Statement
from ucp.lang.bind import bind
from ucp.lang.draft_axes import Same
from ucp.lang.draft_known import recognise
from ucp.lang.draft_names import Family, families
from ucp.lang.draft_rules import assemble
from ucp.lang.draft_tensor import decide, find_partial, unsplit, whole
from ucp.lang.format import format_program
from ucp.lang.held import Held
from ucp.lang.load import load_program, shipped
from ucp.lang.match import describe
from ucp.lang.parser import parse
from ucp.layout import Mesh

_FLAG = re.compile(r"--flag (\w+)=")
_MOST_FLAGS = 3


@dataclass(frozen=True, slots=True)
class Draft:
    """A drafted program. `notes` repeat what its comments leave open, each with the name it is about.

    `fits` are programs that take the checkpoint as it is, with options that they ask for; `problem` says why
    the draft itself does not yet.
    """

    program: Program
    notes: tuple[str, ...]
    fits: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def text(self) -> str:
        """The program as text."""
        return format_program(self.program)


def draft(
    held: Sequence[Held],
    mesh: Mesh,
    *,
    same: Same | None = None,
    sizes: Mapping[str, int] | None = None,
    programs: Sequence[Program] | None = None,
) -> Draft:
    """Draft a program for the shards `held` at `mesh`.

    `same` compares two shards (see `Same`); without it replicas and pieces of equal shape cannot be told apart, unless
    `sizes` of whole dims say so. `programs` are searched for logical names, and for
    some that fit; those that are shipped by default.
    """
    values = [number for number, shard in enumerate(held) if shard.state == "value"]
    if not values:
        raise UsageError("nothing to draft from: no tensor has a value")
    known = _shipped() if programs is None else programs
    found = [_regrouped(family, values) for family in families([held[number].name for number in values])]
    told = {axis for shard in held for axis in shard.coordinate}
    axes = [axis for axis, ranks in mesh.axes if ranks > 1 and axis in told]
    tensors = decide(found, held, mesh, axes, same, sizes or {})
    rules = recognise(
        [tensor.family for tensor in tensors], [len(t.shape) if t.shape is not None else -1 for t in tensors], known
    )
    for tensor, said in zip(tensors, rules, strict=True):
        tensor.known = said
        unsplit(tensor, held)
        tensor.whole = whole(tensor, held, dict(mesh.axes))
    find_partial(tensors, held)
    program = assemble(tensors, held, axes, dict(sizes or {}))
    return _finished(program, held, mesh, sizes or {}, known)


def _shipped() -> list[Program]:
    return [load_program(name) for name in shipped()]


def _regrouped(family: Family, values: Sequence[int]) -> Family:
    """The same family with numbers of shards among all, states included."""
    return Family(family.components, {n: tuple(values[i] for i in held) for n, held in family.members.items()})


def _finished(
    program: Program, held: Sequence[Held], mesh: Mesh, sizes: Mapping[str, int], known: Sequence[Program]
) -> Draft:
    """The draft as its own text says it, tried on what it was drafted from."""
    read = parse(format_program(program), file="draft.ucp")
    problem = None
    try:
        bind(read, held, mesh=mesh, sizes={name: n for name, n in sizes.items() if _declares(read, name)})
    except FitError as error:
        problem = error.message
    return Draft(read, tuple(_notes(read.statements, "")), tuple(_fitting(held, mesh, known, sizes)), problem)


def _declares(program: Program, name: str) -> bool:
    return any(isinstance(s, Sizes) and name in s.names for s in program.statements)


def _notes(statements: Sequence[Statement], lead: str) -> list[str]:
    found: list[str] = []
    for statement in statements:
        if isinstance(statement, In):
            found += _notes(statement.body, f"{lead}{describe(statement.source)}.")
        elif isinstance(statement, Rule):
            name = lead + describe(statement.source.name)
            found += [f"{name}: {line.strip()}" for line in statement.comments.before]
    return found


def _fitting(held: Sequence[Held], mesh: Mesh, programs: Sequence[Program], sizes: Mapping[str, int]) -> list[str]:
    """Programs that take all shards as they are, or would if they were given what they ask for."""
    found = []
    for program in programs:
        asked = _asked(program, held, mesh, sizes, {})
        flags = _FLAG.findall(asked or "")
        if len(flags) > _MOST_FLAGS:
            continue
        for values in itertools.product((False, True), repeat=len(flags)):
            chosen = dict(zip(flags, values, strict=True))
            sized = _asked(program, held, mesh, sizes, chosen) if chosen else asked
            if sized is not None and "--flag" not in sized:
                words = [f"--flag {name}={'yes' if value else 'no'}" for name, value in chosen.items()]
                found.append(" ".join([program.file.removesuffix(".ucp"), *words, *([sized] if sized else [])]))
    return found


def _asked(
    program: Program, held: Sequence[Held], mesh: Mesh, sizes: Mapping[str, int], flags: Mapping[str, bool]
) -> str | None:
    """The options that a program asks for to take all shards, "" for none; None where it does not fit."""
    try:
        bind(program, held, mesh=mesh, config=sizes, flags=flags)
    except FitError as error:
        hint = error.hint or ""
        return hint.removeprefix("give ") if hint.startswith("give --") else None
    return ""
