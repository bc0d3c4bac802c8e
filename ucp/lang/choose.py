"""Which rule each name belongs to, and flags that were not given: found where the names allow one choice only."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from ucp.errors import FitError, UsageError
from ucp.lang.ast import Condition
from ucp.lang.check import Checked, Ready
from ucp.lang.error import nearest as nearest_word
from ucp.lang.flat import Equation
from ucp.lang.match import Index, Matcher, captures, describe, nearest
from ucp.lang.sums import evaluate
from ucp.layout import Mesh

_MOST_FLAGS = 8


@dataclass(frozen=True, slots=True)
class Match:
    """A name's rule (its number) and captured values; no rule for a name that is dropped."""

    rule: int | None
    values: Mapping[str, int | str]


@dataclass(frozen=True, slots=True)
class _Names:
    """What could match each name, whatever the flags."""

    checked: Checked
    candidates: Mapping[str, list[tuple[int, dict[str, int | str]]]]
    dropped: frozenset[str]


def choose(
    checked: Checked, names: Sequence[str], flags: Mapping[str, bool], mesh: Mesh, sizes: Mapping[str, int]
) -> tuple[dict[str, Match], dict[str, bool]]:
    """Match every name to its rule, and settle the flags.

    FitError for a name that no rule or two match, for a rule that nothing matches, and where several values of a flag
    would do.
    """
    found = choices(checked, names, flags, mesh, sizes)
    if len(found) > 1:
        raise undecided(checked, [chosen for _, chosen in found])
    return found[0]


def choices(
    checked: Checked, names: Sequence[str], flags: Mapping[str, bool], mesh: Mesh, sizes: Mapping[str, int]
) -> list[tuple[dict[str, Match], dict[str, bool]]]:
    """Every choice of the flags not given that leaves no name and no rule over, with the rule of each name.

    FitError if there is none: for a name that no rule or two match, or a rule that nothing matches.
    """
    flat = checked.flat
    for flag in flags:
        if flag not in flat.flags:
            raise UsageError(f"{checked.program.file}: no flag {flag!r}", hint=nearest_word(flag, flat.flags))
    fixed = {**{axis: mesh[axis] > 1 for axis in flat.all_axes}, **flags}
    found = _candidates(checked, names, sizes)
    open_flags = [flag for flag in flat.flags if flag not in fixed]
    check_open(checked, open_flags)
    fitting = []
    best: tuple[int, dict[str, bool]] | None = None
    for values in itertools.product((False, True), repeat=len(open_flags)):
        trial = {**fixed, **dict(zip(open_flags, values, strict=True))}
        problems = sum(1 for _ in _problems(found, trial))
        if not problems:
            fitting.append(trial)
        elif best is None or problems < best[0]:
            best = (problems, trial)
    if not fitting:
        assert best is not None
        make_error = next(_problems(found, best[1]))
        raise make_error()
    return [(_matches(found, trial), {flag: trial[flag] for flag in flat.flags}) for trial in fitting]


def check_open(checked: Checked, flags: Sequence[str]) -> None:
    """FitError for more flags than can be found by trial."""
    if len(flags) > _MOST_FLAGS:
        raise FitError(f"{checked.program.file}: too many flags are not known: {' '.join(flags)}", hint=_ask(flags))


def undecided(checked: Checked, fitting: Sequence[Mapping[str, bool]], why: str = "") -> FitError:
    """The error that asks for the flags in which the choices that fit differ."""
    unsure = [flag for flag in checked.flat.flags if len({chosen[flag] for chosen in fitting}) > 1]
    cause = why or "names and shapes do not tell"
    return FitError(f"{checked.program.file}: {cause} whether {' and '.join(unsure)}", hint=_ask(unsure))


def holds(conditions: Sequence[Condition], flags: Mapping[str, bool]) -> bool:
    """Whether all conditions hold."""
    return all(flags[condition.flag] == condition.wanted for condition in conditions)


def matcher(ready: Ready, sizes: Mapping[str, int]) -> Matcher:
    """The matcher of a rule's source name, offsets evaluated."""
    return Matcher.of(ready.equation.source, ready.numbers, offsets(ready.equation, sizes))


