"""``ucp completion``: a script that makes the shell complete ucp's commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from ucp.cli.command import command as declare
from ucp.cli.output import Output

KEYS = {"shell": "the shell", "script": "the script"}


@declare("completion", json_keys=KEYS)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(out: Output, shell: str) -> None:
    r"""Print the completion script for SHELL.

    \b
    bash:  eval "$(ucp completion bash)"  in ~/.bashrc
    zsh:   eval "$(ucp completion zsh)"   in ~/.zshrc
    fish:  ucp completion fish > ~/.config/fish/completions/ucp.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(click.get_current_context().find_root().command, {}, "ucp", "_UCP_COMPLETE").source()
    if out.mode == "json":
        out.json({"shell": shell, "script": script})
    else:
        click.echo(script)
