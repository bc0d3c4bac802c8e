"""Reports of failures: what is wrong, the remedy, and the exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback

import click

from ucp.cli.output import Output
from ucp.errors import InterruptedRunError, UcpError

_BUG = "this is a bug in ucp; please report it with the output of the same command with -v"
_BROKEN_PIPE = 141
"""What a shell reports for a program that a closed pipe ended (128 + SIGPIPE)."""


def report(error: BaseException, out: Output) -> int:
    """Print `error` as the mode of `out` asks, and give the exit code."""
    if isinstance(error, BrokenPipeError) or (isinstance(error, OSError) and error.errno == errno.EPIPE):
        _abandon_stdout()
        return _BROKEN_PIPE
    code, message, hint, exit_code = describe(error)
    if out.verbose and not isinstance(error, click.ClickException):
        out.trace("".join(traceback.format_exception(error)))
    out.error(code=code, message=message, hint=hint, exit_code=exit_code)
    return exit_code


def describe(error: BaseException) -> tuple[str, str, str | None, int]:
    """(code, message, hint, exit code) of anything that can be raised."""
    if isinstance(error, UcpError):
        return error.code, error.message, error.hint, error.exit_code
    if isinstance(error, click.ClickException):
        return "usage", error.format_message(), _usage_hint(error), 2
    if isinstance(error, KeyboardInterrupt | click.Abort):
        hint = "nothing was changed; run the same command again"
        return InterruptedRunError.code, "interrupted", hint, InterruptedRunError.exit_code
    return UcpError.code, f"{type(error).__name__}: {error}", _BUG, UcpError.exit_code


def _usage_hint(error: click.ClickException) -> str:
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f"`{context.command_path if context else 'ucp'} --help` shows what is possible"


def _abandon_stdout() -> None:
    """The reader went away: what is still buffered goes nowhere, so that the interpreter's last flush is quiet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
