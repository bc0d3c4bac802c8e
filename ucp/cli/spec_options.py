"""What commands that take a conversion program share: the mesh, sizes and flags that it is used with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import click

from ucp.errors import UsageError
from ucp.layout import Mesh

_YES = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


@dataclass(frozen=True, slots=True)
class Using:
    """What a program is used with. `mesh` has no axes where none was given."""

    mesh: Mesh = field(default_factory=lambda: Mesh({}))
    sizes: dict[str, int] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)


def size_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--size`` and ``--flag``, as the arguments `size` and `flag`: the words as they were given."""
    for declared in (_FLAG, _SIZE):
        function = declared(function)
    return function


def using_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--mesh``, ``--size`` and ``--flag``; the function gets them as one `Using`."""

    @functools.wraps(function)
    def run(*args: Any, mesh: str | None, size: Sequence[str], flag: Sequence[str], **rest: Any) -> Any:
        return function(*args, using=Using(parse_mesh(mesh), parse_sizes(size), parse_flags(flag)), **rest)

    return _MESH(size_options(run))


_MESH = click.option("--mesh", metavar="AXIS=N,...", help="Ranks of each mesh axis, such as tp=2,pp=4.")
_SIZE = click.option("--size", multiple=True, metavar="NAME=N", help="A size that shapes do not tell; may be repeated.")
_FLAG = click.option(
    "--flag", multiple=True, metavar="NAME=yes|no", help="A flag that names do not tell; may be repeated."
)


def parse_mesh(text: str | None) -> Mesh:
    """``tp=2,pp=4``; UsageError for anything else."""
    words = [word for word in (text or "").replace(",", " ").split() if word]
    return Mesh(_numbers(words, "--mesh", "tp=2,pp=4", least=1))


def parse_sizes(words: Sequence[str]) -> dict[str, int]:
    """``NAME=N`` words; UsageError for anything else, and for a name with two values."""
    return _numbers(words, "--size", "hidden=4096", least=0)


def parse_flags(words: Sequence[str]) -> dict[str, bool]:
    """``NAME=yes`` and ``NAME=no``; UsageError for anything else."""
    found: dict[str, bool] = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or value.lower() not in _YES or found.get(name, _YES[value.lower()]) != _YES[value.lower()]:
            raise UsageError(f"--flag {word!r} is not NAME=yes or NAME=no", hint="for example: --flag tied=yes")
        found[name] = _YES[value.lower()]
    return found


def _numbers(words: Sequence[str], option: str, example: str, *, least: int) -> dict[str, int]:
    found: dict[str, int] = {}
    for word in words:
        name, _, value = word.partition("=")
        fits = name.isidentifier() and value.isascii() and value.isdecimal() and int(value) >= least
        if not fits or found.get(name, int(value)) != int(value):
            raise UsageError(f"{option} {word!r} is not NAME=NUMBER", hint=f"for example: {option} {example}")
        found[name] = int(value)
    return found
