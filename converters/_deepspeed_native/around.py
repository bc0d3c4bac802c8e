"""What Trainer and Accelerate put around a tag folder, written again beside the new one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ucp.container.torchwrite import dumps
from ucp.store import Store
from ucp.tree import Tree

from .._deepspeed_universal.carry import CLASSES, carry, inlined


def carried(around: Tree, *, tag: str) -> tuple[dict[str, Tree], list[str]]:
    """The files that can be written as they were, by name, and the names of the others.

    A pickle that names classes of which it is not known that they are harmless is left out whole: part of it would be
    taken for all of it.
    """
    kept: dict[str, Tree] = {}
    left: list[str] = []
    for name, content in around.items() if isinstance(around, dict) else ():
        dropped: list[str] = []

        def drop(path: str, reason: str, dropped: list[str] = dropped) -> None:
            dropped.append(f"{path} {reason}")

        held = {name: content} if isinstance(content, bytes) else carry({name: content}, "around", drop)
        if dropped or "/" in str(name) or str(name) in ("latest", tag) or str(name).startswith("."):
            left.append(str(name))
        else:
            kept[str(name)] = held[name]
    return kept, left


def files(kept: Mapping[str, Tree], store: Store) -> Iterator[tuple[str, bytes]]:
    """Path and bytes of each file."""
    for name, content in kept.items():
        if isinstance(content, bytes):
            yield name, content
        else:
            yield name, dumps(inlined(content, store), archive=name.rpartition(".")[0] or name, classes=CLASSES)
