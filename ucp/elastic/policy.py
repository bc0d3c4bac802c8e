"""Policies: which layouts a job would like on so many ranks, the one it likes best first. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ucp.errors import UsageError
from ucp.layout import Mesh


class Policy(Protocol):
    """What a job says about layouts. Any object with this method will do."""

    def layouts(self, world: int) -> Sequence[Mesh]:
        """Layouts for a job of `world` ranks, preferred first.

        Ranks that a layout leaves over wait as spares. A layout of more than `world` ranks is refused with the others
        that do not fit (`ucp.elastic.choose`), so the least that the job can do with may be given in any case.
        """
        ...


@dataclass(frozen=True, slots=True)
class Keep:
    """All axes but one have fixed sizes; that one, of size 1 in `least`, takes what ranks there are. See `keep`."""

    least: Mesh
    grow: str
    at_most: int | None = None

    def layouts(self, world: int) -> tuple[Mesh, ...]:
        """As many along the axis that grows as fit, then fewer; the least layout if not even that fits."""
        top = max(1, min(world // self.least.size, self.at_most or world))
        return tuple(self._of(size) for size in range(top, 0, -1))

    def _of(self, size: int) -> Mesh:
        return Mesh(tuple((name, size if name == self.grow else kept) for name, kept in self.least.axes))

    def __str__(self) -> str:
        kept = [f"{name}={size}" for name, size in self.least.axes if name != self.grow]
        most = [] if self.at_most is None else [f"at_most={self.at_most}"]
        return f"keep({', '.join([*kept, f'grow={self.grow!r}', *most])})"


@dataclass(frozen=True, slots=True)
class Prefer:
    """Layouts by the number of ranks from which they are wanted, the most ranks first. See `prefer`."""

    entries: tuple[tuple[int, Mesh], ...]

    def layouts(self, world: int) -> tuple[Mesh, ...]:
        """Those for `world` ranks or fewer, the most ranks first; the one for the fewest if there is none."""
        return tuple(mesh for ranks, mesh in self.entries if ranks <= world) or (self.entries[-1][1],)

    def __str__(self) -> str:
        return f"prefer({', '.join(f'{ranks}: {mesh}' for ranks, mesh in self.entries)})"


def keep(*, grow: str = "dp", at_most: int | None = None, order: Sequence[str] | None = None, **sizes: int) -> Keep:
    """The policy that keeps the given sizes of axes, and lets `grow` have what ranks there are, `at_most` so many.

    ``keep(tp=2, pp=2)`` has ``pp2 dp3 tp2`` on 13 ranks, and one rank is spare. Where that does not fit, for its batch
    say, it is tried with less of `grow`, down to 1.

    `order` names all axes, outermost first; else ``pp`` is first, then `grow`, then the others as given, ``tp`` last,
    so that ranks which talk most are neighbours. UsageError for sizes below 1, and for an order of other axes.
    """
    if grow in sizes:
        raise UsageError(f"keep: {grow} is both kept at {sizes[grow]} and to grow", hint="grow= names another axis")
    for name, size in {**sizes, "at_most": 1 if at_most is None else at_most}.items():
        if type(size) is not int or size < 1:
            raise UsageError(f"keep: {name}={size!r}", hint="give a whole number of at least 1")
    names = _usual_order([grow, *sizes]) if order is None else list(order)
    if sorted(names) != sorted([grow, *sizes]):
        raise UsageError(f"keep: order={tuple(names)} of the axes {(grow, *sizes)}", hint="name each of them once")
    return Keep(Mesh({name: sizes.get(name, 1) for name in names}), grow, at_most)


def _usual_order(names: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda name: {"pp": 0, "tp": 2}.get(name, 1))


def prefer(layouts: Mapping[int, Mapping[str, int]]) -> Prefer:
    """The policy that lists layouts by world size: the largest that is there is taken, or else the next smaller one.

    ``prefer({8: {"dp": 4, "tp": 2}, 4: {"dp": 4}})`` has ``dp4 tp2`` from 8 ranks on, and ``dp4`` from 4 to 7. Axes are
    outermost first. UsageError for no layouts, and for one that has more ranks than the world it is for.
    """
    if not layouts:
        raise UsageError("prefer: no layouts", hint='for example prefer({8: {"dp": 4, "tp": 2}, 4: {"dp": 4}})')
    for world, sizes in layouts.items():
        wrong = [f"{name}={size!r}" for name, size in sizes.items() if type(size) is not int or size < 1]
        if wrong or type(world) is not int:
            raise UsageError(
                f"prefer: {', '.join(wrong) or Mesh(sizes)} for {world!r} ranks",
                hint="give whole numbers of at least 1",
            )
        if math.prod(sizes.values()) > world:
            mesh = Mesh(sizes)
            raise UsageError(f"prefer: {mesh} has a size of {mesh.size}, and is for a world of {world}")
    return Prefer(tuple((world, Mesh(sizes)) for world, sizes in sorted(layouts.items(), key=lambda entry: -entry[0])))
