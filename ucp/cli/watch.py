"""``ucp watch``: convert, verify and publish what appears under a prefix."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from ucp.cli import text
from ucp.cli.command import command as declare
from ucp.cli.conversion import Asked, conversion_options
from ucp.cli.duration import SECONDS
from ucp.cli.output import Output
from ucp.cli.progress import Show, shown
from ucp.errors import InterruptedRunError

if TYPE_CHECKING:
    from ucp.pipeline import Event, Outcome

KEYS = {
    "source": "URL of the prefix that is watched",
    "destination": "URL of the prefix that results lie under",
    "to": "family of the results",
    "ok": "whether nothing failed; the exit code is then 0, else that of the newest checkpoint that failed",
    "published": "what the pointer says, or null: `name`, `url`, `family`, `step`, `bytes`, `root` (the object that "
    "makes it a checkpoint), `digest` (of that object), `source`, `check` (how it was verified) and `bytes_verified`",
    "kept": "list of names of results that are there and verified, newest first",
    "busy": "list of names that another watcher is at work on",
    "incomplete": "list of names of folders that are no checkpoint, or none yet",
    "failed": "list of checkpoints that could not be converted or verified: `name`, `code`, `message`, `hint`, "
    "`exit_code`, `attempts` and `retry_in`, seconds until it is tried again",
    "events": "list of what was done: `event` (`converting`, `verifying`, `verified`, `published`, `retired`, "
    "`pruned`, `incomplete`, `busy`, `failed`), `name`, and more that belongs to it; without --once each is printed "
    "by itself, as one line, when it happens, and there is no document",
}


@declare("watch", json_keys=KEYS)
@conversion_options
@click.option("--once", is_flag=True, help="One pass, and an exit code that says how it went.")
@click.option("--every", type=SECONDS, default="30s", show_default=True, help="Time between passes.")
@click.option("--keep", type=click.IntRange(min=1), metavar="N", help="Keep the newest N results, remove older ones.")
@click.option("--grace", type=SECONDS, default="15m", show_default=True, help="How long older ones stay all the same.")
@click.option("--ready", metavar="NAME", help="Leave alone what does not hold this object, such as _SUCCESS.")
@click.option(
    "--verify",
    type=click.Choice(["auto", "deep", "source", "sizes"]),
    default="auto",
    show_default=True,
    help="Read results back against their digests (deep), or compare them with the source, byte by byte; auto does "
    "the latter where a form has no digests.",
)
@click.option("--pointer", default="latest.json", show_default=True, metavar="NAME", help="Object to publish with.")
@click.option("--lease", type=SECONDS, default="2m", show_default=True, help="Silence after which a watcher is dead.")
def command(
    out: Output,
    asked: Asked,
    once: bool,
    every: float,
    keep: int | None,
    grace: float,
    ready: str | None,
    verify: Any,
    pointer: str,
    lease: float,
) -> None:
    """Convert, verify and publish what appears under a prefix.

    Every folder SOURCE/NAME that is a complete checkpoint becomes DESTINATION/NAME, the newest first: names are
    sorted, with their numbers as numbers. What was verified is published: DESTINATION/latest.json names the newest.
    A checkpoint that is damaged is told, passed over and tried again later. Killed anywhere, the same command goes
    on; several may watch the same prefixes and share the work. Nothing is stored on the machine itself.
    """
    from ucp.pipeline import Settings, Watch

    settings = Settings(
        asked.source,
        asked.destination,
        asked.options,
        keep=keep,
        grace=grace,
        ready=ready,
        check=verify,
        pointer=pointer,
        lease=lease,
        workers=asked.workers,
    )
    with _going_on(), shown(out, "watching") as show:
        telling = _Telling(out, once, show)
        watch = Watch(settings, on_event=telling.event, on_progress=telling.progress)
        if not once:
            watch.run(every=every)
        outcome = watch.once()
    _end(out, watch.urls, asked.to, outcome, telling.events)


@contextmanager
def _going_on() -> Iterator[None]:
    """Whatever stops a watcher, the same command goes on."""
    try:
        yield
    except (KeyboardInterrupt, InterruptedRunError):
        raise InterruptedRunError("the watcher was stopped", hint="the same command goes on") from None


@dataclass(slots=True)
class _Telling:
    """Tells events as they happen, or with --json and --once at the end."""

    out: Output
    once: bool
    progress: Show
    events: list[dict[str, Any]] = field(default_factory=list)

    def event(self, event: Event) -> None:
        document = {"event": event.kind, "name": event.name, **event.detail}
        if self.out.mode != "json":
            _print(self.out, event)
            sys.stdout.flush()  # whoever reads a log wants to see it grow
        elif self.once:
            self.events.append(document)
        else:
            self.out.json_line(document)


def _print(out: Output, event: Event) -> None:
    detail, name = event.detail, (event.name, "bold")
    match event.kind:
        case "failed":
            again = f"; again in {text.duration(detail['retry_in'])}" if detail["retry_in"] else ""
            lead = (f"error[{detail['code']}]: ", "red")
            out.complain(lead, name, "  " if event.name else "", detail["message"], again)
        case "published" if out.human:
            out.line(("published", "green"), "  ", name, f"  {detail['url']}")
        case "published":
            out.line(detail["url"])
        case "verified" if out.human:
            out.line(("verified", "green"), "   ", name, f"  {text.size(detail['bytes'])}")
        case "retired" | "pruned" if out.human:
            out.line(event.kind.ljust(11), name)
        case "incomplete" | "busy" | "converting" | "verifying":
            out.remark((event.kind.ljust(11), "dim"), name)


def _end(out: Output, urls: tuple[str, str], to: str, outcome: Outcome, events: list[dict[str, Any]]) -> None:
    published = outcome.published
    if out.mode == "json":
        out.json(
            {
                "source": urls[0],
                "destination": urls[1],
                "to": to,
                "ok": not outcome.failed,
                "published": None if published is None else {"name": published.name, **published.about},
                "kept": outcome.kept,
                "busy": outcome.busy,
                "incomplete": outcome.incomplete,
                "failed": [{"name": failure.name, **failure.detail} for failure in outcome.failed],
                "events": events,
            }
        )
    elif out.human:
        latest = f"the newest is {published.name}" if published else "nothing is published"
        parts = [f"{text.plural(len(outcome.kept), 'result')}", latest]
        parts += [f"{len(names)} {word}" for word, names in _rest(outcome) if names]
        out.remark(("; ".join(parts), "dim"))
    for failure in outcome.failed:
        sys.exit(failure.exit_code)


def _rest(outcome: Outcome) -> list[tuple[str, list[Any]]]:
    return [("failed", [*outcome.failed]), ("busy", [*outcome.busy]), ("incomplete", [*outcome.incomplete])]