def offsets(equation: Equation, sizes: Mapping[str, int]) -> dict[str, int]:
    """What the names of a rule's source add to captured numbers."""
    found = {}
    for capture in captures(equation.source):
        if capture.offset is not None:
            value = evaluate(capture.offset, sizes.get)
            if value is None or value.denominator != 1:
                raise FitError(
                    f"{describe(equation.source)}: the offset of {capture.name} is not known",
                    hint="give it with --size",
                )
            found[capture.name] = int(value)
    return found


def _candidates(checked: Checked, names: Sequence[str], sizes: Mapping[str, int]) -> _Names:
    rules = [ready for ready in checked.rules if ready.equation.imports]
    index = Index(matcher(ready, sizes) for ready in rules)
    drops = Index(Matcher.of(pattern) for pattern in checked.flat.drops)
    candidates, dropped = {}, set()
    for name in dict.fromkeys(names):
        candidates[name] = [(rules[i].equation.number, values) for i, values in index.find(name)]
        if drops.find(name):
            dropped.add(name)
    return _Names(checked, candidates, frozenset(dropped))


def _problems(found: _Names, flags: Mapping[str, bool]) -> Iterator[Callable[[], FitError]]:
    """Everything that does not fit, as what makes the error: near names are looked for only where one is raised."""
    rules = found.checked.rules
    active = {ready.equation.number for ready in rules if holds(ready.equation.conditions, flags)}
    used = set()
    for name, candidates in found.candidates.items():
        fitting = [number for number, _ in candidates if number in active]
        used.update(fitting)
        if len(fitting) > 1 or (fitting and name in found.dropped):
            yield partial(_twice, found, name, fitting)
        elif not fitting and name not in found.dropped:
            yield partial(_unmatched, found, name, [number for number, _ in candidates], flags)
    for ready in rules:
        equation = ready.equation
        if equation.number in active and equation.imports and not equation.optional and equation.number not in used:
            yield partial(_unused, found, equation)


def _unused(found: _Names, equation: Equation) -> FitError:
    return FitError(
        f"{found.checked.where(equation)}: no tensor is named {describe(equation.source)}",
        hint=f"{_close_name(found, equation)}a rule that may find nothing ends with `optional`",
    )


def _close_name(found: _Names, equation: Equation) -> str:
    from difflib import get_close_matches

    free = [name for name, candidates in found.candidates.items() if not candidates and name not in found.dropped]
    close = get_close_matches(describe(equation.source), free[:2000], n=1)
    return f"did it mean {close[0]}? " if close else ""


def _twice(found: _Names, name: str, numbers: Sequence[int]) -> FitError:
    places = [found.checked.where(found.checked.rules[number].equation) for number in numbers]
    if name in found.dropped:
        places.append("a drop")
    return FitError(f"{name}: matched by {' and by '.join(places)}", hint="a tensor belongs to one rule")


def _unmatched(found: _Names, name: str, off: Sequence[int], flags: Mapping[str, bool]) -> FitError:
    checked = found.checked
    if off:
        equation = checked.rules[off[0]].equation
        asked = next(c for c in equation.conditions if flags[c.flag] != c.wanted)
        word = "when" if asked.wanted else "unless"
        return FitError(
            f"{name}: its rule, {checked.where(equation)}, holds only `{word} {asked.flag}`",
            hint=f"--flag {asked.flag}={'yes' if asked.wanted else 'no'}" if asked.flag in checked.flat.flags else None,
        )
    patterns = [ready.equation.source for ready in checked.rules]
    close = nearest(name, patterns)
    near = next((ready.equation for ready in checked.rules if ready.equation.source is close), None)
    hint = (
        f"nearest: {describe(near.source)}, {checked.where(near)}; or `drop` it" if near else "add a rule, or `drop` it"
    )
    return FitError(f"{name}: no rule of {checked.program.file} matches it", hint=hint)


def _matches(found: _Names, flags: Mapping[str, bool]) -> dict[str, Match]:
    rules = found.checked.rules
    matches = {}
    for name, candidates in found.candidates.items():
        fitting = [(n, values) for n, values in candidates if holds(rules[n].equation.conditions, flags)]
        matches[name] = Match(*fitting[0]) if fitting else Match(None, {})
    return matches


def _ask(flags: Sequence[str]) -> str:
    return "give " + " ".join(f"--flag {flag}=yes|no" for flag in flags)
