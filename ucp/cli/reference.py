"""The reference of the command line, made from the commands: ``python -m ucp.cli.reference > docs/cli.md``."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click

from ucp import errors
from ucp.cli.app import COMMANDS, program
from ucp.cli.command import Command

_WIDTH = 100

_HEAD = """\
# Command line

This page is made from the program: `python -m ucp.cli.reference > docs/cli.md`.

SOURCE, DESTINATION and URL are local paths, `file://…` or any URL that fsspec knows. The family of a checkpoint is
detected. Data goes to standard output; progress, notes and hints go to standard error. Colours are used on terminals
only, and not at all when `NO_COLOR` is set. On a terminal a bar shows progress, elsewhere a line every ten seconds.
"""

_JSON = """\
## JSON

With `--json` a command prints one JSON document on standard output, with exactly the keys listed for it below; keys are
only ever added. Numbers that JSON lacks are the strings `nan`, `inf` and `-inf`. If a command fails, the document is

```json
{"error": {"code": "not-found", "message": "what and where", "hint": "what to do, or null", "exit_code": 3}}
```
"""

_ENVIRONMENT = """\
## Environment

Everything can be given by variables of the environment, so that a job needs no command line of its own.

`UCP_JSON`, `UCP_QUIET`, `UCP_VERBOSE` and `UCP_NO_PROGRESS`, set to `1`, give the flag of that name to every command.
Any other option is `UCP_`, the command and the option's long name, and any argument `UCP_`, the command and its name:
`UCP_CONVERT_WORKERS=4` is `--workers 4` of `ucp convert`, `UCP_CONVERT_NO_CHECK=1` its `--no-check`,
`UCP_CONVERT_SOURCE` what it reads. A dash becomes `_`. Options that may be repeated take several words:
`UCP_CONVERT_TARGET_OPTION="stage=3 dtype=bf16"`. What the command line says comes first.

| variable | for |
|---|---|
| `AWS_*`, `GOOGLE_*`, `AZURE_*` | credentials, regions, profiles and endpoints, by the rules of each service |
| `UCP_STORE_*` | how [object storage](storage.md#options) is reached: timeouts, attempts, endpoint |
| `UCP_METRICS` | where metrics go: [metrics](pipelines.md#metrics) |
| `NO_COLOR`, `TERM=dumb` | no colours on a terminal |

## In jobs

No command asks anything. Standard output carries what was asked for and nothing else; progress, notes, hints and errors
go to standard error (errors with `--json` to standard output, as its one document). Where these are no terminals there
are no colours, no bars and no control characters.

Ctrl-C and SIGTERM end every command in order, with exit code 130: what can be resumed has noted how far it is, and the
same command goes on. SIGKILL and a power cut are survived as well, with the work of about a second lost.
"""


def reference() -> str:
    """The whole page."""
    sections = [_HEAD, _exit_codes(), _JSON, _ENVIRONMENT, _help("ucp", program)]
    for name, command in commands():
        sections.append(_help(f"ucp {name}", command))
        if isinstance(command, Command):
            sections.append(_keys(command))
    return "\n".join(sections)


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command with its name, those of a group after it: ``spec``, ``spec check``."""
    for name in COMMANDS:
        command = program.get_command(click.Context(program), name)
        assert command is not None
        yield name, command
        if isinstance(command, click.Group):
            context = click.Context(command)
            for inner in command.list_commands(context):
                found = command.get_command(context, inner)
                assert found is not None
                yield f"{name} {inner}", found


def _help(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=name, max_content_width=_WIDTH, terminal_width=_WIDTH)
    context.help_option_names = ["-h", "--help"]
    return f"## {context.command_path}\n\n```text\n{command.get_help(context).rstrip()}\n```\n"


def _keys(command: Command) -> str:
    rows = "\n".join(f"| `{key}` | {meaning} |" for key, meaning in command.json_keys.items())
    return f"| JSON key | meaning |\n|---|---|\n{rows}\n"


def _exit_codes() -> str:
    rows = ["| 0 | | it worked |"]
    classes = [getattr(errors, name) for name in errors.__all__]
    for kind in sorted(classes, key=lambda kind: (kind.exit_code, kind.code)):
        meaning = (kind.__doc__ or "").strip().splitlines()[0]
        rows.append(f"| {kind.exit_code} | `{kind.code}` | {_MEANING.get(kind.code, meaning)} |")
    rows.append("| 137, 143 | | ended by SIGKILL, or by SIGTERM before the command began; running it again resumes |")
    rows.append("| 141 | | the reader of standard output went away |")
    return "## Exit codes\n\n| exit code | error code | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n"


_MEANING = {"internal": "A bug in ucp; please report it."}


if __name__ == "__main__":
    sys.stdout.write(reference())
