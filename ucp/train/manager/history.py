"""What a run knows of its folder, the same on all ranks: how far it is, and which folders it will come across."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from ucp.errors import ConflictError, UsageError
from ucp.lifecycle.shelf import Contents


@dataclass(slots=True)
class History:
    """`newest` is the newest step that is saved or being saved, `in_the_way` are folders to be replaced.

    `ours` says that this run made `newest` or went on from it. In the way are incomplete checkpoints, and those of a
    history that was given up by resuming from an earlier step. `others` are folders that somebody else made.
    """

    newest: int | None = None
    in_the_way: set[int] = field(default_factory=set)
    ours: bool = False
    others: frozenset[int] = frozenset()

    @classmethod
    def after(cls, contents: Contents, newest: int | None) -> Self:
        """When the run goes on after the step `newest`, or begins, and finds the folder so."""
        passed = {saved.step for saved in contents.saved if saved.aside or newest is None or saved.step > newest}
        cut_short = {*contents.incomplete} - contents.others
        return cls(newest, (cut_short | passed) - {newest}, ours=True, others=contents.others)

    @classmethod
    def after_other(cls, contents: Contents, step: int) -> Self:
        """When the run goes on after `step`, which came from elsewhere: the folder need not have it."""
        passed = {saved.step for saved in contents.saved if saved.aside or saved.step > step}
        newest = max((saved.step for saved in contents.live if saved.step <= step), default=None)
        cut_short = {*contents.incomplete} - contents.others
        return cls(newest, cut_short | passed, ours=True, others=contents.others)

    @classmethod
    def unasked(cls, contents: Contents) -> Self:
        """Without `resume`: the run can only go on after what is there."""
        newest = max((saved.step for saved in contents.live), default=None)
        cut_short = {*contents.incomplete} - contents.others
        aside = {saved.step for saved in contents.saved if saved.aside}
        return cls(newest, cut_short | aside, others=contents.others)

    def check(self, step: int, url: str) -> None:
        """Refuse a save that would not be the newest: retention and `resume` would take it for an old one.

        And one into a folder of somebody else's, which is never deleted.
        """
        if step in self.others:
            raise ConflictError(
                f"{url}: step {step} is to be saved where files lie that are no checkpoint of this run",
                hint="a new run needs a folder of its own",
            )
        if self.newest is None or step > self.newest:
            return
        if self.ours:
            raise UsageError(f"{url}: step {step} is not after {self.newest}, which is saved", hint="steps count up")
        raise ConflictError(
            f"{url}: holds checkpoints up to step {self.newest}, and step {step} is to be saved",
            hint="resume(state) goes on from them; a new run needs a folder of its own",
        )
