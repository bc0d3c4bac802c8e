"""Durations on the command line: ``30s``, ``5m``, ``2h``, ``1d``, or a number of seconds."""

from __future__ import annotations

import re
from typing import Any

import click

_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_FORM = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)")


class Duration(click.ParamType[float]):
    """Gives seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds of a text; fails for what is none, as click does."""
        found = _FORM.fullmatch(str(value))
        if found is None:
            self.fail(f"{value!r} is no duration, such as 30s, 5m, 2h or 1d.", param, ctx)
        return float(found[1]) * _SECONDS[found[2]]


SECONDS = Duration()
