"""A conversion program out of how every parameter is cut.

Names that differ in numbers alone, and are cut alike, become one rule. Dims are called by where they are and how large:
``rows48`` is a first dim of 48 elements; sizes are declared with their values, so the program needs no others. What is
cut unevenly has a dim of its own with its boundaries beside the program, and what no even or uneven cut describes
(parts of different sizes, gathered blocks) a placement of blocks.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ucp.errors import FitError
from ucp.lang.ast import Capture, MeshAxes, Pattern, Program, Reduce, Rule, Side, Sizes, State, Statement
from ucp.layout import Shape
from ucp.layout.expr import Concat, Cut, Dim, Expr, Layout, Pad, Product

from .cuts import Along, Whole, merged
from .info import Parameter

AXIS = "tp"
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_PREFIXES = ("rows", "cols")
_MOST_BLOCKS = 1 << 22


@dataclass(slots=True)
class Translation:
    """A program, and what is beside it: recorded boundaries and placements, as in `ucp.lang.bind.bind`."""

    program: Program
    cuts: dict[tuple[str, tuple[str, ...]], tuple[int, ...]] = field(default_factory=dict)
    placements: dict[tuple[str, str], dict[int, tuple[int, ...]]] = field(default_factory=dict)


def translate(cuts: Mapping[Parameter, Whole | Along]) -> Translation:
    """The program by which the parameters that are cut so become logical tensors of the same names."""
    made = Translation(Program(()))
    dims = _Dims(made)
    rules = [dims.rule(pattern, parameter, cuts[parameter]) for pattern, parameter in _collapsed(cuts)]
    statements: list[Statement] = [MeshAxes((AXIS,))]
    statements += [Sizes((name,), size) for name, size in dims.sizes.items()]
    statements += [*rules, State(("*",))]
    made.program = Program(tuple(statements), file="universal_checkpoint_info")
    return made


def _collapsed(cuts: Mapping[Parameter, Whole | Along]) -> Iterator[tuple[Pattern, Parameter]]:
    """A pattern for each set of parameters that are cut alike and whose names differ in numbers alone, and one of them.

    Numbers stay text where a pattern without them would also match a name that is cut otherwise.
    """
    alike: dict[str, list[Parameter]] = defaultdict(list)
    for parameter in cuts:
        alike[_NUMBER.sub("*", parameter.name)].append(parameter)
    names = [parameter.name for parameter in cuts]
    for members in alike.values():
        pattern = _pattern([member.name for member in members])
        if len({_equation(member, cuts[member]) for member in members}) == 1 and _is_own(pattern, members, names):
            yield pattern, members[0]
        else:
            yield from ((Pattern((member.name,)), member) for member in members)


def _equation(parameter: Parameter, cut: Whole | Along) -> object:
    """What decides over a parameter's equation beside its name; one that is whole needs no shape."""
    return cut if isinstance(cut, Whole) and cut.rows is None else (parameter.shapes, cut)


def _pattern(names: Sequence[str]) -> Pattern:
    """The names with a capture for each number in which they differ."""
    numbers = list(zip(*(_NUMBER.findall(name) for name in names), strict=True))
    texts = _NUMBER.split(names[0])
    parts: list[str | Capture] = [texts[0]]
    for k, (found, text) in enumerate(zip(numbers, texts[1:], strict=True)):
        if len(set(found)) == 1:
            parts.append(found[0])
        else:
            parts.append(Capture("lmnopqrstuvwxyz"[k] if k < 15 else f"n{k}"))
        parts.append(text)
    return Pattern(tuple(_joined(parts)))


def _joined(parts: Iterable[str | Capture]) -> Iterator[str | Capture]:
    """Neighbouring texts as one, without empty ones."""
    text = ""
    for part in parts:
        if isinstance(part, str):
            text += part
            continue
        if text:
            yield text
        text = ""
        yield part
    if text:
        yield text


def _is_own(pattern: Pattern, members: Sequence[Parameter], names: Sequence[str]) -> bool:
    """Whether `pattern`, whose captures match any component, matches no other name."""
    if all(isinstance(part, str) for part in pattern.parts):
        return len(members) == 1
    text = "".join(re.escape(part) if isinstance(part, str) else "[^.]+" for part in pattern.parts)
    known = {member.name for member in members}
    return all(name in known for name in names if re.fullmatch(text, name))


