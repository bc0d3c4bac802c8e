"""Programs from Python, for those who generate rules: the same syntax tree that text gives.

    >>> from ucp.lang import format_program
    >>> from ucp.lang.build import dims, let, mesh, pad, program, rule, size, tensor, within
    >>> groups, r, d, hidden, vocab = dims("groups r d hidden vocab")
    >>> made = program(
    ...     mesh("tp pp"),
    ...     size("groups heads d hidden vocab"),
    ...     let("r", "heads / groups"),
    ...     rule(tensor("emb.w")[(vocab + pad) / "tp", hidden], tensor("embed.w")[vocab, hidden], on={"pp": 0}),
    ...     within(
    ...         "layers.{l/pp}",
    ...         "layers.{l}",
    ...         rule(
    ...             tensor("qkv.w")[groups / "tp" * (r * d + d + d), hidden],
    ...             tensor("q.w")[groups * r * d, hidden],
    ...             tensor("k.w")[groups * d, hidden],
    ...             tensor("v.w")[groups * d, hidden],
    ...         ),
    ...     ),
    ... )
    >>> print(format_program(made), end="")
    format 1
    mesh tp pp
    size groups heads d hidden vocab
    let r = heads / groups
    emb.w  [(vocab + _)/tp, hidden]  <->  embed.w [vocab, hidden]  on pp 0
    <BLANKLINE>
    in layers.{l/pp} {
      qkv.w  [groups/tp (r d + d + d), hidden]  <->  q.w [groups r d, hidden],
                                                     k.w [groups d, hidden],
                                                     v.w [groups d, hidden]
    }

``a * b`` composes, ``a + b`` concatenates, ``a / "tp"`` cuts and ``a @ "ep"`` places. Python's order of operators
holds: ``a * b / "tp"`` is ``(a b)/tp``. Names are written as in text, without quotes. Arithmetic is text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from ucp.lang.ast import (
    Arrow,
    Condition,
    Drop,
    Factor,
    Flags,
    In,
    Let,
    MeshAxes,
    On,
    Pack,
    Pattern,
    Program,
    Reduce,
    Rule,
    Side,
    Sizes,
    State,
    Statement,
    Tie,
)
from ucp.lang.canonical import canonical
from ucp.lang.parser_layout import LayoutParser
from ucp.lang.parser_names import pattern
from ucp.lang.parser_rules import same_names
from ucp.lang.scan import Scanner
from ucp.layout.expr import Arith, Concat, Cut, Dim, Every, Expr, Layout, Pad, Product, concat, product


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a layout, with the operators that make larger ones."""

    expr: Expr

    def __mul__(self, other: Part | int) -> Part:
        return Part(product((self.expr, _expr(other))))

    def __rmul__(self, other: int) -> Part:
        return Part(product((_expr(other), self.expr)))

    def __add__(self, other: Part | int) -> Part:
        return Part(concat((self.expr, _expr(other))))

    def __radd__(self, other: int) -> Part:
        return Part(concat((_expr(other), self.expr)))

    def __truediv__(self, axis: str) -> Part:
        return self._cut(Cut(axis))

    def __matmul__(self, axis: str) -> Part:
        return self._cut(Cut(axis, placed=True))

    def _cut(self, cut: Cut) -> Part:
        """Cut once more: cuts of one part follow each other, outermost first."""
        expr = self.expr
        if isinstance(expr, Dim):
            return Part(Dim(expr.name, (*expr.cuts, cut)))
        if isinstance(expr, Product):
            return Part(Product(expr.items, (*expr.cuts, cut)))
        if isinstance(expr, Concat):
            return Part(Concat(expr.parts, (*expr.cuts, cut)))
        return Part(product((expr,), (cut,)))


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor without a layout; ``tensor[a, b]`` is one with it, and ``tensor[()]`` a scalar."""

    name: Pattern
    dtype: str | None = None

    def __getitem__(self, dims: Part | int | tuple[Part | int, ...]) -> Side:
        found = dims if isinstance(dims, tuple) else (dims,)
        return Side(self.name, layout(*found, dtype=self.dtype))


pad = Part(Pad())
"""``_``, a part of a concatenation."""


def pad_to(align: str) -> Part:
    """``_ align …``, such as ``pad_to("2 * dp")``."""
    return Part(Pad(arithmetic(align)))


def dim(name: str | int) -> Part:
    """A named dim, or a number that stands for itself."""
    return Part(Dim(str(name)))


def dims(names: str) -> tuple[Part, ...]:
    """Several named dims, separated by blanks."""
    return tuple(map(dim, names.split()))


def every(item: Part) -> Part:
    """``*item``, in a pack."""
    return Part(Every(item.expr))


def layout(*found: Part | int, dtype: str | None = None) -> Layout:
    """A layout by itself, for `state`."""
    return Layout(tuple(map(_expr, found)), dtype)


def tensor(text: str, dtype: str | None = None) -> Tensor:
    """A tensor by name, such as ``layers.{l/pp}.weight``; `dtype` is for the layout that follows."""
    return Tensor(name(text), dtype)


def name(text: str, *, wild: bool = False) -> Pattern:
    """A name as text has it in quotes, without them; `wild`: ``**`` matches anything, for `drop`."""
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    scanner = Scanner(f'"{quoted}"', file="<name>")
    found = pattern(scanner, wild=wild)
    if scanner.at < len(scanner.text):
        raise scanner.expected("the end of the name")
    return found


def arithmetic(text: str) -> Arith:
    """Arithmetic as text has it."""
    scanner = Scanner(text, file="<arithmetic>")
    scanner.blanks()
    found = LayoutParser(scanner).arithmetic()
    if scanner.at < len(scanner.text):
        raise scanner.expected("the end of the expression")
    return found


def mesh(axes: str) -> MeshAxes:
    """``mesh pp tp dp``."""
    return MeshAxes(tuple(axes.split()))


def axis(whole: str, parts: str) -> Factor:
    """``axis tp = kv * rep``: ``axis("tp", "kv rep")``, outermost first."""
    return Factor(whole, tuple(parts.split()))


def size(names: str, default: int | None = None) -> Sizes:
    """``size hidden ffn``, or one size with its default."""
    return Sizes(tuple(names.split()), default)


def let(size: str, value: str) -> Let:
    """``let r = heads / groups``."""
    return Let(size, arithmetic(value))


def flag(names: str) -> Flags:
    """``flag tied``."""
    return Flags(tuple(names.split()))


def drop(*names: str) -> Drop:
    """``drop **._extra_state``."""
    return Drop(tuple(name(text, wild=True) for text in names))


def tie(alias: str, to: str, *, when: str = "", unless: str = "") -> Tie:
    """``tie lm_head.weight to embed.weight when tied``."""
    return Tie(name(alias), name(to), _conditions(when, unless))


def pack(names: str, content: Part, *, reverse: bool = False) -> Pack:
    """``pack {g} [(*param + _)/dp]``."""
    return Pack(name(names), content.expr, reverse)


def state(
    names: str,
    own: Layout | None = None,
    *,
    lacking: Sequence[int] = (),
    each: str = "",
    replicas: Mapping[str, str] | None = None,
) -> State:
    """``state exp_avg : like param``, or a state with a layout of its `own`."""
    return State(tuple(names.split()), own, tuple(lacking), tuple(each.split()), _reduces(replicas))


def rule(
    source: Side | Tensor,
    target: Side | Tensor,
    *further: Side | Tensor,
    arrow: Arrow = "<->",
    replicas: Mapping[str, str] | None = None,
    on: Mapping[str, int] | None = None,
    when: str = "",
    unless: str = "",
    optional: bool = False,
    lossy: bool = False,
) -> Rule:
    """An equation. `replicas`: ``{"mean": "tp"}``; `when`, `unless`: flags, of which all hold or none."""
    sides = tuple(map(_side, (target, *further)))
    conditions = _conditions(when, unless)
    return Rule(_side(source), arrow, sides, _reduces(replicas), _on(on), conditions, optional, lossy)


def within(
    source: str,
    target: str | None,
    *body: Rule | In,
    on: Mapping[str, int] | None = None,
    when: str = "",
    unless: str = "",
    optional: bool = False,
) -> In:
    """``in source <-> target { … }``. Without a target: the same names."""
    start = name(source)
    other = same_names(start) if target is None else name(target)
    return In(start, other, body, _on(on), _conditions(when, unless), optional)


def program(*statements: Statement, file: str = "<program>") -> Program:
    """The program of `statements`, held to the grammar; ProgramError, with the text, where it does not follow it."""
    return canonical(Program(statements, file=file))


def _expr(part: Part | int) -> Expr:
    return part.expr if isinstance(part, Part) else Dim(str(part))


def _side(side: Side | Tensor) -> Side:
    return side if isinstance(side, Side) else Side(side.name)


def _reduces(replicas: Mapping[str, str] | None) -> tuple[Reduce, ...]:
    kinds = (replicas or {}).items()
    return tuple(Reduce(cast(Literal["any", "mean", "sum"], kind), tuple(axes.split())) for kind, axes in kinds)


def _on(on: Mapping[str, int] | None) -> tuple[On, ...]:
    return tuple(On(name, index) for name, index in (on or {}).items())


def _conditions(when: str, unless: str) -> tuple[Condition, ...]:
    wanted = [Condition(flag, wanted=True) for flag in when.split()]
    return (*wanted, *(Condition(flag, wanted=False) for flag in unless.split()))
