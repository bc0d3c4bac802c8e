"""Where a run goes on: the newest complete checkpoint, the same on all ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from ucp.errors import ContentError, NotFoundError, StorageError, UcpError
from ucp.lifecycle.shelf import Contents, Saved, Shelf, folder_name
from ucp.train.manager.ranks import Ranks
from ucp.train.report import LoadReport
from ucp.train.team import attempt, portable

_log = logging.getLogger("ucp")


@dataclass(frozen=True, slots=True)
class Resumed:
    """The checkpoint that a run goes on from, and what its loading did.

    `damaged` are (URL, error) of newer ones that were tried and left, `incomplete` the URLs of what is no checkpoint.
    """

    saved: Saved
    report: LoadReport
    damaged: tuple[tuple[str, str], ...] = ()
    incomplete: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.saved.step

    @property
    def url(self) -> str:
        """Where it lies."""
        return self.saved.url

    def __str__(self) -> str:
        passed = [f"left {url}, which is damaged: {error}" for url, error in self.damaged]
        passed += [f"{url} is incomplete" for url in self.incomplete]
        return "\n  ".join([f"resumed step {self.step} from {self.url}", *passed])


def resume(
    shelf: Shelf, ranks: Ranks, contents: Contents, load: Callable[[str], LoadReport], *, step: int | None, older: bool
) -> Resumed | None:
    """Load the checkpoint of `step`, or the newest; with `older`, the next older one instead of a damaged one.

    None if there is none. Every rank tries the same one, and all of them succeed or none does.
    """
    left: list[tuple[str, str]] = []
    for saved in candidates(shelf, contents, step):
        failed: Exception = NotFoundError(saved.url)
        copies = ranks.decide(partial(shelf.copies, saved))
        for place in copies:
            mine = attempt(partial(load, place.url))
            worst = _worst(ranks.gather(portable(mine if isinstance(mine, Exception) else None, ranks.rank)))
            if worst is None:
                return Resumed(place, mine, tuple(left), tuple(shelf.where(step) for step in contents.incomplete))
            failed = worst
            if place is copies[-1] or not isinstance(failed, ContentError | NotFoundError | StorageError):
                break
            left.append((place.url, str(failed)))
            _log.warning("%s is not whole, trying the copy of it in %s: %s", place.url, copies[-1].url, failed)
        own = mine if isinstance(mine, Exception) else None
        if not isinstance(failed, ContentError):
            raise failed from own
        if step is not None or not older:
            raise _with_remedy(failed, saved, contents) from own
        left.append((place.url, str(failed)))
        _log.warning("%s is damaged, trying the one before: %s", place.url, failed)
    if left:
        urls = ", ".join(url for url, _ in left)
        raise ContentError(f"every checkpoint of the run is damaged: {urls}: {left[0][1]}", hint="restore one of them")
    return None


def candidates(shelf: Shelf, contents: Contents, step: int | None) -> tuple[Saved, ...]:
    """Complete ones, newest first, or that of `step`; NotFoundError if it is not there or incomplete."""
    if step is None:
        return contents.live[::-1]
    found = tuple(saved for saved in contents.saved if saved.step == step)
    if not found:
        what = "an incomplete checkpoint" if step in contents.incomplete else "no checkpoint"
        there = " ".join(str(saved.step) for saved in contents.saved)
        raise NotFoundError(
            f"{shelf.where(step)}: {what}", hint=f"complete are steps {there}" if there else "there is no other either"
        )
    return found


def _worst(outcomes: Iterable[Exception | None]) -> Exception | None:
    """Of what the ranks raised, the first that is no damage of the checkpoint, else the first."""
    failed = [error for error in outcomes if error is not None]
    return next((error for error in failed if not isinstance(error, ContentError)), failed[0] if failed else None)


def _with_remedy(error: UcpError, saved: Saved, contents: Contents) -> UcpError:
    """The same error with what can be done about it."""
    before = [one.step for one in contents.live if one.step < saved.step]
    hint = f"{error.hint}; " if error.hint else ""
    hint += (
        f"or go on from {folder_name(before[-1])}: resume(..., step={before[-1]}); damaged='older' does so by itself"
        if before
        else "there is no other"
    )
    return type(error)(f"{saved.url} cannot be resumed from: {error.message}", hint=hint)
