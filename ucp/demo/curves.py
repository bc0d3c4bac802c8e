"""Loss curves of the demo's runs, and how far they lie apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

TOLERANCE = 2e-5
"""Largest relative difference of losses that other orders of float32 summation explain; a wrong state shows as 1e-2."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Losses of one run on one layout; `losses[i]` is of step `first + i`."""

    label: str
    first: int
    losses: tuple[float, ...]

    def at(self, step: int) -> float | None:
        """The loss of `step`, None where the run had not begun."""
        return self.losses[step - self.first] if step >= self.first else None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the demo saw: the uninterrupted run, and those resumed from what it saved after `saved_at` steps."""

    engine: str
    saved_at: int
    uninterrupted: Curve
    resumed: tuple[Curve, ...]

    @property
    def steps(self) -> range:
        """All steps."""
        return range(len(self.uninterrupted.losses))

    def difference(self, step: int) -> float:
        """Largest relative difference at `step` between a resumed loss and the uninterrupted one.

        Infinite where a loss is no finite number, so that no comparison can overlook it.
        """
        expected = self.uninterrupted.losses[step]
        found = [loss for curve in self.resumed if (loss := curve.at(step)) is not None]
        if not all(map(math.isfinite, (expected, *found))) or expected <= 0:
            return math.inf
        return max((abs(loss - expected) / expected for loss in found), default=0.0)

    @property
    def largest_difference(self) -> float:
        """Largest of all steps that were resumed."""
        return max(self.difference(step) for step in self.steps[self.saved_at :])

    @property
    def held(self) -> bool:
        """Whether every resumed run went on as if nothing had happened."""
        return self.largest_difference <= TOLERANCE
