"""What a caller holds of a save: whether it is staged, whether it is committed, and what became of it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SaveReport:
    """A checkpoint that is complete. Seconds count from the call.

    `bytes_written` are those of all ranks, `staged_seconds` what this rank's training waited for, at least.
    """

    url: str
    step: int | None
    form: str
    tensors: int
    ranks: int
    bytes_written: int
    seconds: float
    staged_seconds: float


class Outcome(Future[SaveReport]):
    """A future that knows whether anybody has heard of it."""

    heard = False

    def result(self, timeout: float | None = None) -> SaveReport:
        """As that of a Future."""
        try:
            return super().result(timeout)
        finally:
            self.heard |= self.done()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As that of a Future."""
        try:
            return super().exception(timeout)
        finally:
            self.heard |= self.done()

    @property
    def unheard(self) -> BaseException | None:
        """The error of a save that is over and has failed, if nobody has heard of it."""
        return Future.exception(self) if self.done() and not self.heard else None


class SaveHandle:
    """A save under way. When `staged` is done, the state may change; when `committed` is, the checkpoint is complete.

    A save that fails sets its error as the exception of `committed`, on every rank. Neither future can be cancelled.
    """

    def __init__(self, url: str, step: int | None) -> None:
        self.url, self.step = url, step
        self.staged: Future[None] = Future()
        self.committed = Outcome()
        self.staged.set_running_or_notify_cancel()
        self.committed.set_running_or_notify_cancel()

    @classmethod
    def over(cls, report: SaveReport) -> SaveHandle:
        """The handle of a save that had ended before anybody asked."""
        handle = cls(report.url, report.step)
        handle.staged.set_result(None)
        handle.committed.set_result(report)
        return handle

    def result(self, timeout: float | None = None) -> SaveReport:
        """Wait until the checkpoint is complete; raises what made it fail, TimeoutError after `timeout` seconds."""
        return self.committed.result(timeout)

    def done(self) -> bool:
        """Whether it is over, one way or the other."""
        return self.committed.done()

    def __repr__(self) -> str:
        told = "committed" if self.done() else "staged" if self.staged.done() else "staging"
        return f"<SaveHandle {self.url} step={self.step} {told}>"
