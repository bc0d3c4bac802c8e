"""What all commands share: how they are declared, the options for output, and the argument that names a checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from ucp.cli.output import Mode, Output

if TYPE_CHECKING:
    from ucp.catalog import Catalog
    from ucp.store import Store

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Command(click.Command):
    """A command with the documented keys of its JSON document, for the reference."""

    json_keys: Mapping[str, str]


def command(name: str, *, json_keys: Mapping[str, str]) -> Callable[[Callable[..., None]], Command]:
    """Declare a command: its function gets an `Output` and the options it declared.

    `json_keys` documents each key of the document that ``--json`` prints.
    """

    def declare(function: Callable[..., None]) -> Command:
        @functools.wraps(function)
        def run(*, json: bool, quiet: bool, verbose: bool, no_progress: bool, **options: Any) -> None:
            mode: Mode = "json" if json else "quiet" if quiet else "human"
            out = Output(mode, verbose, progress=not (no_progress or quiet))
            click.get_current_context().find_root().obj = out
            function(out, **options)

        declared = click.command(name, cls=Command)(_with_output_options(run))
        declared.json_keys = json_keys
        return declared

    return declare


def _with_output_options(function: Callable[..., Any]) -> Callable[..., Any]:
    options = (
        _flag("--json", help="Print one JSON document; errors too."),
        _flag("-q", "--quiet", help="Print errors and bare answers only."),
        _flag("-v", "--verbose", help="More detail, and tracebacks of errors."),
        _flag("--no-progress", help="No progress on standard error."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def _flag(*names: str, help: str) -> Decorator:
    """A flag that one environment variable sets for all commands."""
    envvar = "UCP_" + names[-1].removeprefix("--").replace("-", "_").upper()
    return click.option(*names, is_flag=True, envvar=envvar, help=help)


def reading_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say how to read the source."""
    function = click.option("--tag", help="Which checkpoint of a folder that holds several.")(function)
    return click.option("--family", help="Read as this family instead of detecting it.")(function)


def read(url: str, *, family: str | None, tag: str | None) -> tuple[Catalog, Store]:
    """The catalog of the checkpoint at `url` and the store it lies in."""
    from ucp.converter import read_catalog

    return read_catalog(url, family=family, **reader_options(tag))


def reader_options(tag: str | None) -> dict[str, str]:
    """Options for the reader; what was not asked for is left out."""
    return {} if tag is None else {"tag": tag}
