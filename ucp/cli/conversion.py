"""What `ucp plan` and `ucp convert` share: arguments and options of a conversion, and the command line that runs it."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from ucp.cli.command import Reading, named_options, reading_options
from ucp.cli.spec_options import Using, parse_flags, parse_mesh, parse_sizes
from ucp.store.errors import without_secrets

if TYPE_CHECKING:
    from ucp.run.convert import Conversion


@dataclass(frozen=True, slots=True)
class Asked:
    """The conversion that the command line asks for; `workers` is None for the default."""

    source: str
    destination: str
    to: str
    check: bool
    workers: int | None
    reading: Reading
    to_program: str | None
    using: Using
    lossy: bool
    target_options: dict[str, str | tuple[str, ...]]

    def prepare(self, *, restart: bool = False, overwrite: bool = False, share: bool = False) -> Conversion:
        """The conversion, ready to run."""
        from ucp.run.convert import prepare

        options = {"restart": restart, "overwrite": overwrite, "share": share, **self.options}
        return prepare(self.source, self.destination, **options)

    @property
    def options(self) -> dict[str, Any]:
        """What `ucp.prepare` takes beside the two URLs."""
        return {
            "to": self.to,
            "family": self.reading.family,
            "program": self.reading.program,
            "sizes": self.reading.sizes,
            "flags": self.reading.flags,
            "check": self.check,
            "mesh": self.using.mesh,
            "to_program": self.to_program,
            "to_sizes": self.using.sizes,
            "to_flags": self.using.flags,
            "lossy": self.lossy,
            "read_options": self.reading.options,
            **self.target_options,
        }


def conversion_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Arguments and options that say what is converted into what; the function gets them as one `Asked`."""

    @functools.wraps(function)
    def run(
        *args: Any,
        source: str,
        destination: str,
        to: str,
        no_check: bool,
        workers: int | None,
        mesh: str | None,
        to_spec: str | None,
        to_size: Sequence[str],
        to_flag: Sequence[str],
        lossy: bool,
        target_option: Sequence[str],
        reading: Reading,
        **rest: Any,
    ) -> Any:
        options = named_options(target_option, reserved=_TAKEN)
        using = Using(parse_mesh(mesh), parse_sizes(to_size), parse_flags(to_flag))
        asked = Asked(source, destination, to, not no_check, workers, reading, to_spec, using, lossy, options)
        return function(*args, asked=asked, **rest)

    decorated = reading_options(run)
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated


_TAKEN = (
    *(
        "source",
        "destination",
        "to",
        "family",
        "program",
        "sizes",
        "flags",
        "check",
        "restart",
        "overwrite",
        "share",
        "mesh",
        "lossy",
    ),
    *("to_program", "to_sizes", "to_flags", "layout", "read_options", "catalog", "store", "self"),
)
_OPTIONS = (
    click.argument("source"),
    click.argument("destination"),
    click.option("--to", default="universal", show_default=True, help="Family of the result."),
    click.option("--mesh", metavar="AXIS=N,...", help="Ranks that the result is laid out for, such as tp=2,pp=4."),
    click.option(
        "--to-spec",
        metavar="PROGRAM",
        help="Lay the result out by this program: a file, or one of `ucp spec list`. By default the family chooses.",
    ),
    click.option("--to-size", multiple=True, metavar="NAME=N", help="A size of the result's program; may be repeated."),
    click.option(
        "--to-flag", multiple=True, metavar="NAME=yes|no", help="A flag of the result's program; may be repeated."
    ),
    click.option(
        "-t",
        "--target-option",
        multiple=True,
        metavar="NAME=VALUE",
        help="Option of the family of the result, such as shard_bytes=256MiB of universal; may be repeated.",
    ),
    click.option("--workers", type=click.IntRange(min=1), help="Workers at a time; the number of cores by default."),
    click.option("--lossy", is_flag=True, help="Accept a result that is not exact; notes say in what."),
    click.option("--no-check", is_flag=True, help="Do not compare low-precision copies and replicas."),
)


def rerun() -> str:
    """The `ucp convert` command line with the arguments of the running command."""
    context = click.get_current_context()
    words = ["ucp", "convert", *(without_secrets(context.params[name]) for name in ("source", "destination"))]
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
