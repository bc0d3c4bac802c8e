"""What all commands share: how they are declared, the options for output, and the argument that names a checkpoint."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ucp.cli.output import Mode, Output
from ucp.cli.spec_options import parse_flags, parse_sizes, size_options
from ucp.errors import UsageError

if TYPE_CHECKING:
    from ucp.catalog import Catalog
    from ucp.store import Store

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Command(click.Command):
    """A command with the documented keys of its JSON document, for the reference."""

    json_keys: Mapping[str, str]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does; arguments can be given by variables, as options can: UCP_WATCH_SOURCE."""
        for param in self.params:
            if isinstance(param, click.Argument) and ctx.auto_envvar_prefix and param.name:
                param.envvar = f"{ctx.auto_envvar_prefix}_{param.name.upper()}"
        return super().parse_args(ctx, args)


class CommandWithMore(Command, click.Group):
    """A command that others stand below; one of them, named after it, runs in its place and has its own options.

    `below` gives each its module, which is imported when asked for.
    """

    below: Mapping[str, str]

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.below)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.below:
            return None
        found: click.Command = importlib.import_module(self.below[cmd_name]).command
        return found


def command(
    name: str, *, json_keys: Mapping[str, str], below: Mapping[str, str] | None = None
) -> Callable[[Callable[..., None]], Command]:
    """Declare a command: its function gets an `Output` and the options it declared.

    `json_keys` documents each key of the document that ``--json`` prints. `below` are commands that stand below it.
    """

    def declare(function: Callable[..., None]) -> Command:
        @functools.wraps(function)
        def run(*, json: bool, quiet: bool, verbose: bool, no_progress: bool, **options: Any) -> None:
            mode: Mode = "json" if json else "quiet" if quiet else "human"
            out = Output(mode, verbose, progress=not (no_progress or quiet))
            click.get_current_context().find_root().obj = out
            function(out, **options)

        declared = _declared(name, _with_output_options(run), below)
        declared.json_keys = json_keys
        return declared

    return declare


def _declared(name: str, function: Callable[..., Any], below: Mapping[str, str] | None) -> Command:
    if below is None:
        return click.command(name, cls=Command)(function)

    @functools.wraps(function)
    def unless_below(**options: Any) -> None:
        context = click.get_current_context()
        if context.invoked_subcommand is None:
            function(**options)
        elif given := [name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]:
            option = f"--{given[0].replace('_', '-')}"
            raise UsageError(
                f"{option} is for {context.command_path} alone",
                hint=f"options of {context.invoked_subcommand} come after it",
            )

    declared = click.command(name, cls=CommandWithMore, invoke_without_command=True)(unless_below)
    declared.below = below
    return declared


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


@dataclass(frozen=True, slots=True)
class Reading:
    """How to read a source: as which family (None detects it), and with which options of the family's reader.

    `program` names a conversion program that its tensors are seen through, with `sizes` and `flags`.
    """

    family: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    program: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    flags: Mapping[str, bool] = field(default_factory=dict)

    def catalog(self, url: str) -> tuple[Catalog, Store]:
        """The catalog of the checkpoint at `url` and the store it lies in."""
        from ucp.mapping import read_source

        return read_source(
            url, family=self.family, program=self.program, sizes=self.sizes, flags=self.flags, **self.options
        )


def family_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say how to read the source as it is; the function gets them as one `Reading`."""

    @functools.wraps(function)
    def run(*args: Any, family: str | None, tag: str | None, option: Sequence[str], **rest: Any) -> Any:
        words = [*option, *([f"tag={tag}"] if tag is not None else [])]
        return function(*args, reading=Reading(family, named_options(words, reserved=_READER_TAKES)), **rest)

    for declared in reversed(_READING):
        run = declared(run)
    return run


def reading_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, and the program that the source is seen through."""

    @functools.wraps(function)
    def run(
        *args: Any, reading: Reading, spec: str | None, size: Sequence[str], flag: Sequence[str], **rest: Any
    ) -> Any:
        seen = replace(reading, program=spec, sizes=parse_sizes(size), flags=parse_flags(flag))
        if spec is None and (seen.sizes or seen.flags):
            raise UsageError("--size and --flag are a program's, and none is given", hint="give it with --spec")
        return function(*args, reading=seen, **rest)

    return family_options(_SPEC(size_options(run)))


_SPEC = click.option(
    "--spec",
    metavar="PROGRAM",
    help="See the tensors through this program: a file, one of `ucp spec list`, or auto: what the source tells.",
)


_READING = (
    click.option("--family", help="Read as this family instead of detecting it."),
    click.option("--tag", help="Which checkpoint of a folder that holds several."),
    click.option(
        "-o",
        "--option",
        multiple=True,
        metavar="NAME=VALUE",
        help="Option of the family's reader, such as frozen='adapter.*' of deepspeed; may be repeated.",
    ),
)


_READER_TAKES = ("family", "url", "store", "self", "program", "sizes", "flags")


def named_options(words: Sequence[str], *, reserved: Collection[str]) -> dict[str, str | tuple[str, ...]]:
    """``NAME=VALUE`` words as options; a name that is given twice becomes a tuple.

    UsageError for anything else, and for a `reserved` name, which has an option or argument of its own.
    """
    found: dict[str, tuple[str, ...]] = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not name.isidentifier() or name in reserved:
            raise UsageError(f"{word!r} is not NAME=VALUE of an option", hint="for example: -o frozen='adapter.*'")
        found[name] = (*found.get(name, ()), value)
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}
