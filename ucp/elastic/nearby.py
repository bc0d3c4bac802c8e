"""A tier of the nodes of a job, their memory or their disks: versions of the state, each an ordinary checkpoint."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ucp.elastic.nodes.join import JoinedNodes
from ucp.elastic.nodes.member import Member
from ucp.elastic.versions import (
    EPOCH_FILE,
    RUN_FILE,
    Root,
    Shown,
    Version,
    epoch_folder,
    folder_of,
    mark_of,
    record_of,
    show,
    steps_in,
)
from ucp.errors import UcpError
from ucp.train.save import SaveHandle
from ucp.train.save.engine import engine_of
from ucp.train.save.forms import form_of

_log = logging.getLogger("ucp")

BUSY = "the save before it is under way"


class NodesTier:
    """Versions in the folders of all nodes, saved every `every` steps in a lane of their own.

    Of two that are complete the newer one is kept, once it is. A save that fails costs its version alone. `waits` says
    that a save which is due waits for the one before it; else it is left out (`against`).
    """

    def __init__(self, name: str, store: JoinedNodes, *, every: int, waits: bool = False) -> None:
        self.name, self.store, self.every, self.waits = name, store, every, waits
        self.unsaved = 0
        """Saves that were due and were left out, or failed."""
        self._left_out: dict[str, int] = {}
        self._needs = 0
        self._mark, self._unmarked = b"", ""
        self._handle: SaveHandle | None = None
        self._over = threading.Event()

    def show(self) -> Shown | None:
        """What this node has, told by its lowest rank."""
        return show(self.store.me, self.store.folder) if self.store.leads else None

    def due(self, step: int) -> bool:
        """Whether a step is to be saved."""
        return step % self.every == 0

    def begin(self, epoch: int, nodes: list[str], kept: Version | None, *, run: str) -> None:
        """After recovery from `kept`: drop newer versions, of histories that are given up, and those of other runs.

        From then on the folders are those of `run`, and say so, and who is where.
        """
        self.store.tend(nodes)
        if not self.store.leads:
            return
        newest = (-1, -1) if kept is None else (kept.step, kept.epoch)
        shown = self.store.each_tended(lambda member: _taken_over(member, run)).values()
        parts = [part for one in shown for part in one.parts]
        self._needs = self._share_of([part.root for part in parts if (part.step, part.epoch) == newest])
        for step, number in sorted({(part.step, part.epoch) for part in parts}):
            if (step, number) > newest:
                self._clear(folder_of(number, step))
        if kept is not None and kept.tier == self.name:
            # Copies that went with lost nodes; the next loss may come before the next save.
            at = folder_of(kept.epoch, kept.step)
            threading.Thread(target=self._heal, args=(at,), name="ucp-heal", daemon=True).start()
        self._mark = mark_of(run)
        self._unmarked = self._put_mark()
        with suppress(UcpError):  # it only makes messages say more
            self.store.folder.put(f"{epoch_folder(epoch)}/{EPOCH_FILE}", record_of(nodes), durable=False)

    def against(self) -> str:
        """What speaks, on this rank, against a save now; "" for nothing.

        What a version takes on this node is what the one before it took: a first one is tried in any case.
        """
        if self.waits:
            self.settle()
        if self._handle is not None and not (self._handle.done() and self._over.is_set()):
            return BUSY
        if self._unmarked:
            self._unmarked = self._put_mark()
        if self._unmarked:
            return self._unmarked
        if self.store.leads and self._needs:
            with suppress(UcpError):  # whoever cannot tell finds out by writing
                room = self.store.room()
                if room < self._needs:
                    return f"node {self.store.me} and those with its copies have room for {room} bytes of {self._needs}"
        return ""

    def skip(self, step: int, why: str) -> None:
        """Leave out the save of `step`; training goes on. The first of a row is in the log, and so is its end."""
        self.unsaved += 1
        kind = BUSY if why == BUSY else "no room"
        if kind not in self._left_out and self.store.leads:
            _log.warning("%s: step %d is left out, training goes on: %s", self.name, step, why)
        self._left_out[kind] = self._left_out.get(kind, 0) + 1

    def save(self, step: int, state: Any, *, epoch: int) -> SaveHandle:
        """Begin a save of `step`, after one that is under way. Collective over the active ranks."""
        self.settle()
        if self._left_out and self.store.leads:
            told = ", ".join(f"{count} ({kind})" for kind, count in self._left_out.items())
            _log.warning("%s: step %d is saved again; left out before: %s", self.name, step, told)
        self._left_out = {}
        path = folder_of(epoch, step)
        handle = engine_of(None, lane=self.name).start(
            state,
            f"{self.store.url}/{path}",
            step=step,
            form=form_of("native", share=False),
            wait=True,
            strict=False,
            overwrite=False,
        )
        over = threading.Event()
        self._handle, self._over = handle, over
        handle.committed.add_done_callback(lambda _: self._committed(handle, over, step, path))
        return handle

    def settle(self) -> None:
        """Wait for the save under way and what follows it, whatever becomes of it: what failed is in the log."""
        if self._handle is not None:
            self._handle.committed.exception()
            self._over.wait()

    def close(self, *, remove: bool) -> None:
        """Serve the others no longer; to `remove`, take away what this node has."""
        self.store.leave()
        if remove and self.store.leads:
            self.store.remove()

    def _put_mark(self) -> str:
        """Say in the folders that this node looks after whose they are; why that cannot be done, "" where it is."""
        try:
            self.store.each_tended(lambda member: member.put(RUN_FILE, self._mark))
        except UcpError as error:
            return f"node {self.store.me} cannot be told whose versions it has: {error}"
        return ""

    def _share_of(self, roots: Sequence[Root | None]) -> int:
        """Bytes that a version with one of `roots` takes on each node, as far as can be told before the first save."""
        sizes = next((sum(root.sizes.values()) for root in roots if root is not None), 0)
        nodes = len(self.store.nodes)
        return sizes * min(self.store.copies, nodes) // nodes

    def _heal(self, path: str) -> None:
        try:
            self.store.heal(path)
        except UcpError as error:
            _log.warning("%s: copies of %s that are lost could not be made again: %s", self.name, path, error)

    def _committed(self, handle: SaveHandle, over: threading.Event, step: int, path: str) -> None:
        """Drop what is older than what is complete now, also what could not be dropped before, or was copied since."""
        try:
            if handle.committed.exception() is not None:
                self.unsaved += 1
                return
            with suppress(UcpError):
                for held in self.store.each_tended(steps_in).values():
                    for old, epoch in held:
                        if old < step:
                            self._clear(folder_of(epoch, old))
            if self.store.leads:
                self._needs = sum(entry.size for entry in self.store.folder.entries(f"{path}/"))
        finally:
            over.set()

    def _clear(self, path: str) -> None:
        """Remove a version from this node, if this rank leads it, and from those that only spare ranks are on."""
        self.store.each_tended(lambda member: member.clear(path))


def _taken_over(member: Member, run: str) -> Shown:
    """What is in a folder once what another run has left there is removed."""
    shown = show("", member)
    if shown.of(run):
        return shown
    for epoch in shown.epochs:
        member.clear(epoch_folder(epoch))
    return Shown("")
