"""Names that can be read in one way only: where numbers end, what a drop matches, where a tie leads."""

from __future__ import annotations

from collections import defaultdict

from ucp.lang.ast import Capture, Computed, Pattern, Tie, Wild
from ucp.lang.flat import exclusive
from ucp.lang.match import captures, computed
from ucp.lang.scope import Scope

_DIGITS = frozenset("0123456789")


def check_names(scope: Scope) -> None:
    """Names of rules and drops. ProgramError for a number whose end cannot be told, or a drop that computes."""
    for equation in scope.flat.equations:
        for pattern in (equation.source, *(side.name for side in equation.targets)):
            _apart(scope, pattern)
    for pattern in scope.flat.drops:
        _apart(scope, pattern)
        _dropped(scope, pattern)


def _apart(scope: Scope, pattern: Pattern) -> None:
    """Between two numbers stands something that is no digit."""
    beside = False
    for part in pattern.parts:
        if isinstance(part, Capture | Computed):
            if beside:
                cause = "a number beside another: where one ends cannot be told"
                scope.fail(part.at, "name", cause, "put text between them that is not all digits")
            beside = True
        elif isinstance(part, Wild) or not _DIGITS.issuperset(part):
            beside = False


def _dropped(scope: Scope, pattern: Pattern) -> None:
    found = captures(pattern)
    plain = not computed(pattern) and not any(capture.cuts or capture.offset for capture in found)
    if not plain:
        scope.fail(pattern.at, "name", "a drop captures plainly: nothing is cut, added or computed", "`{x}` or `**`")
    wild = [part for part in pattern.parts if isinstance(part, Wild)]
    if len(wild) > 1 and len({capture.name for capture in found}) < len(found):
        scope.fail(pattern.at, "name", "a capture twice in a name with several `**`", "write `**` for it")
    for before, after in zip(pattern.parts, pattern.parts[1:], strict=False):
        if len(wild) > 1 and {type(before), type(after)} == {Wild, Capture}:
            scope.fail(pattern.at, "name", "a capture beside one of several `**`", "leave out the capture")


def check_ties(scope: Scope) -> None:
    """Ties name tensors, and lead to one that is tied to no other while they hold."""
    by_alias: dict[Pattern, list[Tie]] = defaultdict(list)
    for tie in scope.flat.ties:
        scope.conditions(tie.conditions)
        for pattern in (tie.alias, tie.name):
            if captures(pattern) or computed(pattern):
                scope.fail(pattern.at, "tie", "a tie names tensors, without captures")
        for other in by_alias[tie.alias]:
            if not exclusive(other.conditions, tie.conditions):
                scope.fail(
                    tie.at, "tie", "one name is tied twice", "tie it to one tensor, or under opposite conditions"
                )
        by_alias[tie.alias].append(tie)
    for tie in scope.flat.ties:
        for other in by_alias.get(tie.name, ()):
            if not exclusive(other.conditions, tie.conditions):
                scope.fail(tie.at, "tie", "a tie leads to a name that is tied itself", "tie both to one tensor")