class _Dims:
    """Names and sizes of dims; the same name means the same size, cut alike."""

    def __init__(self, made: Translation) -> None:
        self.sizes: dict[str, int] = {}
        self._made = made

    def rule(self, pattern: Pattern, parameter: Parameter, cut: Whole | Along) -> Rule:
        """The equation of the parameters that `pattern` names."""
        if isinstance(cut, Whole):
            reduces = (Reduce("mean", (AXIS,)),) if cut.mean else ()
            if cut.rows is None:
                return Rule(Side(pattern), "<->", (Side(pattern),), reduces, lossy=cut.mean)
            shape = (cut.rows, *parameter.shapes[0][1:])
            plain: tuple[Expr, ...] = tuple(self._plain(k, n) for k, n in enumerate(shape))
            padded: tuple[Expr, ...] = (Concat((plain[0], Pad())), *plain[1:])
            return Rule(Side(pattern, Layout(padded)), "<->", (Side(pattern, Layout(plain)),), reduces, lossy=cut.mean)
        local, whole = self._cut(cut, parameter.shapes[0])
        return Rule(Side(pattern, Layout(local)), "<->", (Side(pattern, Layout(whole)),))

    def _plain(self, dim: int, size: int) -> Dim:
        return self._dim(f"{_prefix(dim)}{size}", size)

    def _dim(self, name: str, size: int) -> Dim:
        self.sizes[name] = size
        return Dim(name)

    def _cut(self, cut: Along, shape: Shape) -> tuple[tuple[Expr, ...], tuple[Expr, ...]]:
        """Dims as a rank has them and as the whole has them."""
        padded = cut.dim > 0 and cut.rows is not None
        real = (cut.rows, *shape[1:]) if cut.dim and cut.rows is not None else shape
        whole: list[Expr] = [self._plain(k, n) for k, n in enumerate(real) if k != cut.dim]
        local = [Concat((whole[0], Pad())), *whole[1:]] if padded else whole
        one, other = self._cut_dim(cut)
        return (*local[: cut.dim], one, *local[cut.dim :]), (*whole[: cut.dim], other, *whole[cut.dim :])

    def _cut_dim(self, cut: Along) -> tuple[Expr, Expr]:
        before = [self._dim(f"outer{cut.outer}", cut.outer)] if cut.outer > 1 else []
        after = [self._dim(f"inner{cut.inner}", cut.inner)] if cut.inner > 1 else []
        if (boundaries := cut.boundaries) is not None:
            if cut.rows is not None and not cut.dim:
                return self._padded(cut, boundaries)
            own = self._named(cut.dim, cut.size, boundaries)
            return _product(*before, _sliced(own), *after), _product(*before, own, *after)
        if (parts := cut.parts) is not None:
            size = cut.size // parts
            widths = [merged(held)[0][1] for held in cut.runs]
            own = self._named(cut.dim, size, tuple(sum(widths[:k]) for k in range(len(widths) + 1)))
            literal = Dim(str(parts))
            return _product(*before, literal, _sliced(own), *after), _product(*before, literal, own, *after)
        own = self._placed(cut)
        if cut.unit > 1:
            after = [self._dim(f"unit{cut.unit}", cut.unit), *after]
        return _product(*before, Dim(own.name, (Cut(AXIS, placed=True),)), *after), _product(*before, own, *after)

    def _padded(self, cut: Along, boundaries: tuple[int, ...]) -> tuple[Expr, Expr]:
        own = self._plain(cut.dim, cut.rows or 0)
        if not _is_even(boundaries):
            self._made.cuts[f"({own.name} + _)", (AXIS,)] = boundaries
        return Concat((own, Pad()), (Cut(AXIS),)), own

    def _named(self, dim: int, size: int, boundaries: tuple[int, ...]) -> Dim:
        """A dim by its size; one that is cut unevenly by its boundaries too."""
        if _is_even(boundaries):
            return self._plain(dim, size)
        number = 0
        while True:
            name = f"{_prefix(dim)}{size}u{number or ''}"
            if self._made.cuts.setdefault((name, (AXIS,)), boundaries) == boundaries:
                return self._dim(name, size)
            number += 1

    def _placed(self, cut: Along) -> Dim:
        unit = cut.unit
        if cut.size // unit > _MOST_BLOCKS:
            raise FitError(
                f"a dim of {cut.size} is cut into {cut.size // unit} blocks, more than {_MOST_BLOCKS}",
                hint="the metadata describes another model, or give program=",
            )
        blocks = {
            rank: tuple(i for start, length in held for i in range(start // unit, (start + length) // unit))
            for rank, held in enumerate(cut.runs)
        }
        number = 0
        while True:
            name = f"blocks{cut.size // unit}{f'v{number}' if number else ''}"
            if self._made.placements.setdefault((name, AXIS), blocks) == blocks:
                return self._dim(name, cut.size // unit)
            number += 1


def _prefix(dim: int) -> str:
    return _PREFIXES[dim] if dim < len(_PREFIXES) else f"dim{dim}_"


def _is_even(boundaries: Sequence[int]) -> bool:
    return len({b - a for a, b in pairwise(boundaries)}) == 1


def _sliced(dim: Dim) -> Dim:
    return Dim(dim.name, (Cut(AXIS),))


def _product(*items: Expr) -> Expr:
    return items[0] if len(items) == 1 else Product(tuple(items))
