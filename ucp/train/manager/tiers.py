"""Two folders of one run: a fast one that is written, and one to which complete checkpoints are copied behind."""

from __future__ import annotations

import uuid
from contextlib import suppress
from dataclasses import replace

from ucp.errors import StorageError, UsageError
from ucp.lifecycle.shelf import ROOTS, Contents, Saved, Shelf, folder_name
from ucp.store import open_store
from ucp.train.manager.ranks import Ranks


class Tiers(Shelf):
    """The folder at `url`, which is written, and the one at `upload`; each step counts once, the nearest copy first."""

    def __init__(self, url: str, upload: str) -> None:
        super().__init__(url)
        self.far = Shelf(upload)
        if open_store(url).overlaps(self.far.store):
            raise UsageError(f"upload={upload!r} overlaps {url}", hint="give a folder somewhere else")

    def near(self) -> Contents:
        """What the fast folder alone holds."""
        return super().contents()

    def contents(self) -> Contents:
        """What is complete in either folder; incomplete is what the fast one has of steps that are complete nowhere."""
        near, far = super().contents(), self.far.contents()
        saved = {one.step: one for one in (*far.saved, *near.saved)}
        return Contents(
            tuple(saved[step] for step in sorted(saved)),
            tuple(step for step in near.incomplete if step not in saved),
            near.others - saved.keys(),
        )

    def copies(self, saved: Saved) -> tuple[Saved, ...]:
        """The nearest copy of a checkpoint, then that in the other folder if there is one.

        What lies there aside, of a history that was given up while this one goes on, is none.
        """
        far = replace(saved, url=self.far.where(saved.step))
        if saved.url == far.url or not self.far.complete(saved.step):
            return (saved,)
        other = self.far.saved(saved.step).aside and not saved.aside and not self.is_same(saved.step)
        return (saved,) if other else (saved, far)

    def is_same(self, step: int) -> bool:
        """Whether both folders hold the same checkpoint of a step: its root names all else with its digest."""
        near, far = ([_root(shelf, f"{folder_name(step)}/{root}") for root in ROOTS] for shelf in (self, self.far))
        return near == far

    def mark(self, saved: Saved, *, aside: bool) -> None:
        """Say in both folders whether the checkpoint belongs to a history that was given up."""
        for shelf in (self.far, self):
            if shelf.complete(saved.step):
                shelf.record(saved.step, saved.metrics, aside=aside)

    def remove(self, step: int) -> None:
        """Delete a step in both folders, in the far one first: what is left there would be taken up again."""
        self.far.remove(step)
        super().remove(step)

    def check_shared(self, ranks: Ranks) -> None:
        """UsageError, on all ranks, unless all of them see the same fast folder. Collective.

        On a disk of its own each node would hold the shards of its ranks alone, and nobody could copy the whole.
        """
        if ranks.size == 1:
            return
        token = ranks.decide(self._leave_token)
        try:
            seen = ranks.gather(self.store.exists(token))
        finally:
            if ranks.rank == 0:
                with suppress(StorageError):
                    self.store.delete(token)
        if not all(seen):
            raise UsageError(
                f"{self.address}: rank {seen.index(False)} does not see what rank 0 writes there",
                hint="with upload=, saves go to a folder that all ranks share; disks of single nodes cannot be used "
                "by a job on several",
            )

    def _leave_token(self) -> str:
        token = f".shared-{uuid.uuid4().hex}"
        self.store.put(token, b"", durable=False)
        return token


def _root(shelf: Shelf, path: str) -> bytes | None:
    return shelf.store.read(path) if shelf.store.exists(path) else None
