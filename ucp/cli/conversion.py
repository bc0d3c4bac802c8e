"""What `ucp plan` and `ucp convert` share: the options of a conversion, and the command line that runs it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import click


def conversion_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say what is converted into what."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


_OPTIONS = (
    click.option("--to", default="universal", show_default=True, help="Family of the result."),
    click.option("--workers", type=click.IntRange(min=1), help="Workers at a time; the number of cores by default."),
    click.option("--no-check", is_flag=True, help="Do not compare low-precision copies and replicas."),
)


def rerun() -> str:
    """The `ucp convert` command line with the arguments of the running command."""
    context = click.get_current_context()
    words = ["ucp", "convert", context.params["source"], context.params["destination"]]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if not isinstance(parameter, click.Option) or parameter.name in _LEFT_OUT or value in (None, False):
            continue
        if value == parameter.get_default(context):
            continue
        words += [parameter.opts[-1]] if parameter.is_flag else [parameter.opts[-1], str(value)]
    return shlex.join(words)


_LEFT_OUT = ("json", "quiet", "verbose", "no_progress", "restart")
