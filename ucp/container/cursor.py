"""Reading a pickle's bytes, and the plain values in them, within bounds."""

from __future__ import annotations

import struct
from codecs import escape_decode
from typing import NoReturn

from ucp.errors import CorruptError
from ucp.tree import Tree

_MOST_INT_BYTES = 1024
_MOST_INT_DIGITS = 2400
_AGAIN = "get the file again from where it was written"


class PickleTruncatedError(CorruptError):
    """The pickle goes on past the end of the bytes given."""


class Cursor:
    """A position in the bytes of a pickle, a stack that values are pushed on, and a budget of what may be copied.

    `where` names the file in errors.
    """

    def __init__(self, data: bytes, *, where: str, start: int) -> None:
        self.data = data
        self.position = start
        self.where = where
        self._stack: list[Tree] = []
        self._budget = 4 * len(data) + (1 << 20)

    def fail(self, problem: str) -> NoReturn:
        """Raise a CorruptError that names file and position."""
        raise self._error(problem)

    def spend(self, amount: int) -> None:
        """Account for `amount` bytes or elements copied, so that a few opcodes cannot multiply without end."""
        self._budget -= amount
        if self._budget < 0:
            self.fail("describes far more data than it holds")

    def _error(self, problem: str) -> CorruptError:
        return CorruptError(
            f"{self.where}: the pickle in it is damaged or forged: {problem}, at byte {self.position} of it",
            hint=_AGAIN,
        )

    def _truncated(self) -> NoReturn:
        raise PickleTruncatedError(
            f"{self.where}: the pickle in it is cut short after {len(self.data)} bytes",
            hint=_AGAIN,
        )

    def _take(self, count: int) -> bytes:
        chunk = self.data[self.position : self.position + count]
        if len(chunk) != count:
            self._truncated()
        self.position += count
        return chunk

    def _byte(self) -> int:
        if self.position >= len(self.data):
            self._truncated()
        self.position += 1
        return self.data[self.position - 1]

    def _number(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little")

    def _line(self) -> bytes:
        end = self.data.find(b"\n", self.position)
        if end < 0:
            self._truncated()
        line = self.data[self.position : end]
        self.position = end + 1
        return line

    def _digits(self) -> str:
        line = self._line()
        if len(line) > _MOST_INT_DIGITS:
            self.fail("a very large number")
        return line.decode("ascii")

    def _none(self) -> None:
        self._stack.append(None)

    def _true(self) -> None:
        self._stack.append(True)

    def _false(self) -> None:
        self._stack.append(False)

    def _int(self) -> None:
        text = self._digits()
        self._stack.append(text == "01" if text in ("00", "01") else int(text))

    def _long(self) -> None:
        self._stack.append(int(self._digits().removesuffix("L")))

    def _binint(self) -> None:
        self._stack.append(int.from_bytes(self._take(4), "little", signed=True))

    def _binint1(self) -> None:
        self._stack.append(self._byte())

    def _binint2(self) -> None:
        self._stack.append(self._number(2))

    def _long_of(self, count: int) -> None:
        if count > _MOST_INT_BYTES:
            self.fail("a very large number")
        self._stack.append(int.from_bytes(self._take(count), "little", signed=True))

    def _long1(self) -> None:
        self._long_of(self._byte())

    def _long4(self) -> None:
        self._long_of(self._number(4))

    def _float(self) -> None:
        self._stack.append(float(self._digits()))

    def _binfloat(self) -> None:
        self._stack.append(struct.unpack(">d", self._take(8))[0])

    def _text(self, raw: bytes) -> None:
        self._stack.append(raw.decode("utf-8", "surrogatepass"))

    def _string2(self, raw: bytes) -> None:
        """Push a Python 2 string: text if it is UTF-8 as torch.load takes it, else bytes."""
        try:
            self._stack.append(raw.decode("utf-8"))
        except UnicodeDecodeError:
            self._stack.append(raw)

    def _string(self) -> None:
        line = self._line()
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in b"'\"":
            self.fail("a string without quotes")
        self._string2(escape_decode(line[1:-1])[0])

    def _binstring(self) -> None:
        self._string2(self._take(self._number(4)))

    def _short_binstring(self) -> None:
        self._string2(self._take(self._byte()))

    def _unicode(self) -> None:
        self._stack.append(self._line().decode("raw-unicode-escape"))

    def _short_binunicode(self) -> None:
        self._text(self._take(self._byte()))

    def _binunicode(self) -> None:
        self._text(self._take(self._number(4)))

    def _binunicode8(self) -> None:
        self._text(self._take(self._number(8)))

    def _short_binbytes(self) -> None:
        self._stack.append(self._take(self._byte()))

    def _binbytes(self) -> None:
        self._stack.append(self._take(self._number(4)))

    def _binbytes8(self) -> None:
        self._stack.append(self._take(self._number(8)))
