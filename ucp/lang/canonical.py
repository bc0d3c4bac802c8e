"""Trees that did not come from text, held to what text can say."""

from __future__ import annotations

from ucp.lang.ast import Program
from ucp.lang.error import program_error
from ucp.lang.format import format_program
from ucp.lang.parser import parse


def canonical(program: Program) -> Program:
    """`program` as its own text says it, with positions in that text; comments stay.

    ProgramError if there is no text for it, or one that means something else: an identifier that is none, ``_`` that is
    no part of a concatenation, a product in a product.
    """
    text = format_program(program)
    found = parse(text, file=program.file)
    if found != program:
        different = (new for new, old in zip(found.statements, program.statements, strict=False) if new != old)
        at = next((statement.at for statement in different), None)
        cause = "the tree is not in canonical form: this text is another one"
        raise program_error(found, at=at, kind="syntax", cause=cause, hint="build it with ucp.lang.build")
    return found
