"""Tensors of a torch file as they are added to its tree: slots, and the sections that fill them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from ucp.container.pickler import Zeros
from ucp.container.torchwrite import Slot, TorchFrame
from ucp.layout import FlatRange, itemsize
from ucp.plan import Cover, Section, Task, TensorSpec, Witness
from ucp.tree import Tree


@dataclass(slots=True)
class Slots:
    """Collects the tensors of one file, in the order in which its tree has them."""

    _runs: list[tuple[Cover, str, Witness | None]] = field(default_factory=list)
    _count: int = 0

    def tensor(self, cover: Cover, *, dtype: str, witness: Witness | None = None) -> Slot:
        """A tensor of the cover's shape, written in `dtype`."""
        self._runs.append((cover, dtype, witness))
        return self._slot(TensorSpec(cover.spec.shape, dtype), None)

    def flat(self, covers: Iterable[tuple[int, Cover]], length: int, *, dtype: str) -> Slot:
        """A flat tensor of `length` elements: covers at element offsets, ascending, and zeros between them."""
        parts: list[int | Zeros] = []
        at, width = 0, itemsize(dtype)
        for offset, cover in covers:
            parts += [Zeros((offset - at) * width)] if offset > at else []
            parts.append(cover.spec.size * width)
            self._runs.append((cover, dtype, None))
            at = offset + cover.spec.size
        parts += [Zeros((length - at) * width)] if length > at else []
        return self._slot(TensorSpec((length,), dtype), tuple(parts))

    def _slot(self, spec: TensorSpec, parts: tuple[int | Zeros, ...] | None) -> Slot:
        self._count += 1
        return Slot(self._count - 1, spec, parts)

    def task(self, path: str, tree: Tree, *, classes: Collection[str]) -> Task:
        """The task that writes `tree` to `path`."""
        frame = TorchFrame.of(tree, archive=path.rpartition("/")[2].removesuffix(".pt"), classes=classes)
        sections = tuple(
            Section(offset, FlatRange(0, cover.spec.size), cover, witness, dtype)
            for offset, (cover, dtype, witness) in zip(frame.offsets, self._runs, strict=True)
        )
        return Task(path, frame.size, frame, sections)
