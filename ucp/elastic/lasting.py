"""What of a run lasts: its checkpoints in storage, the last step among them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ucp.errors import UcpError
from ucp.lifecycle.shelf import folder_name
from ucp.train.manager import CheckpointManager
from ucp.train.save import SaveHandle, SaveReport

_log = logging.getLogger("ucp")


class Lasting:
    """The saves of a run by its `manager`, and the last of them."""

    def __init__(self, manager: CheckpointManager) -> None:
        self.manager = manager
        self._last: SaveHandle | None = None

    def step(self, step: int, state: Any, metrics: Mapping[str, Any] | None) -> bool:
        """Save what is due, and tell whether anything was. Collective."""
        begun = self.manager.step(step, state, metrics=metrics)
        self._last = begun or self._last
        return begun is not None

    def save(self, step: int, state: Any, metrics: Mapping[str, Any] | None) -> SaveHandle:
        """Save `step`, unless it is saved already: its metrics are those given now, if any. Collective."""
        if step != self.manager.newest:
            self._last = self.manager.save(step, state, metrics=metrics)
        elif metrics is not None:
            self.manager.measured(step, metrics)
        if self._last is None or self._last.step != step:  # an earlier start saved it
            where = f"{self.manager.url.rstrip('/')}/{folder_name(step)}"
            self._last = SaveHandle.over(SaveReport(where, step, "", 0, 0, 0, 0.0, 0.0))
        return self._last

    def end(self, step: int, state: Any, metrics: Mapping[str, Any] | None = None) -> bool:
        """Save the last step, unless that is done: what nodes hold is removed when the run ends. Collective.

        Who gives no `every` says himself what is to stay.
        """
        due = self.manager.every is not None and self.manager.newest != step
        if due:
            self.save(step, state, metrics)
        return due

    def warn_of_loss(self, done: int, *, nodes: bool) -> None:
        """Say so if the run, of `done` steps, ends with some lost that were to be kept: on `nodes`, or by `every`."""
        if not done or (self.manager.every is None and not nodes):
            return
        url = self.manager.url
        try:
            latest = self.manager.latest
        except UcpError as error:
            _log.warning("%s: whether storage has step %d is not known: %s", url, done, error)
            return
        stored = 0 if latest is None else latest.step
        if done > stored:
            _log.warning(
                "%s: the run ends at step %d, and storage has %s: what comes after is not kept. To keep it, call "
                "run.save(run.done, state) before the block ends",
                url,
                done,
                f"step {stored}" if stored else "none",
            )
