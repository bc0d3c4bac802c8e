"""What DCP has no place for and ucp notes in ``.metadata`` all the same: ties, kinds of tensors, the step.

It is one more attribute of the pickled ``Metadata``, a dict of plain data that torch carries along unread:
``{"step": int | None, "kinds": {name: "frozen" | "buffer"}, "ties": {alias: name}, "aliases": {key: key}}``. Aliases
are keys of tied tensors: they lie at the same place as the key that they are an alias of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import cast

from ucp.catalog import Catalog, Kind
from ucp.errors import CorruptError
from ucp.tree import Tree

from .describe import Plain
from .metadata import Metadata

ATTRIBUTE = "ucp"


@dataclass(frozen=True, slots=True)
class Told:
    """What ucp noted, empty for a checkpoint that it did not write."""

    step: int | None = None
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, metadata: Metadata, where: str) -> Told:
        """Read it; CorruptError for something else under this name, or aliases that lie elsewhere."""
        noted = metadata.extra.get(ATTRIBUTE)
        if noted is None:
            return cls()
        parts = [noted.get(part) for part in ("kinds", "ties", "aliases")] if isinstance(noted, dict) else [None]
        step = noted.get("step") if isinstance(noted, dict) else None
        if not all(map(_is_names, parts)) or not (step is None or type(step) is int):
            raise _damaged(where)
        kinds, ties, aliases = cast("list[dict[str, str]]", parts)
        if not set(kinds.values()) <= {"frozen", "buffer"}:
            raise _damaged(where)
        if any(metadata.tensors.get(alias) != metadata.tensors.get(key) for alias, key in aliases.items()):
            raise _damaged(where)
        return cls(step, cast("dict[str, Kind]", kinds), ties, aliases)

    def note(self) -> dict[str, Plain]:
        """The attribute, as it is pickled."""
        plain = {"kinds": self.kinds, "ties": self.ties, "aliases": self.aliases}
        return {ATTRIBUTE: {"step": self.step, **{name: cast("Plain", dict(held)) for name, held in plain.items()}}}

    def without_aliases(self, metadata: Metadata) -> Metadata:
        """`metadata` with each tied tensor under one key."""
        return replace(metadata, tensors={k: v for k, v in metadata.tensors.items() if k not in self.aliases})

    def applied(self, catalog: Catalog) -> Catalog:
        """`catalog`, read without aliases, with ties and step."""
        tensors = catalog.tensors
        ties = {alias: name for alias, name in self.ties.items() if name in tensors and alias not in tensors}
        return replace(catalog, ties={**catalog.ties, **ties}, step=catalog.step if self.step is None else self.step)


def _is_names(held: Tree) -> bool:
    return isinstance(held, dict) and all(type(a) is str and type(b) is str for a, b in held.items())


def _damaged(where: str) -> CorruptError:
    return CorruptError(
        f"{where}: what ucp noted in .metadata ({ATTRIBUTE}) does not fit the rest",
        hint="copy the whole folder again, or write it again",
    )
