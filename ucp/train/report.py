"""What a load found and did: problems before it starts, a report after it ended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal, NamedTuple

from ucp.errors import FitError
from ucp.layout import Shape
from ucp.train.options import Allowed

ProblemKind = Literal[
    "missing",
    "unexpected",
    "shape",
    "dtype",
    "hyper-parameters",
    "map",
    "only",
    "names",
    "new",
    "ignore",
    "resize",
    "state",
    "ties",
    "memory",
    "optimizer",
    "undecided",
]
_MOST_SHOWN = 30
_MOST_COMPARED = 10
"""Missing names for which near ones are looked up, which takes milliseconds for each name there is."""


class Cast(NamedTuple):
    """A state that was rounded or widened on its way from the source's dtype to the target's."""

    name: str
    state: str
    source: str
    target: str


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that does not fit. `subject` is what it is about, such as ``head.weight[exp_avg]``."""

    kind: ProblemKind
    subject: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.subject}{f' ({self.detail})' if self.detail else ''}"


@dataclass(slots=True)
class Findings:
    """Everything noticed while a load is being prepared."""

    problems: list[Problem] = field(default_factory=list)
    casts: list[Cast] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    without_state: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    resized: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    remedy: str | None = None
    allowed: Allowed = field(default_factory=Allowed)

    def add(self, kind: ProblemKind, subject: str, detail: str = "") -> None:
        """Note a problem."""
        self.problems.append(Problem(kind, subject, detail))

    def undecided(self, subject: str, remedy: str) -> None:
        """Note that the source does not tell which state is this one; `remedy` would settle it."""
        self.add("undecided", subject, "the source does not tell which state is its own, if any")
        self.remedy = remedy

    def missing(self, subject: str, name: str, known: Iterable[str]) -> None:
        """Note that the source lacks `name`, with the names of `known` that come nearest."""
        few = len(self.problems) < _MOST_COMPARED
        close = get_close_matches(name, list(known), n=2) if few else ()
        self.add("missing", subject, f"nearest: {', '.join(close)}" if close else "")

    def subjects(self, kind: ProblemKind) -> tuple[str, ...]:
        """What the problems of one kind are about."""
        return tuple(problem.subject for problem in self.problems if problem.kind == kind)

    def check(self, url: str, *, strict: bool) -> None:
        """FitError that lists all problems; without `strict`, missing and unexpected things are none."""
        problems = [problem for problem in self.problems if not self._tolerates(problem, strict=strict)]
        if problems:
            raise FitError(_message(url, problems), hint=self.remedy or _hint(problems))

    def _tolerates(self, problem: Problem, *, strict: bool) -> bool:
        if problem.kind == "missing":
            return not strict or self.allowed.missing(problem.subject)
        return problem.kind == "unexpected" and (not strict or self.allowed.unexpected(problem.subject))


def _message(url: str, problems: Sequence[Problem]) -> str:
    shown = [f"  {problem}" for problem in problems[:_MOST_SHOWN]]
    more = [f"  and {len(problems) - _MOST_SHOWN} more"] if len(problems) > _MOST_SHOWN else []
    return "\n".join([f"{url}: does not fit the target in {len(problems)} places", *shown, *more])


def _hint(problems: Sequence[Problem]) -> str:
    kinds = {problem.kind for problem in problems}
    if kinds & {"missing", "unexpected"}:
        return (
            "map={target name: source name} renames, only=[globs] selects, new=[globs] and ignore=[globs] allow what "
            "is on one side alone, strict=False any of it"
        )
    if "names" in kinds:
        return "map={target name: source name} renames; `ucp ls` shows the source's names"
    if "optimizer" in kinds:
        return "take a step with the optimizer first, so that it has states to fill"
    if "hyper-parameters" in kinds:
        return "make the optimizer's groups as they were, or keep the target's own with hyper_parameters=False"
    return "build the target as the source was built"


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What `ucp.load` did.

    `tensors` counts the source's tensors that were used. `bytes_read` are those that this rank read, `bytes_of_job`
    those that all ranks did that loaded together, `bytes_checked` those that they set against checksums: all that lie
    under a checksum of which they read nearly everything. This rank had `bytes_received` from others that
    read them. `renamed` is target name -> source name where they differ, `casts` what changed
    its dtype. `without_state` names optimized parameters for which the source has no optimizer state; they start
    without. `missing` and `unexpected` name what ``strict=False``, `new` and `ignore` allowed. `resized` are the shapes
    in the source and in the target, by names in the source. `not_loaded` names the parts of the training state that
    nothing in the target asked for. `parts` of the seconds: to ``plan``, to ``read`` and check, waiting for others
    included, and to ``reshard``, which is to put what was read where it belongs.
    """

    url: str
    family: str
    step: int | None
    tensors: int
    bytes_read: int
    bytes_of_job: int
    bytes_checked: int
    bytes_received: int
    seconds: float
    renamed: Mapping[str, str]
    casts: tuple[Cast, ...]
    without_state: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    not_loaded: tuple[str, ...]
    notes: tuple[str, ...]
    resized: Mapping[str, tuple[Shape, Shape]] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = {
            "renamed": len(self.renamed),
            "cast": len(self.casts),
            "resized": len(self.resized),
            "without optimizer state": len(self.without_state),
            "missing": len(self.missing),
            "unexpected": len(self.unexpected),
        }
        parts = [f"{self.tensors} tensors, {self.bytes_read / 1e6:.1f} MB in {self.seconds:.2f} s"]
        parts += [f"{count} {what}" for what, count in counts.items() if count]
        step = "" if self.step is None else f"step {self.step} of "
        return f"loaded {step}{self.url} ({self.family}): {', '.join(parts)}"
