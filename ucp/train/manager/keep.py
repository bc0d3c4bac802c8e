"""Which checkpoints of a run may go."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ucp.errors import UsageError
from ucp.lifecycle.shelf import Saved

Mode = Literal["min", "max"]


@dataclass(frozen=True, slots=True)
class Best:
    """The metric that says which checkpoint is best, whether less or more of it is better, and how many to keep."""

    metric: str
    mode: Mode
    count: int = 1

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max") or self.count < 1:
            raise UsageError(f"best: {(self.metric, self.mode)!r}, {self.count} of them", hint='best=("loss", "min")')

    def ranked(self, saved: Iterable[Saved]) -> list[Saved]:
        """Those that have the metric, best first; of equals the newest. What is no number is never best."""
        sign = 1 if self.mode == "min" else -1
        able = [one for one in saved if not math.isnan(one.metrics.get(self.metric, math.nan))]
        return sorted(able, key=lambda one: (sign * one.metrics[self.metric], -one.step))


@dataclass(frozen=True, slots=True)
class Keep:
    """What is kept: the `latest` so many, each whose step is a multiple of `every`, and the best. None: all."""

    latest: int | None = None
    every: int | None = None
    best: Best | None = None

    def __post_init__(self) -> None:
        for name, number in (("keep_latest", self.latest), ("keep_every", self.every)):
            if number is not None and number < 1:
                raise UsageError(f"{name}={number}: must be at least 1")
        if self.every is not None and self.latest is None:
            raise UsageError("keep_every says what is kept beside the latest", hint="give keep_latest too")

    def expendable(self, saved: Sequence[Saved], *, newest: int) -> list[int]:
        """Steps of `saved` that may go now that `newest` is committed, oldest first.

        Nothing as new as `newest` or newer ever goes. What was put aside counts for nothing.
        """
        if self.latest is None:
            return []
        live = sorted((one for one in saved if not one.aside), key=lambda one: one.step)
        kept = {one.step for one in live[-self.latest :]}
        kept |= {one.step for one in live if self.every is not None and one.step % self.every == 0}
        kept |= {one.step for one in self.best.ranked(live)[: self.best.count]} if self.best else set()
        return sorted(one.step for one in saved if one.step < newest and one.step not in kept)
