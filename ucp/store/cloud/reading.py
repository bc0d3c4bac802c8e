"""Ranged GETs, several at once, straight into the caller's buffers, each answer checked for its length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from ucp.errors import CorruptError
from ucp.store.cloud.client import Client
from ucp.store.cloud.failure import Failure, Kind, RequestError
from ucp.store.cloud.pool import spread
from ucp.store.cloud.ranges import PART_BYTES, Fetch, fetches


def read_fetches(client: Client, key: str, wanted: Sequence[Fetch], *, name: str, tag: str | None = None) -> None:
    """Carry out `wanted` on the object `key`, at most the client's concurrency at once.

    CorruptError if the object ends before a range does or was replaced between two answers, NotFoundError if there is
    none, StorageError if the service fails. `name` is the object's URL for messages, `tag` an ETag that it had.
    """
    seen: set[str] = set() if tag is None else {tag}
    jobs: list[Callable[[], None]] = [partial(_fetch, client, key, fetch, seen, name) for fetch in wanted]
    spread(jobs, client.concurrency)
    if len(seen) > 1:
        raise CorruptError(f"{name}: was replaced while it was read", hint="nobody else may be writing; try again")


def read_rest(client: Client, key: str, offset: int, *, name: str) -> bytes:
    """All bytes from `offset`: with one request if they are not more than a part, else the rest in parallel.

    Errors as of `read_fetches`.
    """
    try:
        size, tag, data = client.persistently(
            "get", partial(_first, client, key, offset), read=lambda answer: len(answer[2])
        )
    except RequestError as error:
        failed = error
    else:
        if size <= offset + len(data):
            return bytes(data)
        whole = bytearray(size - offset)
        whole[: len(data)] = data
        rest = memoryview(whole)[len(data) :]
        read_fetches(client, key, fetches([(offset + len(data), rest)]), name=name, tag=tag)
        return bytes(whole)
    size = _size_if_past(client, key, offset, failed, name=name)
    if size < offset:
        raise CorruptError(f"{name}: ends at byte {size}, {offset - size} bytes early", hint="the object is truncated")
    return b""


def _first(client: Client, key: str, offset: int) -> tuple[int, str, memoryview]:
    size, tag, data = client.get(key, offset, offset + PART_BYTES)
    if len(data) != min(size - offset, PART_BYTES):
        raise RequestError(Failure(Kind.TRUNCATED), 1, 0.0)
    return size, tag, memoryview(data)


def _size_if_past(client: Client, key: str, offset: int, failed: RequestError, *, name: str) -> int:
    """The size of an object that is not larger than `offset`, or what `failed` means.

    Asked for a range past the end, some servers do not say so but send all there is, such as nginx of an empty file.
    """
    if failed.failure.kind in (Kind.PAST_END, Kind.NO_RANGES):
        try:
            size = client.persistently("head", lambda: int(client.head(key)["size"]))
        except RequestError as error:
            failed = error if error.failure.kind is Kind.MISSING else failed
        else:
            if size <= offset:
                return size
    raise failed.public(name) from None


def _fetch(client: Client, key: str, fetch: Fetch, seen: set[str], name: str) -> None:
    try:
        length = fetch.stop - fetch.start
        seen.add(client.persistently("get", partial(_get, client, key, fetch, name), read=length))
        return
    except RequestError as error:
        failed = error
    raise _early(name, fetch, _size_if_past(client, key, fetch.start, failed, name=name))


def _get(client: Client, key: str, fetch: Fetch, name: str) -> str:
    """One request; gives the ETag of what answered."""
    size, tag, data = client.get(key, fetch.start, fetch.stop)
    if size < fetch.stop:
        raise _early(name, fetch, size)
    if len(data) != fetch.stop - fetch.start:
        raise RequestError(Failure(Kind.TRUNCATED), 1, 0.0)
    _scatter(fetch, memoryview(data))
    return tag


def _early(name: str, fetch: Fetch, size: int) -> CorruptError:
    stop = max(offset + len(buffer) for offset, buffer in fetch.ranges)
    return CorruptError(f"{name}: ends at byte {size}, {stop - size} bytes early", hint="the object is truncated")


def _scatter(fetch: Fetch, data: memoryview) -> None:
    """Copy an answer to where it is wanted. NumPy lets other threads run meanwhile, a memoryview does not."""
    source = np.frombuffer(data, np.uint8)
    for offset, buffer in fetch.ranges:
        at = offset - fetch.start
        np.copyto(np.frombuffer(buffer, np.uint8), source[at : at + len(buffer)])
