"""The reference is what the program says now, and says it of everything."""

from __future__ import annotations

import click
import pytest

from tests.cli.conftest import REPOSITORY
from ucp.cli.command import Command
from ucp.cli.reference import commands, reference

PAGE = (REPOSITORY / "docs" / "cli.md").read_text()
COMMANDS = dict(commands())


def test_the_page_is_current() -> None:
    assert reference() == PAGE, "run: python -m ucp.cli.reference > docs/cli.md"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented(name) -> None:
    command = COMMANDS[name]
    assert command.help
    assert f"## ucp {name}\n" in PAGE
    if isinstance(command, click.Group):
        return
    assert isinstance(command, Command)
    assert command.json_keys
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert not [option.name for option in options if not option.help]
    assert {"--json", "--quiet", "--verbose", "--no-progress"} <= {name for option in options for name in option.opts}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_shows_whole_sentences(name) -> None:
    assert not COMMANDS[name].get_short_help_str(limit=62).endswith("...")


def test_help_prints(process) -> None:
    done = process("convert", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: ucp convert")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_prints(name, invoke) -> None:
    done = invoke(*name.split(), "--help")
    assert done.exit_code == 0
    assert done.output.startswith(f"Usage: ucp {name}")
