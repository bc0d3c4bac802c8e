"""``ucp spec``: conversion programs are checked, formatted, explained, listed and drafted."""

from __future__ import annotations

import importlib

import click

COMMANDS = ("check", "fmt", "explain", "list", "new")


class Spec(click.Group):
    """A group whose commands are imported when asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"ucp.cli.spec_{cmd_name}").command
        return command


@click.group("spec", cls=Spec)
def command() -> None:
    """Check, format, explain and draft conversion programs.

    A PROGRAM is a file that ends in .ucp (text) or .json (its syntax tree), or the name of one that comes with ucp:
    `ucp spec list` shows them.
    """
