"""What a node's folder can do, whoever asks."""

from __future__ import annotations

from abc import abstractmethod

from ucp.store import Buffer, Store, Writer


class Member(Store):
    """The folder of one node, here or there: objects appear in it under their names only whole."""

    @abstractmethod
    def create(
        self,
        path: str,
        size: int,
        *,
        stamp: int | None = None,
        if_absent: bool = False,
        if_match: str | None = None,
        durable: bool = False,
    ) -> Writer:
        """As that of every store; the object gets its name, if the conditions of `put` hold, when it is closed.

        `stamp`, a time in nanoseconds, is part of its fingerprint: copies that have the same are one object.
        """

    def replace(self, path: str, size: int) -> Writer:
        return self.create(path, size)

    def put(
        self,
        path: str,
        data: Buffer,
        *,
        if_absent: bool = False,
        if_match: str | None = None,
        durable: bool = True,
        stamp: int | None = None,
    ) -> None:
        size = memoryview(data).nbytes
        with self.create(path, size, stamp=stamp, if_absent=if_absent, if_match=if_match, durable=durable) as writer:
            writer.write_at(0, data)

    @abstractmethod
    def child(self, path: str) -> Member:
        """The folder inside this one."""

    @abstractmethod
    def clear(self, path: str) -> None:
        """Remove the folder `path` with all that is in it: it is gone at once, its memory soon after."""

    @abstractmethod
    def room(self) -> int:
        """Bytes that can be written there."""
