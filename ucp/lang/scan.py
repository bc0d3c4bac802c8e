"""The scanner: a cursor over a program's text that knows line and column, blanks, comments and words.

Which characters make a word depends on where it stands (a tensor's name, a layout, arithmetic), so the parser asks for
what the grammar allows at its place and there is no list of tokens. Every step reads its characters once.
"""

from __future__ import annotations

import re

from ucp.errors import ProgramError
from ucp.lang.error import FORBIDDEN, Kind, program_error
from ucp.layout.expr import Span

MOST_CHARACTERS = 1 << 24
"""The longest text that is parsed."""
MOST_DIGITS = 18
"""The most digits of a number, so that every number fits 64 bits."""
DEEPEST = 32
"""The most brackets open at once, and the most blocks."""
MOST_OPERATIONS = 64
"""The most operations in one arithmetic expression."""

DTYPES = ("bool", "u8", "i8", "i16", "i32", "i64", "u16", "u32", "u64", "f16", "bf16", "f32", "f64", "f8e4m3", "f8e5m2")
"""Element types as programs call them."""
RESERVED = frozenset("any mean sum each lacking on when unless optional lossy min max".split())
"""Words that no dim, size, axis, flag or capture may have for a name, because they begin what may follow one."""

Mark = tuple[int, int, int]
"""Line, start of that line, and position in the text."""

BLANKS = re.compile(r"[ \t]*")
COMMENT = re.compile(r"#([^\n]*)")
IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
DIGITS = re.compile(r"[0-9]+")
STATE = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*|\*")
_TOKEN = re.compile(r"<->|->|<-|[A-Za-z0-9_.\-]+|[^\n]")


