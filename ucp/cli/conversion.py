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
    for option in context.command.params:
        if isinstance(option, click.Option) and option.name not in _LEFT_OUT:
            words += _spelled(option, context.params.get(option.name or ""))
    return shlex.join(words)


def _spelled(option: click.Option, value: Any) -> list[str]:
    """The words that give `option` its `value`; none for what it is anyway."""
    name = option.opts[-1]
    if option.is_flag:
        return [name] if value else []
    values = value if option.multiple else [value]
    return [word for one in values if one not in (None, option.default) for word in (name, str(one))]


_LEFT_OUT = ("json", "quiet", "verbose", "no_progress", "restart")
