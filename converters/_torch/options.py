"""The options of reading, as the command line or Python gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ucp.errors import NotFoundError, UsageError

Listed = Sequence[str] | str


@dataclass(frozen=True, slots=True)
class Options:
    """What to read of a folder or file, and what settles the names of numbered states."""

    file: str | None = None
    model: tuple[str, ...] = ()
    optimizer: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    order: tuple[str, ...] = ()

    @classmethod
    def of(cls, *, file: str | None, model: Listed, optimizer: Listed, frozen: Listed, order: Listed) -> Options:
        """Lists out of text with blanks between; `order` may be the path of a text file with a name per line."""
        if file is not None and not isinstance(file, str):
            raise UsageError(f"torch: file is the name of a file, not {file!r}")
        if isinstance(order, str) and order.endswith(".txt"):
            return cls(file, listed(model), listed(optimizer), listed(frozen), _lines(order))
        return cls(file, listed(model), listed(optimizer), listed(frozen), listed(order))

    def given(self) -> dict[str, object]:
        """Those that were given, by name."""
        named = {name: getattr(self, name) for name in ("file", "model", "optimizer", "frozen", "order")}
        return {name: value for name, value in named.items() if value}


def listed(value: Listed) -> tuple[str, ...]:
    """Names or patterns; UsageError for anything else."""
    names = tuple(value.split()) if isinstance(value, str) else tuple(value)
    if not all(isinstance(name, str) for name in names):
        raise UsageError(f"torch: {value!r} is no list of names")
    return names


def _lines(path: str) -> tuple[str, ...]:
    try:
        with open(path, encoding="utf-8") as file:
            return tuple(line.strip() for line in file if line.strip())
    except (OSError, ValueError) as error:
        raise NotFoundError(f"order: {path} cannot be read: {error}") from error
