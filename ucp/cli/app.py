"""The program: finds commands by name, and turns whatever they raise into one clear report and an exit code."""

from __future__ import annotations

import importlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from ucp.cli.failure import report
from ucp.cli.output import Output

COMMANDS = (
    "info",
    "ls",
    "checkpoints",
    "tree",
    "show",
    "state",
    "plan",
    "convert",
    "verify",
    "cp",
    "sync",
    "repair",
    "gc",
    "watch",
    "spec",
    "demo",
    "completion",
)
PREFIX = "UCP"


class Program(click.Group):
    """A group whose commands are imported when asked for, so that help and inspection start quickly."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"ucp.cli.{cmd_name}").command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command. Its failures end here; click would turn some of them into its own."""
        try:
            with _terminable():
                result = super().invoke(ctx)
            sys.stdout.flush()
        except (click.exceptions.Exit, click.ClickException, click.Abort, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001  the last place: nothing may leave as a bare traceback
            sys.exit(report(error, ctx.obj or Output.before_parsing(sys.argv[1:])))
        return result

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        """Run the program and leave with its exit code."""
        arguments = list(sys.argv[1:] if args is None else args)
        options |= {"standalone_mode": False, "auto_envvar_prefix": PREFIX}
        try:
            code = super().main(arguments, *rest, **options)
        except (click.ClickException, click.Abort) as error:
            code = report(error, Output.before_parsing(arguments))
        sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, with which schedulers and service managers end a command, stops it in order, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's alone
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _show_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"ucp {version('universal-checkpoint')}")
        ctx.exit()


@click.group(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    invoke_without_command=True,
    epilog="Exit codes: 0 ok, 1 internal error, 2 usage, 3 not found, 4 program invalid, 5 does not fit, 6 content "
    "differs or is damaged, 7 storage failed (run again to resume), 130 interrupted (run again to resume).",
)
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_version, help="Print the version."
)
@click.pass_context
def program(ctx: click.Context) -> None:
    """Look into, check and convert distributed-training checkpoints, whatever layout wrote them.

    A checkpoint is named by a local path or a URL; its family is detected. Data goes to standard output, progress and
    hints to standard error. Every option can be given as an environment variable: UCP_CONVERT_WORKERS is
    --workers of `ucp convert`, and UCP_JSON, UCP_QUIET, UCP_VERBOSE and UCP_NO_PROGRESS hold for all commands.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> None:
    """Entry point of ``ucp``, ``python -m ucp`` and ``python cli.py``."""
    program(prog_name="ucp")
