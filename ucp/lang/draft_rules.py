"""The rules of a draft: families that were decided, as statements of a program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ucp.lang.ast import Capture, Comments, In, MeshAxes, On, Pattern, Program, Rule, Side, Sizes, Statement
from ucp.lang.draft_dims import Dims, hidden_size
from ucp.lang.draft_marks import marks
from ucp.lang.draft_names import Family, complete, dotted, with_cut
from ucp.lang.draft_states import states
from ucp.lang.draft_tensor import Tensor
from ucp.lang.held import Held
from ucp.lang.match import describe
from ucp.layout.expr import Cut, Dim, Expr, Layout

_ABOUT = " A draft: `undecided` marks what the checkpoint does not tell, `inferred` says what was concluded from what."


@dataclass
class _Line:
    """A rule, and how much of its names can stand before a block: the components up to the first number."""

    rule: Rule
    source: tuple[str | Capture, ...]
    target: Pattern


def assemble(tensors: Sequence[Tensor], held: Sequence[Held], axes: Sequence[str], sizes: dict[str, int]) -> Program:
    """The program of all `tensors` over the mesh `axes`; `sizes` are names that lengths have already."""
    said = states(held)
    for tensor in tensors:
        odd = next((said.odd[name] for name in tensor.family.members if name in said.odd), None)
        if odd is not None and not tensor.cuts:
            tensor.shape, tensor.odd = None, odd
    captured = {capture.name for tensor in tensors for capture in tensor.family.captures}
    dims = Dims(dict(sizes), frozenset({*axes, *captured}))
    width = hidden_size((t.family.words, t.whole) for t in tensors if t.whole is not None)
    if width is not None:
        dims.suggest("hidden", width)
    used: set[str] = set()
    taken = {describe(tensor.family.pattern) for tensor in tensors}
    lines = [_line(tensor, dims, used, taken) for tensor in tensors]
    body = _blocks(lines)
    head: list[Statement] = []
    if axes:
        head.append(MeshAxes(tuple(axes)))
    named = tuple(name for name in dims.sizes if name in used)
    if named:
        head.append(Sizes(named))
    statements = [*head, *_spaced(body), *_spaced(said.statements)]
    grounds = Counter(one.doubt for t in tensors for one in t.found if one.doubt and one.doubt.startswith("inferred"))
    about = [f" {text} ({n} {'rule' if n == 1 else 'rules'})" for text, n in grounds.items()]
    return Program(tuple(statements), comments=Comments(before=(_ABOUT, *about)))


def _spaced(statements: Sequence[Statement]) -> list[Statement]:
    """The first with a blank line before it."""
    if not statements:
        return []
    first = statements[0]
    return [replace(first, comments=replace(first.comments, blank=True)), *statements[1:]]


def _line(tensor: Tensor, dims: Dims, used: set[str], taken: set[str]) -> _Line:
    family = tensor.family
    layout = None
    names: tuple[str, ...] = ()
    if tensor.shape is not None and tensor.whole is not None:
        names = dims.names(family.words, tensor.whole)
        used |= set(names)
        layout = Layout(tuple(Dim(name, _cuts(tensor, number)) for number, name in enumerate(names)))
    source = family.components
    for one in tensor.found:
        if one.kind == "numbers":
            source = with_cut(Family(source, family.members), one.capture, one.axis)
    target, right = _target(tensor, names, layout is None, taken)
    on = tuple(On(one.axis, one.index) for one in tensor.found if one.kind == "place")
    comments = Comments(before=tuple(_comments(tensor)))
    rule = Rule(
        Side(dotted(source), layout), "<->", (Side(target, right),), on=on, optional=tensor.partial, comments=comments
    )
    return _Line(rule, source, target)


def _cuts(tensor: Tensor, dim: int) -> tuple[Cut, ...]:
    return tuple(Cut(one.axis) for one in tensor.cuts if one.dim == dim)


def _target(tensor: Tensor, names: tuple[str, ...], bare: bool, taken: set[str]) -> tuple[Pattern, Layout | None]:
    """The logical name: what a known program calls it, where that is free, else the name it has."""
    own = Pattern(tuple(Capture(p.name) if isinstance(p, Capture) else p for p in tensor.family.pattern.parts))
    said = next((one for one in tensor.known if one.plain), None)
    if said is None or said.target is None or said.order is None or bare or _splits(tensor):
        return own, None
    stacked = any(isinstance(one, str) for one in said.order)
    if stacked and not complete(tensor.family):
        return own, None
    if describe(said.target) in taken and describe(said.target) != describe(own):
        return own, None
    taken.add(describe(said.target))
    exprs: list[Expr] = [Dim(names[one] if isinstance(one, int) else one) for one in said.order]
    return said.target, Layout(tuple(exprs)) if stacked else None


def _splits(tensor: Tensor) -> bool:
    """Whether the program that knows most says that the tensor is several, or transposed."""
    return bool(tensor.known) and not tensor.known[0].plain


def _comments(tensor: Tensor) -> list[str]:
    doubts = [one.doubt for one in tensor.found if one.doubt is not None and one.doubt.startswith("undecided")]
    cut = [one.axis for one in tensor.cuts]
    if tensor.odd is not None:
        doubts.append(f"undecided: its state {tensor.odd} has a shape of its own, so all are taken as they are")
    elif tensor.shape is None:
        doubts.append("undecided: members have different shapes, so each is taken as it is, without a layout")
    return [f" {text}" for text in (*doubts, *marks(tensor.family, tensor.whole, tensor.known, cut))]


def _blocks(lines: Sequence[_Line]) -> list[Statement]:
    """Rules with the same start, up to the first number in their names, as blocks."""
    groups: dict[tuple[object, ...], list[_Line]] = {}
    for line in lines:
        start = _start(line.source)
        lead = _start(_components(line.target))
        key = (start, lead) if start and lead and start != line.source else (line.source, line.target)
        groups.setdefault(key, []).append(line)
    body: list[Statement] = []
    for group in groups.values():
        start, lead = _start(group[0].source), _start(_components(group[0].target))
        if len(group) == 1 or not start or not lead:
            body.extend(line.rule for line in group)
            continue
        rules = tuple(_inside(line, len(start), len(lead)) for line in group)
        body.append(In(dotted(start), dotted(lead), rules, comments=Comments(blank=True)))
    return body


def _start(components: tuple[str | Capture, ...]) -> tuple[str | Capture, ...]:
    """Components up to and with the first number; none where there is no number, or nothing behind it."""
    for number, part in enumerate(components[:-1]):
        if isinstance(part, Capture):
            return components[: number + 1]
    return ()


def _components(pattern: Pattern) -> tuple[str | Capture, ...]:
    """A pattern by dotted components; captures are whole components here."""
    found: list[str | Capture] = []
    for part in pattern.parts:
        if isinstance(part, str):
            found += [piece for piece in part.split(".") if piece]
        elif isinstance(part, Capture):
            found.append(part)
    return tuple(found)


def _inside(line: _Line, source: int, target: int) -> Rule:
    rule = line.rule
    right = rule.targets[0]
    return replace(
        rule,
        source=replace(rule.source, name=dotted(line.source[source:])),
        targets=(replace(right, name=dotted(_components(right.name)[target:])),),
    )
