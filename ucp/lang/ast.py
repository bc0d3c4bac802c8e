"""The syntax tree of a conversion program: what the text says, with nothing resolved.

Text, JSON and Python builders all make these nodes. `at` and comments take no part in comparison.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ucp.layout.expr import Arith, Cut, Expr, Layout, Span

Arrow = Literal["<->", "->", "<-"]


@dataclass(frozen=True, slots=True)
class Comments:
    """Comment lines before a statement and the comment at its end, without ``#``; kept by the formatter only."""

    before: tuple[str, ...] = ()
    after: str | None = None
    blank: bool = False
    """Whether a blank line stands before the statement."""


@dataclass(frozen=True, slots=True)
class Capture:
    """``{l/vpp/pp}`` in a name: a number, or one dotted component where nothing needs it to be a number.

    With `offset`, ``{l/pp+2}``, the text in the name is the (local) number plus it.
    """

    name: str
    cuts: tuple[Cut, ...] = ()
    offset: Arith | None = None
    at: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Wild:
    """``**`` in a name of a `drop`: anything, dots too."""

    at: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Computed:
    """``{=l+3}`` in a name: a number that sizes decide, here the number of layers plus three."""

    value: Arith
    at: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Pattern:
    """A tensor name with captures: literal text and captures in order. ``()`` is the empty name."""

    parts: tuple[str | Capture | Computed | Wild, ...]
    at: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Side:
    """One tensor of an equation. Without a layout: the source's own geometry, or on the right the left one's dims."""

    name: Pattern
    layout: Layout | None = None


@dataclass(frozen=True, slots=True)
class Reduce:
    """What is done with the replicas along `axes`; without it they are compared."""

    kind: Literal["any", "mean", "sum"]
    axes: tuple[str, ...]
    at: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Condition:
    """``when flag`` or ``unless flag``. A mesh axis is a flag too: whether it has more than one rank."""

    flag: str
    wanted: bool
    at: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class On:
    """``on pp -1``: only the coordinate `index` of `axis` holds the tensor; negative counts from the last."""

    axis: str
    index: int
    at: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class MeshAxes:
    """``mesh pp tp dp``: the axes, in no particular order."""

    axes: tuple[str, ...]
    at: Span | None = field(default=None, compare=False, repr=False)
    comments: Comments = field(default=Comments(), compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Factor:
    """``axis tp = kv * rep``: an axis as the product of finer ones, outermost first."""

    axis: str
    parts: tuple[str, ...]
    at: Span | None = field(default=None, compare=False, repr=False)
    comments: Comments = field(default=Comments(), compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Sizes:
    """``size hidden ffn`` or, with a default, ``size divisible = 128``."""

    names: tuple[str, ...]
    default: int | None = None
    at: Span | None = field(default=None, compare=False, repr=False)
    comments: Comments = field(default=Comments(), compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Let:
    """``let r = heads / groups``: an equality between sizes; `name` is a size of its own and may be used as a dim."""

    name: str
    value: Arith
    at: Span | None = field(default=None, compare=False, repr=False)
    comments: Comments = field(default=Comments(), compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Flags:
    """``flag tied``: a yes or no that conditions ask for."""

    names: tuple[str, ...]
    at: Span | None = field(default=None, compare=False, repr=False)
    comments: Comments = field(default=Comments(), compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Rule:
    """One equation: a source tensor, and the logical tensors it is made of, in the order of its parts."""

    source: Side
    arrow: Arrow
    targets: tuple[Side, ...]
    reduces: tuple[Reduce, ...] = ()
    on: tuple[On, ...] = ()
    conditions: tuple[Condition, ...] = ()
    optional: bool = False
    lossy: bool = False
    at: Span | None = field(default=None, compare=False, repr=False)
    comments: Comments = field(default=Comments(), compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class In:
    """``in source <-> target { … }``: a common start of names, joined to them with a dot."""

    source: Pattern
    target: Pattern
    body: tuple[Statement, ...]
    on: tuple[On, ...] = ()
    conditions: tuple[Condition, ...] = ()
    optional: bool = False
    at: Span | None = field(default=None, compare=False, repr=False)
    comments: Comments = field(default=Comments(), compare=False, repr=False)
    tail: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """Comment lines before the closing brace."""


@dataclass(frozen=True, slots=True)
class Drop:
    """``drop **._extra_state``: source tensors that carry nothing to keep."""

    names: tuple[Pattern, ...]
    at: Span | None = field(default=None, compare=False, repr=False)
    comments: Comments = field(default=Comments(), compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Tie:
    """``tie lm_head.weight to embed.weight when tied``: two logical names for one tensor; the second holds it."""

    alias: Pattern
    name: Pattern
    conditions: tuple[Condition, ...] = ()
    at: Span | None = field(default=None, compare=False, repr=False)
    comments: Comments = field(default=Comments(), compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class State:
    """How optimizer states lie: ``like param``, or a layout of their own (a scalar, mostly).

    `lacking` lists dims of the source tensor that a factored state does not have (negative counts from the last).
    `each` names axes along which every coordinate has its own: the logical state gets a leading dim for each of them.
    ``*`` among `names` stands for every state not named elsewhere.
    """

    names: tuple[str, ...]
    layout: Layout | None = None
    lacking: tuple[int, ...] = ()
    each: tuple[str, ...] = ()
    reduces: tuple[Reduce, ...] = ()
    at: Span | None = field(default=None, compare=False, repr=False)
    comments: Comments = field(default=Comments(), compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Pack:
    """``pack {g} [(*param + _)/dp]``: flat buffers of many parameters, in the order the source records.

    `reverse`: parameters lie in the buffer in reverse order.
    """

    name: Pattern
    expr: Expr
    reverse: bool = False
    at: Span | None = field(default=None, compare=False, repr=False)
    comments: Comments = field(default=Comments(), compare=False, repr=False)


Statement = MeshAxes | Factor | Sizes | Let | Flags | Rule | In | Drop | Tie | State | Pack


@dataclass(frozen=True, slots=True)
class Program:
    """A whole program. `text` and `file` serve messages: the lines to quote and the name to call them by."""

    statements: tuple[Statement, ...]
    format: int = 1
    file: str = field(default="<program>", compare=False)
    text: str | None = field(default=None, compare=False, repr=False)
    comments: Comments = field(default=Comments(), compare=False, repr=False)
    """Of the ``format`` line."""
    tail: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """Comment lines after the last statement."""
