"""The catalog: everything a readable checkpoint holds, as pure data, whatever framework wrote it.

Readers make catalogs; `ucp.open`, `ucp.load`, conversion and the command line only see these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from ucp.errors import FitError, NotFoundError
from ucp.layout import Mesh
from ucp.layout.block import View
from ucp.plan import Cover, Fragment, Key, Reduction, TensorSpec, Witness
from ucp.tree import Tree

Kind = Literal["parameter", "frozen", "buffer"]


@dataclass(frozen=True, slots=True)
class Scalar:
    """A number kept per parameter, such as the optimizer's step.

    `dtype` is a tensor dtype, or ``int`` / ``float`` / ``bool`` where the framework kept a plain Python number.
    """

    value: int | float | bool
    dtype: str


@dataclass(frozen=True, slots=True)
class Tensor:
    """One logical tensor with all its states. `value` is the highest-precision copy there is.

    `kind`: a *parameter* is trained, a *frozen* one is not, a *buffer* is no parameter. `dims` names the dims where a
    program does. `undecided` is set where the source does not tell which of its optimizer states are this parameter's,
    if any: it says what would settle it. Those states are carried in `Catalog.state`, and must not be taken for absent.
    """

    name: str
    kind: Kind
    states: Mapping[str, TensorSpec]
    scalars: Mapping[str, Scalar] = field(default_factory=dict)
    dims: tuple[str, ...] | None = None
    undecided: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all states, padding not counted."""
        return sum(spec.nbytes for spec in self.states.values())

    def lacks(self, state: str, url: str) -> NotFoundError | FitError:
        """The error for a state that is asked for and not there: FitError where it may exist and is `undecided`."""
        if self.undecided is not None:
            return FitError(
                f"{url}: it cannot be told which {state!r} in the optimizer is that of {self.name}, if any",
                hint=self.undecided,
            )
        has = " ".join([*self.states, *self.scalars])
        return NotFoundError(f"{url}: {self.name} has no state {state!r}", hint=f"it has: {has}")


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """Hyper-parameters of a group of parameters, by parameter name and not by position."""

    params: tuple[str, ...]
    options: Mapping[str, Tree]


@dataclass(frozen=True, slots=True)
class Checksum:
    """A digest that the source itself keeps over bytes ``[offset, offset + length)`` of an object.

    `algorithm` is ``crc32`` (zip directories) or ``crc32c``.
    """

    object: str
    offset: int
    length: int
    algorithm: Literal["crc32", "crc32c"]
    value: int


@dataclass(frozen=True, slots=True)
class Source:
    """Who wrote the checkpoint: `family` such as ``deepspeed`` or ``universal``, and its `version`.

    `detail` is for people (ZeRO stage, dtypes); JSON values only.
    """

    family: str
    version: str
    mesh: Mesh
    detail: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ProgramRecord:
    """The conversion program that gave a checkpoint its logical names, and what it was used with.

    `ast` is the program as canonical JSON (spec/conversion-language.md); `mesh`, `sizes` and `flags` are those of the
    source that was consolidated.
    """

    ast: Mapping[str, Any]
    mesh: Mesh
    sizes: Mapping[str, int] = field(default_factory=dict)
    flags: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Catalog:
    """A readable checkpoint. Paths of objects are relative to `url`.

    `tensors` by logical name; `fragments` by (name, state), their boxes in the coordinates of `views` where that names
    a view; `reductions` says which states are the mean or the sum of their terms; `witnesses` are low-precision copies
    of ``value``, in the same view; `program` is what consolidated the checkpoint, if a program did;
    `ties` map an alias to the name that holds the data; `state` is the rest of the training state; `checksums` what
    the source lets us verify; `objects` the size and fingerprint of every object used; `notes` are remarks a user
    should see, such as an inference that was made.
    """

    url: str
    source: Source
    tensors: Mapping[str, Tensor]
    fragments: Mapping[Key, tuple[Fragment, ...]]
    step: int | None = None
    witnesses: Mapping[str, tuple[TensorSpec, tuple[Fragment, ...]]] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    views: Mapping[Key, View] = field(default_factory=dict)
    reductions: Mapping[Key, Reduction] = field(default_factory=dict)
    program: ProgramRecord | None = None
    param_groups: tuple[ParamGroup, ...] = ()
    state: Mapping[str, Tree] = field(default_factory=dict)
    checksums: Sequence[Checksum] = ()
    objects: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)

    @cached_property
    def _covers(self) -> dict[Key, Cover]:
        return {}

    @cached_property
    def _checked(self) -> dict[str, Witness]:
        return {}

    def resolve(self, name: str) -> str:
        """The canonical name of `name`, which may be an alias; NotFoundError with the nearest names otherwise."""
        name = self.ties.get(name, name)
        if name not in self.tensors:
            raise NotFoundError(f"{self.url}: no tensor named {name!r}", hint=_nearest(name, self.tensors))
        return name

    def cover(self, name: str, state: str) -> Cover:
        """The checked fragments of one state of one tensor.

        NotFoundError if there is no such tensor or state, FitError if the fragments do not hold every element once, or
        if the source does not tell which state is this tensor's.
        """
        key = Key(self.resolve(name), state)
        if key not in self._covers:
            states = self.tensors[key.name].states
            if state not in states:
                raise self.tensors[key.name].lacks(state, self.url)
            view, reduce = self.views.get(key), self.reductions.get(key)
            self._covers[key] = Cover.of(key, states[state], self.fragments[key], view=view, reduce=reduce)
        return self._covers[key]

    def witness(self, name: str) -> Witness | None:
        """The low-precision copy of ``value`` that must agree with it, where the source keeps one."""
        name = self.resolve(name)
        if name in self.witnesses and name not in self._checked:
            spec, fragments = self.witnesses[name]
            view = self.views.get(Key(name, "value"))
            self._checked[name] = Witness(Cover.of(Key(name, "low-precision copy"), spec, fragments, view=view))
        return self._checked.get(name)

    def require_decided(self) -> None:
        """FitError for optimizer states that nobody can place: a job would start them anew without a word."""
        for tensor in self.tensors.values():
            if tensor.undecided is not None:
                raise FitError(
                    f"{self.url}: it cannot be told which optimizer states are those of {tensor.name}, if any",
                    hint=tensor.undecided,
                )

    def unchecked(self) -> Catalog:
        """The same catalog without low-precision copies and replicas to compare with."""
        primary = {key: tuple(f for f in held if f.replica == 0) for key, held in self.fragments.items()}
        return replace(self, witnesses={}, fragments=primary)

    @property
    def nbytes(self) -> int:
        """Bytes of all states of all tensors, padding not counted."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def _nearest(name: str, known: Mapping[str, object]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(repr(c) for c in close)}?" if close else "`ucp ls` shows the names"
