"""What goes wrong is told in words of ours: no signature, no key, no URL with a query."""

from __future__ import annotations

import pickle
import traceback

import pytest

from tests.servers.faults import Refuse
from tests.servers.proxy import Proxy
from tests.store.cloud.waiting import seen
from ucp.errors import NotFoundError, StorageError, UcpError
from ucp.store import open_store
from ucp.store.cloud.failure import Failure, Kind, RequestError, classify
from ucp.store.cloud.retry import Policy
from ucp.store.traffic import TRAFFIC


@pytest.fixture
def behind(s3):
    """A store, and the proxy that its requests go through."""
    with Proxy(s3.port) as proxy:
        yield open_store(s3.url("failures"), endpoint=s3.through(proxy.port).address, attempts=3), proxy


def everything(error: BaseException) -> str:
    """All that a traceback, a record or another process would show of an error."""
    return (
        "".join(traceback.format_exception(error)) + repr(error) + repr(pickle.dumps(error)) + repr(error.__context__)
    )


@pytest.mark.parametrize(("status", "code"), [(403, "SignatureDoesNotMatch"), (401, "InvalidAccessKeyId")])
def test_refusals_are_not_tried_again_and_show_no_secrets(behind, s3, status, code):
    store, proxy = behind
    proxy.add(Refuse(status=status, code=code), count=None)
    for ask in (
        lambda: store.read("a"),
        lambda: store.put("a", b"1"),
        lambda: list(store.entries()),
        lambda: store.delete("a"),
        lambda: store.entry("a"),
    ):
        with pytest.raises(StorageError, match=f"{store.url}.*access denied") as caught:
            ask()
        assert "credentials" in caught.value.hint
        text = everything(caught.value)
        for secret in (s3.key, s3.secret, "Signature=", "AWS4-HMAC", "StringToSign"):
            assert secret not in text
    assert len(seen(proxy, 5)) == 5


def test_throttling_is_waited_for_and_counted(behind):
    store, proxy = behind
    store.put("a", b"1")
    proxy.add(Refuse(status=503, code="SlowDown"), count=2)
    before = TRAFFIC.snapshot()
    assert store.read("a") == b"1"
    counted = TRAFFIC.snapshot().since(before)
    assert counted.retries["s3", "throttled"].count == 2
    assert counted.requests["s3", "get"].count == 1


def test_what_does_not_end_is_given_up(behind):
    store, proxy = behind
    proxy.add(Refuse(status=503, code="SlowDown"), count=None)
    with pytest.raises(StorageError, match=r"throttled \(503 SlowDown\); tried 3 times") as caught:
        store.put("a", b"1")
    assert "resumes" in caught.value.hint
    assert len(seen(proxy, 3)) == 3


def test_a_bucket_that_is_not_there(s3):
    store = open_store("s3://no-such-bucket/a")
    with pytest.raises(NotFoundError, match="no such bucket"):
        store.put("b", b"1")
    with pytest.raises(UcpError, match="no-such-bucket"):
        list(store.entries())


def test_a_server_that_is_not_there():
    store = open_store("s3://bucket/a", endpoint="http://127.0.0.1:1", anonymous=True, attempts=2)
    with pytest.raises(StorageError, match="connection failed; tried 2 times"):
        store.read("b")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Server returned non-2xx status code: 400 Bad Request: <Code>RequestTimeout</Code>", Kind.TIMEOUT),
        ("status code: 409 Conflict: <Code>ConditionalRequestConflict</Code>", Kind.SERVER),
        ("status code: 501 Not Implemented: <Code>NotImplemented</Code>", Kind.REFUSED),
        ("status code: 500 Internal", Kind.SERVER),
        ("HTTP error: error sending request\n\nDebug source:\n inner: TimedOut", Kind.TIMEOUT),
        ("Error performing PUT http://169.254.169.254/latest/api/token - status code: 403", Kind.CREDENTIALS),
        ("Generic S3 error: Requested 0..10, got 0..5", Kind.TRUNCATED),
        ("Generic S3 error: something new", Kind.REFUSED),
    ],
)
def test_texts_of_the_client_are_understood(text, kind):
    assert classify(RuntimeError(text)).kind is kind


def test_texts_that_are_not_understood_lose_their_urls():
    found = classify(RuntimeError("Generic S3 error: odd https://host/a?X-Amz-Signature=secret thing\n\nDebug: secret"))
    assert "secret" not in found.text


def test_waits_grow_with_jitter_and_are_bounded():
    policy = Policy(attempts=5, seconds=10, base=0.1, longest=2.0)
    for failed in range(1, 30):
        assert all(0 <= policy.wait(failed) <= min(2.0, 0.1 * 2**failed) for _ in range(20))
    throttled = Failure(Kind.THROTTLED)
    assert policy.allows(throttled, 4, 9)
    assert not policy.allows(throttled, 5, 9)
    assert not policy.allows(throttled, 1, 10)
    assert not policy.allows(Failure(Kind.DENIED), 1, 0)
    assert not policy.allows(Failure(Kind.CREDENTIALS), 3, 0)


def test_an_error_tells_how_often_it_was_tried():
    error = RequestError(Failure(Kind.SERVER, 500, "InternalError"), 4, 7.4).public("s3://b/x")
    assert str(error) == "s3://b/x: server error (500 InternalError); tried 4 times in 7 s"
