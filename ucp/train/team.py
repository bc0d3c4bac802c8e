"""All ranks of a job doing something together, so that it succeeds on all of them or raises on all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import distributed

from ucp.errors import StorageError, UcpError

Mine = TypeVar("Mine")
Answer = TypeVar("Answer")


class Team:
    """The ranks of the default process group; alone where there is none. `purpose` is named in errors."""

    def __init__(self, purpose: str) -> None:
        self.purpose = purpose
        self._grouped = distributed.is_available() and distributed.is_initialized()
        self.rank: int = distributed.get_rank() if self._grouped else 0
        self.world: int = distributed.get_world_size() if self._grouped else 1

    def round(self, work: Callable[[], Mine], answer: Callable[[Sequence[Mine]], Sequence[Answer]]) -> Answer:
        """Every rank does `work`, rank 0 makes an answer for each rank of all results, each rank gets its own.

        Whatever `work` raises on any rank, or `answer` on rank 0, every rank raises; StorageError if a rank is gone.
        """
        result = attempt(work)
        results = self._exchange(self._gather, portable(result, self.rank))
        answers: list[Any] | None = None
        if self.rank == 0:
            failed = next((found for found in results if isinstance(found, Exception)), None)
            made = failed if failed is not None else attempt(lambda: answer(results))
            answers = [portable(made, 0)] * self.world if isinstance(made, Exception) else list(made)
        given = self._exchange(self._scatter, answers)
        if isinstance(result, Exception):
            raise result
        if isinstance(given, Exception):
            raise given
        return given  # type: ignore[no-any-return]

    def _exchange(self, collective: Callable[[Any], Any], value: Any) -> Any:
        try:
            return collective(value)
        except RuntimeError as error:
            raise StorageError(
                f"{self.purpose}: given up, another rank is gone ({str(error).splitlines()[0]})",
                hint="what was written is no checkpoint; see the log of the rank that ended first",
            ) from error

    def _gather(self, value: Any) -> list[Any]:
        if not self._grouped:
            return [value]
        values: list[Any] | None = [None] * self.world if self.rank == 0 else None
        distributed.gather_object(value, values)
        return values or []

    def _scatter(self, values: list[Any] | None) -> Any:
        if not self._grouped:
            return values[0] if values else None
        received: list[Any] = [None]
        distributed.scatter_object_list(received, values)
        return received[0]


def attempt(work: Callable[[], Any]) -> Any:
    """What `work` returns, or the exception it raises."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001  the others wait to hear of it
        return error


def portable(result: Any, rank: int) -> Any:
    """`result` as it can travel: our own errors do as they are, others by name and message."""
    if not isinstance(result, Exception):
        return result
    if isinstance(result, UcpError):
        return type(result)(result.message, hint=result.hint)
    return UcpError(f"rank {rank} failed: {type(result).__name__}: {result}")