class Scanner:
    """A cursor over `text`, which is normalized: no byte order mark; a line feed alone ends a line."""

    __slots__ = ("_line", "_spaced", "_start", "_token", "at", "comments", "file", "text")

    def __init__(self, text: str, *, file: str) -> None:
        self.text = normalized(text, file=file)
        self.file = file
        self.at = 0
        self.comments: list[str] = []
        """Comments met since the statement began."""
        self._line = 1
        self._start = 0
        self._token: Mark = (1, 0, 0)
        self._spaced = -1

    def mark(self) -> Mark:
        """Where the cursor is, to come back to or to measure from."""
        return self._line, self._start, self.at

    def back(self, mark: Mark) -> None:
        """Return to `mark`."""
        self._line, self._start, self.at = mark

    def since(self, mark: Mark) -> Span:
        """From `mark` to the end of what was read, or to the end of the line of `mark` where that is earlier."""
        line, start, at = mark
        ending, _, end = self._token if self.at == self._spaced else self.mark()
        if line == ending:
            return line, at - start + 1, end - start + 1
        end = self.text.find("\n", at)
        return line, at - start + 1, end - start + 1

    def here(self) -> Span:
        """What stands at the cursor: a word, an arrow or one character; at the end of a line the column after it."""
        found = _TOKEN.match(self.text, self.at)
        column = self.at - self._start + 1
        return self._line, column, column + (found.end() - self.at if found else 1)

    def sees(self, literal: str) -> bool:
        """Whether `literal` stands here."""
        return self.text.startswith(literal, self.at)

    def take(self, literal: str) -> bool:
        """Step over `literal` if it stands here. It has no line end in it."""
        if not self.text.startswith(literal, self.at):
            return False
        self.at += len(literal)
        return True

    def match(self, pattern: re.Pattern[str]) -> str | None:
        """Step over what `pattern` matches here, if it does. It matches no line end."""
        found = pattern.match(self.text, self.at)
        if found is None:
            return None
        self.at = found.end()
        return found[0]

    def looks(self, pattern: re.Pattern[str]) -> bool:
        """Whether `pattern` matches here."""
        return pattern.match(self.text, self.at) is not None

    def blanks(self) -> bool:
        """Step over blanks on this line; whether there were any."""
        before = self.mark()
        self.match(BLANKS)
        self._skipped(before)
        return self.at > before[2]

    def space(self) -> None:
        """Step over blanks, ends of lines and comments."""
        before = self.mark()
        while True:
            self.match(BLANKS)
            self.comment()
            if not self.newline():
                break
        self._skipped(before)

    def comment(self) -> bool:
        """Step over a comment, which is kept in `comments`."""
        found = COMMENT.match(self.text, self.at)
        if found is None:
            return False
        self.comments.append(found[1].rstrip())
        self.at = found.end()
        return True

    def _skipped(self, before: Mark) -> None:
        """Remember that nothing was read since `before`, so that it is no part of any span."""
        if before[2] != self._spaced:
            self._token = before
        self._spaced = self.at

    def newline(self) -> bool:
        """Step over the end of a line."""
        if not self.take("\n"):
            return False
        self._line += 1
        self._start = self.at
        return True

    def ended(self) -> bool:
        """Whether nothing is left on this line but blanks and a comment, which are stepped over up to it."""
        self.blanks()
        return self.at == len(self.text) or self.text[self.at] in "\n#"

    def found(self) -> str:
        """What stands here, for a message."""
        if self.at == len(self.text):
            return "the end of the program"
        token = _TOKEN.match(self.text, self.at)
        if token is None or token[0] == "#":
            return "the end of the line" if token is None else "a comment"
        if token[0].isprintable() and token[0].isascii():
            return f"`{token[0][:60]}`"
        return "a tab" if token[0] == "\t" else f"U+{ord(token[0][0]):04X}"

    def expected(self, what: str, *, hint: str | None = None, kind: Kind = "syntax") -> ProgramError:
        """An error: the grammar asks for `what` here."""
        return self.error(f"expected {what}, found {self.found()}", at=self.here(), kind=kind, hint=hint)

    def error(self, cause: str, *, at: Span, kind: Kind = "syntax", hint: str | None = None) -> ProgramError:
        """An error at `at`."""
        return program_error(self.text, at=at, kind=kind, cause=cause, hint=hint, file=self.file)

    def identifier(self, what: str) -> str:
        """The identifier that stands here: `what`, for a message."""
        before = self.mark()
        name = self.match(IDENTIFIER)
        if name is None:
            raise self.expected(what)
        if name in RESERVED:
            raise self.error(
                f"`{name}` is a word of the language, not {what}",
                at=self.since(before),
                hint=f"call it something else; reserved: {' '.join(sorted(RESERVED))}",
            )
        return name

    def number(self, what: str, *, least: int = 0) -> int:
        """The whole number that stands here, at least `least`."""
        before = self.mark()
        digits = self.match(DIGITS)
        if digits is None:
            raise self.expected(what)
        at = self.since(before)
        if len(digits) > MOST_DIGITS:
            raise self.error(f"a number of {len(digits)} digits", at=at, kind="limit", hint=f"most: {MOST_DIGITS}")
        if self.text[self.at : self.at + 1].isalnum() or self.sees("_"):
            raise self.error("a number and a name need a blank between them", at=self.here())
        if len(digits) > 1 and digits[0] == "0":
            raise self.error("a number does not begin with 0", at=at)
        if int(digits) < least:
            raise self.error(f"{what} is at least {least}", at=at)
        return int(digits)

    def signed(self, what: str) -> int:
        """The whole number that stands here, which may be negative."""
        return -self.number(what, least=1) if self.take("-") else self.number(what)


def normalized(text: str, *, file: str) -> str:
    """`text` without byte order mark and carriage returns; ProgramError for characters that may not be there."""
    if len(text) > MOST_CHARACTERS:
        raise program_error(
            None, at=None, kind="limit", cause=f"{len(text)} characters; most: {MOST_CHARACTERS}", file=file
        )
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    bad = FORBIDDEN.search(text)
    if bad:
        line, column = text.count("\n", 0, bad.start()) + 1, bad.start() - text.rfind("\n", 0, bad.start())
        raise program_error(
            text,
            at=(line, column, column + 1),
            kind="syntax",
            cause=f"the character U+{ord(bad[0]):04X} may not be in a program",
            hint="a program is plain text: no control characters and none that change the direction of writing",
            file=file,
        )
    return text
