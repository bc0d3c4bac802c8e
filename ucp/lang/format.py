"""From a syntax tree to text, in the one way it is written."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from ucp.lang.ast import (
    Comments,
    Drop,
    Factor,
    Flags,
    In,
    Let,
    MeshAxes,
    Pack,
    Program,
    Rule,
    Sizes,
    State,
    Statement,
    Tie,
)
from ucp.lang.format_parts import arithmetic_text, clauses_text, expr_text, layout_text, pattern_text, reduces_text
from ucp.lang.format_rules import rule_lines
from ucp.lang.parser_rules import same_names

_SHORT = 80
"""The longest statement whose comment is lined up with those of its neighbours."""


def format_program(program: Program) -> str:
    """`program` as text: two blanks of indentation, rules in columns, comments kept, a line feed at the end.

    Parsing gives the same tree again, and formatting that the same text. Comments inside a statement stand before it.
    """
    lines = _Writer(spaced=program.text is None)
    after = "" if program.comments.after is None else f"  #{program.comments.after}"
    lines.statement(program.comments, [f"format {program.format}{after}"], indent=0, first=True)
    lines.body(program.statements, indent=0, first=False)
    lines.comments(program.tail, indent=0)
    return "\n".join(lines.lines) + "\n"


class _Writer:
    """Lines so far. `spaced`: nobody has put blank lines, so some are put."""

    def __init__(self, *, spaced: bool) -> None:
        self.lines: list[str] = []
        self._spaced = spaced

    def body(self, statements: Sequence[Statement], *, indent: int, first: bool = True) -> None:
        """Statements that follow each other."""
        for group in _groups(statements):
            texts = _commented(group, _texts(group, indent))
            for statement, text in zip(group, texts, strict=True):
                self._blank(statement, first=first, indent=indent)
                self.statement(statement.comments, text, indent=indent, first=first)
                if isinstance(statement, In):
                    self.body(statement.body, indent=indent + 2)
                    self.comments(statement.tail, indent=indent + 2)
                    self.lines.append(" " * indent + "}")
                first = False

    def statement(self, comments: Comments, text: Sequence[str], *, indent: int, first: bool) -> None:
        """One statement with its comments."""
        if comments.blank and not first and self.lines[-1]:
            self.lines.append("")
        self.comments(comments.before, indent=indent)
        self.lines += text

    def comments(self, comments: Sequence[str], *, indent: int) -> None:
        """Comments on lines of their own."""
        self.lines += (f"{' ' * indent}#{comment}" for comment in comments)

    def _blank(self, statement: Statement, *, first: bool, indent: int) -> None:
        block = isinstance(statement, In) and indent == 0
        if self._spaced and not first and (block or self.lines[-1] == "}") and self.lines[-1]:
            self.lines.append("")


def _groups(statements: Sequence[Statement]) -> list[list[Statement]]:
    """Runs of statements of one type without blank lines: what shares columns."""
    number = 0

    def key(pair: tuple[int, Statement]) -> tuple[int, type]:
        nonlocal number
        number += pair[1].comments.blank
        return number, type(pair[1])

    return [[statement for _, statement in run] for _, run in groupby(enumerate(statements), key)]


def _texts(group: Sequence[Statement], indent: int) -> list[list[str]]:
    """The lines of each statement of a group."""
    rules = [statement for statement in group if isinstance(statement, Rule)]
    if rules:
        return rule_lines(rules, indent=indent)
    states = [" ".join(statement.names) for statement in group if isinstance(statement, State)]
    width = max(map(len, states), default=0)
    return [[" " * indent + _line(statement, width)] for statement in group]


def _commented(group: Sequence[Statement], texts: list[list[str]]) -> list[list[str]]:
    """`texts` with the comments at the ends of statements, under each other where the statements are short."""
    ends = [text[-1] for statement, text in zip(group, texts, strict=True) if statement.comments.after is not None]
    width = max((len(end) for end in ends if len(end) <= _SHORT), default=0)
    found = []
    for statement, text in zip(group, texts, strict=True):
        after = statement.comments.after
        found.append(text if after is None else [*text[:-1], f"{text[-1].ljust(width)}  #{after}"])
    return found


def _line(statement: Statement, width: int) -> str:
    """A statement that is no rule; a block up to its brace."""
    match statement:
        case MeshAxes():
            return f"mesh {' '.join(statement.axes)}"
        case Factor():
            return f"axis {statement.axis} = {' * '.join(statement.parts)}"
        case Sizes():
            default = "" if statement.default is None else f" = {statement.default}"
            return f"size {' '.join(statement.names)}{default}"
        case Let():
            return f"let {statement.name} = {arithmetic_text(statement.value)}"
        case Flags():
            return f"flag {' '.join(statement.names)}"
        case Drop():
            return f"drop {' '.join(map(pattern_text, statement.names))}"
        case Tie():
            text = f"tie {pattern_text(statement.alias)} to {pattern_text(statement.name)}"
            return f"{text} {clauses_text((), statement.conditions)}".rstrip()
        case Pack():
            reverse = " reversed" if statement.reverse else ""
            return f"pack {pattern_text(statement.name)}{reverse} [{expr_text(statement.expr)}]"
        case State():
            return _state(statement, width)
        case In():
            return _head(statement)
    raise AssertionError(statement)


def _state(state: State, width: int) -> str:
    words = [f"state {' '.join(state.names).ljust(width)} :"]
    words.append("like param" if state.layout is None else layout_text(state.layout))
    if state.lacking:
        words.append(f"lacking {' '.join(map(str, state.lacking))}")
    if state.each:
        words.append(f"each {' '.join(state.each)}")
    return " ".join([*words, reduces_text(state.reduces)]).rstrip()


def _head(block: In) -> str:
    source = pattern_text(block.source)
    names = source if block.target == same_names(block.source) else f"{source} <-> {pattern_text(block.target)}"
    clauses = clauses_text(block.on, block.conditions, optional=block.optional)
    return " ".join(filter(None, (f"in {names}", clauses, "{")))
