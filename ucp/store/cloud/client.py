"""One client per bucket and settings, shared by the stores of a process: connections are kept and used again."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from ucp.errors import UcpError, UsageError
from ucp.store.base import Buffer
from ucp.store.cloud import aws, azure, google
from ucp.store.cloud.address import Address
from ucp.store.cloud.failure import Failure, Kind, RequestError, classify
from ucp.store.cloud.options import Options
from ucp.store.cloud.retry import ATTEMPTS, SECONDS, Policy, Trial, persistently

if TYPE_CHECKING:
    from obstore.store import ObjectStore

T = TypeVar("T")
_PAGE = 1000
CONCURRENCY = 16
_CONNECT_SECONDS = 10.0
_READ_SECONDS = 60.0
_FAMILIES = {"s3": aws.store, "gs": google.store, "az": azure.store}
_ENVIRONMENT = (
    "AWS_",
    "AZURE_",
    "AZURITE_",
    "GOOGLE_",
    "UCP_STORE_",
    "STORAGE_",
    "HOME",
    "HTTP",
    "ALL_PROXY",
    "NO_PROXY",
)


@dataclass(frozen=True, slots=True)
class Client:
    """Requests to one bucket, without retries but for those of `upload`. Exceptions are those of obstore."""

    family: str
    once: ObjectStore = field(repr=False)
    patient: ObjectStore = field(repr=False)
    policy: Policy
    concurrency: int

    def persistently(
        self,
        operation: str,
        call: Callable[[], T],
        *,
        read: int | Callable[[T], int] = 0,
        written: int = 0,
        trial: Trial | None = None,
    ) -> T:
        """What `call` returns, tried again where that may help; RequestError when it is given up."""
        return persistently(self.policy, (self.family, operation), call, read=read, written=written, trial=trial)

    def head(self, key: str) -> dict[str, Any]:
        """What is known of an object."""
        import obstore

        return dict(obstore.head(self.once, key))

    def list(self, folder: str) -> list[dict[str, Any]]:
        """All objects below a folder, page by page."""
        import obstore

        pages = obstore.list(self.once, folder or None, chunk_size=_PAGE)
        return [dict(meta) for page in pages for meta in page]

    def level(self, folder: str) -> dict[str, Any]:
        """The objects directly in a folder, and the folders there."""
        import obstore

        return dict(obstore.list_with_delimiter(self.once, folder or None))

    def get(self, key: str, start: int, stop: int) -> tuple[int, str, Buffer]:
        """Size and ETag of an object, and its bytes from `start` to `stop` or to its end."""
        import obstore

        answer = obstore.get(self.once, key, options={"range": (start, stop)})
        meta = answer.meta
        return meta["size"], meta["e_tag"] or "", memoryview(answer.bytes())

    def peek(self, key: str) -> dict[str, Any]:
        """What is known of an object, by asking for its first byte."""
        import obstore

        return dict(obstore.get(self.once, key, options={"range": (0, 1)}).meta)

    def put(
        self,
        key: str,
        data: Buffer,
        *,
        if_absent: bool = False,
        if_match: str | None = None,
        trial: Trial | None = None,
    ) -> None:
        """Write an object with one request, tried again where that may help; RequestError when it is given up."""
        import obstore

        def attempt(mode: Any) -> None:
            self.persistently(
                "put",
                lambda: obstore.put(self.once, key, data, mode=mode, use_multipart=False),
                written=memoryview(data).nbytes,
                trial=trial,
            )

        if if_match is None:
            attempt("create" if if_absent else "overwrite")
            return
        try:
            attempt(self._version(key, if_match))
        except RequestError as error:
            if self.family != "s3" or error.failure.kind is not Kind.CONDITION:
                raise
            # Ceph compares the condition with the ETag as it stands, without the quotes of RFC 9110, section 8.8.3.
            attempt({"e_tag": if_match})

    def _version(self, key: str, fingerprint: str) -> dict[str, str]:
        """The condition that an object still has `fingerprint`. Google's is the generation, which a list does not tell.

        RequestError if it has another one.
        """
        if self.family != "gs":
            return {"e_tag": f'"{fingerprint}"'}
        meta = self.persistently("head", lambda: self.head(key))
        if (meta["e_tag"] or "").strip('"') != fingerprint:
            raise RequestError(Failure(Kind.CONDITION), 1, 0.0)
        if meta["version"] is None:
            raise RequestError(Failure(Kind.REFUSED, 0, "the server tells no generation"), 1, 0.0)
        return {"e_tag": meta["e_tag"], "version": meta["version"]}

    def upload(self, key: str, parts: Iterator[Buffer], *, part_bytes: int, most: int) -> None:
        """Write an object in parts of `part_bytes`, at most so many at once; it is given up if `parts` raises."""
        import obstore

        obstore.put(self.patient, key, parts, use_multipart=True, chunk_size=part_bytes, max_concurrency=most)

    def delete(self, key: str) -> None:
        """Delete an object."""
        import obstore

        obstore.delete(self.once, key)


_clients: dict[tuple[object, ...], Client] = {}
_lock = threading.Lock()
_used_in = 0


def connect(address: Address, options: Options) -> Client:
    """The client of a bucket, made at first use; UsageError if options or environment cannot be."""
    identity = (address.family, address.bucket, address.host, options, _environment())
    with _lock:
        client = _clients.get(identity)
        if client is None:
            _check_not_forked()
            client = _clients[identity] = _connect(address, options.resolved(address.bucket))
        return client


def _connect(address: Address, options: Options) -> Client:
    policy = _policy(options)
    make = _FAMILIES[address.family]
    try:
        once = make(address, options, retry_config=policy.off(), client_options=settings(options))
        patient = make(address, options, retry_config=policy.on(), client_options=settings(options))
    except UcpError:
        raise
    except Exception as error:
        if not type(error).__module__.startswith("obstore") and not isinstance(error, ValueError | TypeError):
            raise
        failure = classify(error)
    else:
        return Client(address.family, once, patient, policy, options.concurrency or CONCURRENCY)
    raise UsageError(f"{address.url}: {failure.text}", hint="check the options and the environment (docs/storage.md)")


def connect_http(address: str, options: Options) -> Client:
    """The client of a folder on a web server."""
    identity = ("http", address, options, _environment())
    with _lock:
        client = _clients.get(identity)
        if client is None:
            _check_not_forked()
            client = _clients[identity] = _connect_http(address, options.resolved())
        return client


def _connect_http(address: str, options: Options) -> Client:
    from obstore.store import HTTPStore

    policy = _policy(options)
    client_options: Any = {**settings(options), "allow_http": True}
    once = HTTPStore(address, client_options=client_options, retry_config=policy.off())  # type: ignore[arg-type]
    return Client(address.partition(":")[0], once, once, policy, options.concurrency or CONCURRENCY)


def _policy(options: Options) -> Policy:
    return Policy(options.attempts or ATTEMPTS, options.retry_seconds or SECONDS)


def settings(options: Options) -> dict[str, Any]:
    """Settings of the HTTP client. There is no limit on a whole request: a slow link may take long for a part."""
    from datetime import timedelta

    return {
        "allow_http": bool(options.allow_http),
        "connect_timeout": timedelta(seconds=options.connect_timeout or _CONNECT_SECONDS),
        "read_timeout": timedelta(seconds=options.read_timeout or _READ_SECONDS),
        "timeout": timedelta(days=1),
        "user_agent": "universal-checkpoint",
    }


def _environment() -> bytes:
    """A digest of the variables that clients look at, so that none outlives a change of them."""
    digest = hashlib.blake2b()
    for name, value in sorted(os.environ.items()):
        if name.upper().startswith(_ENVIRONMENT):
            digest.update(f"{name}={value}\0".encode(errors="surrogateescape"))
    return digest.digest()


def _check_not_forked() -> None:
    """The client's own threads do not survive a fork: a request would wait for ever."""
    global _used_in  # noqa: PLW0603 - the process that the threads of the client belong to
    if _used_in and _used_in != os.getpid():
        raise UsageError(
            "this process was forked from one that had used object storage, whose connections it cannot use",
            hint="start processes by spawn or forkserver: multiprocessing.set_start_method('forkserver')",
        )
    _used_in = os.getpid()


def _after_fork() -> None:
    global _lock  # noqa: PLW0603 - a lock that another thread held at the fork is never released here
    _lock = threading.Lock()
    _clients.clear()


os.register_at_fork(after_in_child=_after_fork)
