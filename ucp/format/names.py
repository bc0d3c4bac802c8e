"""Names as path components: reversible, and safe on every file system and object store.

Only ASCII letters, digits and ``. _ -`` stand for themselves; every other byte of the UTF-8 name is ``=`` and two hex
digits. ``%`` is not used because object-store clients encode it a second time. Names that differ only by case get
components that differ on file systems that ignore case: the upper-case letters are noted after ``=u``.

Normative text: spec/universal-format.md, "Names".
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator

from ucp.errors import CorruptError, FitError

NAME_LIMIT = 160
"""Most bytes of a tensor name's component; a longer one is cut and ends in ``=h`` and a hash."""

STATE_LIMIT = 39
"""Most bytes of a state name's part of a component."""

_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
_WINDOWS = frozenset(["con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))])
_EMPTY = "=z"
_HASH_MARK = "=h"
_CASE = re.compile(r"=u([0-9a-f]+)$")
_TOKEN = re.compile(r"=[0-9a-f]{2}|[A-Za-z0-9._-]")


def escape(name: str, *, limit: int = NAME_LIMIT) -> str:
    """`name` as one path component of at most `limit` ASCII bytes.

    Different names give components that differ even where case is ignored. FitError for a name that is not Unicode
    (a lone surrogate).

    >>> escape("layers.0/Norm.weight")
    'layers.0=2fNorm.weight=u40'
    """
    try:
        raw = name.encode()
    except UnicodeEncodeError as error:
        raise FitError(f"{name!r} is not a valid Unicode name: {error.reason}") from error
    text = _guarded("".join(chr(byte) if byte in _PLAIN else f"={byte:02x}" for byte in raw))
    whole = f"{text}{_case_mark(name)}" or _EMPTY
    if len(whole) <= limit:
        return whole
    tail = _HASH_MARK + base64.b32encode(hashlib.sha256(raw).digest()).decode().lower()[:26]
    return _cut(text, limit - len(tail)) + tail


def unescape(component: str) -> str | None:
    """The name that `escape` made `component` from, or None where it was cut and only metadata knows it.

    CorruptError for a component that `escape` does not make.
    """
    if _HASH_MARK in component:
        return None
    case = _CASE.search(component)
    text = component[: case.start()] if case else component
    tokens = _TOKEN.findall(text) if component != _EMPTY else []
    raw = bytes(int(token[1:], 16) if len(token) == 3 else ord(token) for token in tokens)
    try:
        name = raw.decode()
        if escape(name, limit=len(component)) == component:
            return name
    except (UnicodeDecodeError, FitError):
        pass
    raise CorruptError(f"{component!r} is not an escaped name")


def component(name: str, state: str | None = None) -> str:
    """Folder of the array of tensor `name`; with `state`, of the array beside it that starts with that state."""
    return escape(name) if state is None else f"{escape(name)}@{escape(state, limit=STATE_LIMIT)}"


def _guarded(text: str) -> str:
    """Escape a first or last character that would make the component special somewhere."""
    if text.endswith("."):
        text = f"{text[:-1]}=2e"
    special = text.lower() == "zarr.json" or text.lower().partition(".")[0] in _WINDOWS
    if special or text.startswith((".", "__")):
        text = f"={ord(text[0]):02x}{text[1:]}"
    return text


def _case_mark(name: str) -> str:
    """``=u`` and a hex number whose bit i says that the i-th ASCII letter is upper case; empty if none is."""
    letters = [char for char in name if char.isascii() and char.isalpha()]
    mask = sum(1 << i for i, char in enumerate(letters) if char.isupper())
    return f"=u{mask:x}" if mask else ""


def _cut(text: str, limit: int) -> str:
    """The longest start of `text` of at most `limit` bytes that does not end inside an escape."""
    return "".join(_whole_tokens(text, limit))


def _whole_tokens(text: str, limit: int) -> Iterator[str]:
    for token in _TOKEN.findall(text):
        limit -= len(token)
        if limit < 0:
            return
        yield token
