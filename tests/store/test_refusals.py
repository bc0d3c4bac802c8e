"""Servers that cannot be reached or let nobody in: a clear error in bounded time, and no secret in it."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

import ucp
from tests.servers import Endpoint, Proxy
from tests.servers.faults import Refuse
from tests.servers.server import free_port
from ucp.errors import NotFoundError, StorageError
from ucp.store import Store, open_store

KEY, SECRET = "AKIAKEYOFNOBODY00000", "c2VjcmV0IG9mIG5vYm9keQ/and+more/of+it=="
HURRIED = {"UCP_STORE_ATTEMPTS": "3", "UCP_STORE_RETRY_SECONDS": "2"}
EAGER = {"RUST_LOG": "trace", "RUST_BACKTRACE": "1", "UCP_VERBOSE": "1", "PYTHONLOGLEVEL": "DEBUG"}
SIGNATURE = re.compile(r"(?:Signature=|SharedKey \w+:)([\w/+=]{16,})")


def s3(address: str) -> Endpoint:
    return Endpoint("s3", address, KEY, SECRET)


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ucp", *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


class TestNobodyAnswers:
    @pytest.mark.parametrize("address", ["http://127.0.0.1:{}", "http://no-such-host.invalid:{}"])
    def test_the_command_ends_with_7(self, address):
        environment = s3(address.format(free_port())).environment()
        done = run("info", "s3://some-bucket/run/step-1", **environment, **HURRIED)
        assert done.returncode == 7, done.stderr
        assert "s3://some-bucket/run/step-1" in done.stderr
        assert "hint: check the address and the network" in done.stderr
        assert SECRET not in done.stdout + done.stderr

    def test_every_way_of_asking_is_bounded(self, monkeypatch, tmp_path):
        for name, value in (s3(f"http://127.0.0.1:{free_port()}").environment() | HURRIED).items():
            monkeypatch.setenv(name, value)
        store = open_store("s3://some-bucket/run")
        for ask in WAYS.values():
            before = time.monotonic()
            with pytest.raises(StorageError, match="s3://some-bucket/run") as caught:
                ask(store)
            assert time.monotonic() - before < 10
            assert caught.value.exit_code == 7

    @pytest.mark.slow
    def test_with_no_settings_at_all(self, monkeypatch):
        """Retries go on for minutes, as a service may be away that long, but not for ever."""
        for name, value in s3(f"http://127.0.0.1:{free_port()}").environment().items():
            monkeypatch.setenv(name, value)
        before = time.monotonic()
        with pytest.raises(StorageError, match="tried"):
            open_store("s3://some-bucket/run").read("a")
        assert 5 < time.monotonic() - before < 240


def create(store: Store) -> None:
    with store.create("a", 20 << 20) as writer:
        writer.write_at(0, bytes(20 << 20))


WAYS = {
    "entry": lambda store: store.entry("a"),
    "list": lambda store: list(store.entries()),
    "level": lambda store: store.children(),
    "read": lambda store: store.read_into("a", 0, bytearray(10)),
    "put": lambda store: store.put("a", b"1"),
    "put if absent": lambda store: store.put("a", b"1", if_absent=True),
    "put if match": lambda store: store.put("a", b"1", if_match="0123456789abcdef0123456789abcdef"),
    "create": create,
    "delete": lambda store: store.delete("a"),
}


def all_of(error: BaseException) -> str:
    """Everything that can be printed of an exception and those it is chained to."""
    told = "".join(traceback.format_exception(error))
    chain, seen = error, []
    while chain is not None:
        seen += [str(chain), repr(chain), repr(vars(chain)), repr(chain.args)]
        chain = chain.__cause__ or chain.__context__
    return told + "\n".join(seen)


def assert_nothing_leaked(text: str, endpoint: Endpoint, proxy: Proxy) -> None:
    signatures = [found[1] for seen in proxy.settled() if (found := SIGNATURE.search(seen.authorization))]
    assert signatures, "the requests were signed"
    for secret in (endpoint.secret, *signatures, "Signature=", "SharedKey", "Credential="):
        assert secret not in text, secret
    if endpoint.protocol == "s3":
        assert endpoint.key not in text


@pytest.fixture(
    params=["refusing", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ceph", "swift", "azurite"))]
)
def closed(request, served, monkeypatch):
    """An endpoint with wrong credentials behind a proxy, and that proxy: one that refuses itself, or a real server."""
    name = request.param
    endpoint = served("moto" if name == "refusing" else name)
    with Proxy(endpoint.port) as proxy:
        wrong = endpoint.through(proxy.port)
        if endpoint.protocol == "s3":
            wrong = dataclasses.replace(wrong, key=endpoint.key if name == "ceph" else KEY, secret=SECRET)
        else:
            wrong = dataclasses.replace(wrong, secret="d3JvbmcgYW5kIHdyb25nIGFuZCB3cm9uZyBhbmQgd3Jvbmch")
        if name == "refusing":
            proxy.add(Refuse(403, "SignatureDoesNotMatch"), count=None)
        for variable, value in wrong.environment().items():
            monkeypatch.setenv(variable, value)
        yield wrong, proxy


class TestWrongCredentials:
    @pytest.mark.parametrize("way", WAYS)
    def test_no_exception_or_log_shows_them(self, closed, caplog, capfd, way):
        endpoint, proxy = closed
        with caplog.at_level(logging.DEBUG), pytest.raises(StorageError) as caught:
            WAYS[way](open_store(endpoint.url("closed/folder")))
        # Swift looks at what it does not know before it looks at who asks.
        if "501 NotImplemented" not in str(caught.value):
            assert "access denied" in str(caught.value)
            assert "credentials" in (caught.value.hint or "")
        out = capfd.readouterr()
        assert_nothing_leaked(all_of(caught.value) + caplog.text + out.out + out.err, endpoint, proxy)

    @pytest.mark.parametrize(
        "command", [("convert",), *(pytest.param(words, marks=pytest.mark.slow) for words in (("info",), ("verify",)))]
    )
    def test_no_command_prints_them(self, closed, tmp_path, command):
        endpoint, proxy = closed
        words = [*command, endpoint.url("closed/folder"), *([str(tmp_path / "to")] if "convert" in command else [])]
        done = run(*words, **EAGER)
        assert done.returncode == 7, done.stderr
        assert "access denied" in done.stderr
        assert_nothing_leaked(done.stdout + done.stderr, endpoint, proxy)
        assert not [path for path in Path(tmp_path).rglob("*") if path.is_file()]

    def test_no_store_or_its_record_holds_them(self, closed):
        import pickle

        endpoint, _ = closed
        store = open_store(endpoint.url("closed/folder"))
        for text in (repr(store), str(vars(store)), store.url, repr(pickle.dumps(store)), repr(store.child("a"))):
            assert endpoint.secret not in text
            assert SECRET not in text


def test_a_bucket_that_is_not_there(served, monkeypatch):
    for name, value in served("moto").environment().items():
        monkeypatch.setenv(name, value)
    store = open_store("s3://there-is-no-such-bucket/a")
    with pytest.raises(NotFoundError, match="no such bucket"):
        store.put("a", b"1")
    with pytest.raises(NotFoundError, match="there-is-no-such-bucket"):
        ucp.open(store.url)


@pytest.mark.slow
def test_an_emulator_of_googles_other_interface(served, monkeypatch):
    """It speaks JSON alone; each request is refused at once, and nothing is taken for an answer."""
    endpoint = served("gcs")
    for name, value in endpoint.environment().items():
        monkeypatch.setenv(name, value)
    store = open_store(endpoint.url("a/folder"))
    for ask in WAYS.values():
        before = time.monotonic()
        with pytest.raises(StorageError, match="gs://ucp-test/a/folder"):
            ask(store)
        assert time.monotonic() - before < 10
