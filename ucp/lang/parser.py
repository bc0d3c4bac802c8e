"""From text to a syntax tree: a recursive descent over statements, one line of look-ahead, one error at a time."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from ucp.errors import ProgramError
from ucp.lang.ast import Comments, In, Program, Statement
from ucp.lang.error import nearest
from ucp.lang.parser_declare import DECLARATIONS
from ucp.lang.parser_rules import ARROWS, block_end, block_head, rule
from ucp.lang.scan import Mark, Scanner
from ucp.layout.expr import Span

DEEPEST_BLOCK = 16
"""The most blocks in each other."""

VERSION = 1
"""The version of the language."""

KEYWORDS = ("mesh", "axis", "size", "let", "flag", "state", "tie", "pack", "drop", "in")
# A statement's word is a tensor's name where a layout or an arrow follows it.
_KEYWORD = re.compile(rf"({'|'.join(KEYWORDS)})(?=[ \t]+(?!\[|<->|->|<-|[ \t\n#]|\Z))")
_WORD = re.compile(r"[A-Za-z]+(?![A-Za-z0-9_.\-])")
_CLAUSES = ("on", "when", "unless", "optional", "lossy")
_FORMAT = re.compile(r"format(?=[ \t])")


def parse(text: str, *, file: str = "<program>") -> Program:
    """The syntax tree of a conversion program.

    `file` is what messages call it. Nothing is resolved: names may be unknown, dims may not add up. ProgramError, with
    the place marked, for text that does not follow the grammar (spec/conversion-language.md).
    """
    return _Parser(text, file).program()


@dataclass(slots=True)
class _Open:
    """A block whose end has not been seen."""

    head: In
    at: Span
    body: list[Statement]


class _Parser:
    __slots__ = ("_open", "_scanner", "_top")

    def __init__(self, text: str, file: str) -> None:
        self._scanner = Scanner(text, file=file)
        self._top: list[Statement] = []
        self._open: list[_Open] = []

    def program(self) -> Program:
        """The whole text."""
        scanner = self._scanner
        before, blank = self._before()
        self._version()
        first = self._comments(before, blank)
        while True:
            before, blank = self._before()
            if scanner.at == len(scanner.text):
                break
            if not self._end_of_block():
                self._statement(before, blank)
        if self._open:
            raise scanner.error("this block has no end", at=self._open[-1].at, hint="`}` on a line of its own")
        return Program(tuple(self._top), VERSION, scanner.file, scanner.text, first, tuple(before))

    def _version(self) -> None:
        """``format 1``."""
        scanner = self._scanner
        if not scanner.match(_FORMAT):
            raise scanner.expected(f"`format {VERSION}`, the first statement of every program")
        scanner.blanks()
        begin = scanner.mark()
        version = scanner.number("the version of the language")
        if version != VERSION:
            raise scanner.error(
                f"version {version} of the language is not known",
                at=scanner.since(begin),
                kind="format",
                hint=f"this ucp knows version {VERSION}; a newer one knows more: pip install -U universal-checkpoint",
            )

    def _before(self) -> tuple[tuple[str, ...], bool]:
        """Step to the next statement: the comments before it, and whether a blank line stands there."""
        scanner = self._scanner
        scanner.comments = []
        blank = False
        while True:
            line = scanner.mark()[0]
            scanner.blanks()
            comment = scanner.comment()
            if not scanner.newline():
                return tuple(scanner.comments), blank
            blank = blank or (not comment and line > 1)

    def _comments(self, before: tuple[str, ...], blank: bool) -> Comments:
        """Step over the end of a statement: its comments, those inside it moved before it."""
        scanner = self._scanner
        if not scanner.ended():
            raise self._unexpected()
        inside = len(scanner.comments)
        after = scanner.comments[-1] if scanner.comment() else None
        scanner.newline()
        return Comments((*before, *scanner.comments[len(before) : inside]), after, blank)

    def _unexpected(self) -> ProgramError:
        hints = {"{": "only `in` begins a block", ",": "names and clauses are separated by blanks"}
        found = next((hint for sign, hint in hints.items() if self._scanner.sees(sign)), None)
        return self._scanner.expected("the end of the statement", hint=found)

    def _statement(self, before: tuple[str, ...], blank: bool) -> None:
        scanner = self._scanner
        keyword = scanner.match(_KEYWORD)
        if keyword is not None:
            scanner.at -= len(keyword)
        if keyword == "in":
            self._block(before, blank)
            return
        if keyword is not None and self._open:
            cause, hint = f"`{keyword}` stands outside of blocks only", f'as the name of a tensor: "{keyword}"'
            raise scanner.error(cause, at=scanner.here(), hint=hint)
        read: Callable[[Scanner], Statement] = rule if keyword is None else DECLARATIONS[keyword]
        begin = scanner.mark()
        try:
            found = read(scanner)
        except ProgramError as error:
            raise self._misspelt(error, begin) from None
        comments = self._comments(before, blank)
        self._add(replace(found, comments=comments))

    def _misspelt(self, error: ProgramError, begin: Mark) -> ProgramError:
        """`error`, with a better hint if no rule was meant: a word not quite spelt, a clause on a line of its own."""
        scanner = self._scanner
        scanner.back(begin)
        word = scanner.match(_WORD)
        if word is None or error.hint != ARROWS:
            return error
        if word in _CLAUSES:
            return ProgramError(error.message, hint=f"`{word}` stands on the line of the last tensor of its rule")
        meant = nearest(word, KEYWORDS)
        if word in KEYWORDS or meant is None or not meant.startswith("did"):
            return error
        return ProgramError(error.message, hint=meant.partition("?")[0] + "?")

    def _add(self, statement: Statement) -> None:
        (self._open[-1].body if self._open else self._top).append(statement)

    def _block(self, before: tuple[str, ...], blank: bool) -> None:
        scanner = self._scanner
        begin = scanner.mark()
        head = block_head(scanner)
        if len(self._open) >= DEEPEST_BLOCK:
            cause = f"more than {DEEPEST_BLOCK} blocks in each other"
            raise scanner.error(cause, at=scanner.since(begin), kind="limit")
        if not scanner.ended():
            raise scanner.expected("the end of the line after `{`", hint="each rule stands on a line of its own")
        at = scanner.since(begin)
        self._open.append(_Open(replace(head, comments=self._comments(before, blank)), at, []))

    def _end_of_block(self) -> bool:
        """Step over ``}``, if it stands here and is no brace that is meant."""
        scanner = self._scanner
        if not scanner.sees("}") or scanner.sees("}}"):
            return False
        if not self._open:
            raise scanner.error("`}` without a block", at=scanner.here())
        block = self._open.pop()
        found = block_end(scanner, block.head, tuple(block.body))
        scanner.comment()
        scanner.newline()
        self._add(replace(found, tail=tuple(scanner.comments)))
        return True
