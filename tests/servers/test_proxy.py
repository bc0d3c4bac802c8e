"""The proxy does to exchanges what its rules say, and counts it; a plain server is behind it."""

from __future__ import annotations

import hashlib
import http.client
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.servers.faults import (
    Delay,
    FlipInAnswer,
    FlipInRequest,
    Header,
    LostAnswer,
    Refuse,
    ResetBefore,
    ResetDuringAnswer,
    ResetDuringRequest,
    Stale,
    Trickle,
    Truncate,
    Without,
)
from tests.servers.proxy import Proxy

DATA = bytes(range(256)) * 4000


class Handler(BaseHTTPRequestHandler):
    """Keeps what is put, and how often."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]
    puts: list[str]
    said: list[str | None]

    def do_GET(self):
        self.said.append(self.headers["X-Say"])
        data = self.objects.get(self.path)
        self.answer(200 if data is not None else 404, data or b"")

    def do_HEAD(self):
        self.answer(200, self.objects[self.path])

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if len(data) == int(self.headers["Content-Length"]):
            self.objects[self.path] = data
            self.puts.append(self.path)
            self.answer(200, b"")

    def answer(self, status, data):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """Resets are expected."""


@pytest.fixture
def server() -> Iterator[Quiet]:
    handler = type("Mine", (Handler,), {"objects": {"/a": DATA}, "puts": [], "said": []})
    with Quiet(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def proxy(server):
    with Proxy(server.server_port, seed=1) as proxy:
        yield proxy


def ask(proxy, method="GET", path="/a", body=None):
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=20)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers
    finally:
        connection.close()


def test_without_rules_it_only_passes_on(proxy, server):
    assert ask(proxy)[:2] == (200, DATA)
    assert ask(proxy, "PUT", "/b", DATA)[0] == 200
    assert server.RequestHandlerClass.objects["/b"] == DATA
    assert ask(proxy, "HEAD")[1] == b""
    assert [(seen.method, seen.status, seen.sent, seen.received) for seen in proxy.settled()] == [
        ("GET", 200, len(DATA), 0),
        ("PUT", 200, 0, len(DATA)),
        ("HEAD", 200, 0, 0),
    ]
    assert not proxy.injected


def test_connections_are_kept(proxy):
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=20)
    for _ in range(3):
        connection.request("GET", "/a")
        assert connection.getresponse().read() == DATA
        port = connection.sock.getsockname()[1]
    assert connection.sock.getsockname()[1] == port
    connection.close()


def test_a_reset_before_the_request(proxy, server):
    proxy.add(ResetBefore(), method="PUT")
    with pytest.raises(ConnectionError):
        ask(proxy, "PUT", "/b", b"x")
    assert not server.RequestHandlerClass.puts
    assert ask(proxy, "PUT", "/b", b"x")[0] == 200
    assert proxy.injected == {ResetBefore.kind: 1}


def test_a_lost_answer(proxy, server):
    proxy.add(LostAnswer(), method="PUT")
    with pytest.raises(ConnectionError):
        ask(proxy, "PUT", "/b", DATA)
    assert server.RequestHandlerClass.objects["/b"] == DATA
    assert proxy.injected == {LostAnswer.kind: 1}


def test_a_reset_in_the_body_of_a_request(proxy, server):
    proxy.add(ResetDuringRequest(), method="PUT")
    with pytest.raises(ConnectionError):
        ask(proxy, "PUT", "/b", DATA)
    assert not server.RequestHandlerClass.puts
    assert proxy.injected == {ResetDuringRequest.kind: 1}


def test_a_reset_in_the_body_of_an_answer(proxy):
    proxy.add(ResetDuringAnswer())
    with pytest.raises((ConnectionError, http.client.IncompleteRead)):
        ask(proxy)
    assert ask(proxy)[1] == DATA
    assert proxy.injected == {ResetDuringAnswer.kind: 1}


def test_a_body_shorter_than_its_length(proxy):
    proxy.add(Truncate(share=0.25))
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(proxy)
    assert caught.value.partial == DATA[: len(DATA) // 4]


def test_a_body_that_lies_about_its_length(proxy):
    proxy.add(Truncate(share=0.25, honest=False))
    assert ask(proxy)[1] == DATA[: len(DATA) // 4]
    assert proxy.injected == {Truncate.kind: 1}


def test_an_error_status(proxy, server):
    proxy.add(Refuse(429, "TooManyRequests", retry_after=3), method="PUT", count=2)
    for _ in range(2):
        status, body, headers = ask(proxy, "PUT", "/b", DATA)
        assert (status, headers["Retry-After"]) == (429, "3")
        assert b"TooManyRequests" in body
    assert not server.RequestHandlerClass.puts
    assert ask(proxy, "PUT", "/b", DATA)[0] == 200
    assert proxy.injected == {Refuse.kind: 2}


def test_slow_answers(proxy):
    proxy.add(Delay(0.2))
    proxy.add(Trickle(piece=len(DATA) // 4, seconds=0.05))
    before = time.monotonic()
    assert ask(proxy)[1] == DATA
    assert time.monotonic() - before >= 0.34
    assert proxy.injected == {Delay.kind: 1, Trickle.kind: 1}


def bits(a, b):
    return (int.from_bytes(a) ^ int.from_bytes(b)).bit_count()


def test_flipped_bits(proxy, server):
    proxy.add(FlipInAnswer(), method="GET")
    assert bits(ask(proxy)[1], DATA) == 1
    proxy.add(FlipInRequest(), method="PUT")
    ask(proxy, "PUT", "/b", DATA)
    assert bits(server.RequestHandlerClass.objects["/b"], DATA) == 1
    assert proxy.injected == {FlipInAnswer.kind: 1, FlipInRequest.kind: 1}


def test_headers(proxy):
    proxy.add(Header("ETag", '"other"'))
    assert ask(proxy)[2]["ETag"] == '"other"'
    proxy.add(Header("ETag", None))
    assert "ETag" not in ask(proxy)[2]


def test_a_lost_header_of_a_request(proxy, server):
    proxy.add(Without("X-Say"), count=2)
    for headers in ({"X-Say": "a"}, {}):
        connection = http.client.HTTPConnection("127.0.0.1", proxy.port)
        connection.request("GET", "/a", headers=headers)
        assert connection.getresponse().read() == DATA
        connection.close()
    assert server.RequestHandlerClass.said == [None, None]
    assert proxy.injected == {Without.kind: 1}


def test_stale_answers(proxy):
    proxy.add(Stale(), method="GET", target="^/a", count=None)
    assert ask(proxy)[1] == DATA
    ask(proxy, "PUT", "/a", b"new")
    assert ask(proxy)[1] == DATA
    assert proxy.injected == {Stale.kind: 1}
    proxy.clear()
    assert ask(proxy)[1] == b"new"


def test_which_requests_a_rule_strikes(proxy):
    proxy.add(Refuse(500), method="PUT", target="^/b", skip=1, count=1, body=10)
    asked = [
        ("PUT", "/a", DATA),
        ("PUT", "/b", b"small"),
        ("PUT", "/b", DATA),
        ("PUT", "/b", DATA),
        ("PUT", "/b", DATA),
    ]
    assert [ask(proxy, *words)[0] for words in asked] == [200, 200, 200, 500, 200]


def test_chance_is_the_same_for_the_same_seed(server):
    def run(seed):
        with Proxy(server.server_port, seed=seed) as proxy:
            proxy.add(Refuse(500), count=None, probability=0.5)
            return [ask(proxy)[0] for _ in range(20)]

    assert run(3) == run(3)
    assert set(run(3)) == {200, 500}


def test_nothing_is_counted_that_changed_nothing(proxy, server):
    server.RequestHandlerClass.objects["/empty"] = b""
    proxy.add(FlipInAnswer(), count=None)
    proxy.add(Truncate(), count=None)
    assert ask(proxy, "HEAD")[0] == ask(proxy, "GET", "/empty")[0] == 200
    assert not proxy.injected


def test_a_pause_refuses_and_ends_on_the_same_port(proxy):
    port = proxy.port
    proxy.pause()
    with pytest.raises(ConnectionRefusedError):
        ask(proxy)
    proxy.resume()
    assert proxy.port == port
    assert ask(proxy)[1] == DATA
