"""A proxy in front of one HTTP server that injects faults by rule and counts what it did.

>>> with Proxy(upstream_port, rules=[Rule(LostAnswer(), method="PUT")], seed=7) as proxy:
...     use(proxy.port)
>>> proxy.injected
Counter({'answer lost': 1})
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Self, TypeVar
from xml.sax.saxutils import escape

from tests.servers import faults
from tests.servers.faults import Fault, Rule
from tests.servers.wire import Channel, Closed, Message

F = TypeVar("F", bound=Fault)

_HOST = "127.0.0.1"
_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request as the proxy saw it. `status` is what the client got, 0 if it got none; `sent`, bytes of body."""

    method: str
    target: str
    range: str
    received: int
    status: int
    sent: int
    faults: tuple[str, ...]
    authorization: str


class Drop(Exception):
    """The exchange ends with a reset of the client's connection."""


class Proxy:
    """Listens on a port of loopback while used as a context manager. Rules may be changed at any time."""

    def __init__(self, upstream: int, *, rules: Iterable[Rule] = (), seed: int = 0, port: int = 0) -> None:
        self.upstream = upstream
        self.rules = list(rules)
        self.injected: Counter[str] = Counter()
        self.exchanges: list[Exchange] = []
        self.port = port
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._open: set[Channel] = set()
        self._busy = 0
        self._idle = threading.Condition(self._lock)
        self._first: dict[str, tuple[Message, bytes]] = {}
        self._listener: socket.socket | None = None

    def __enter__(self) -> Self:
        self.resume()
        return self

    def __exit__(self, *_: object) -> None:
        self.pause()

    def resume(self) -> None:
        """Listen, on the same port as before if there was one."""
        listener = socket.create_server((_HOST, self.port), backlog=128)
        self.port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def pause(self) -> None:
        """As if the server died: all connections are reset, new ones are refused."""
        listener, self._listener = self._listener, None
        if listener is not None:
            # Shutdown wakes the thread in accept; close alone leaves it, and the port, as they are.
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        with self._lock:
            channels = list(self._open)
        for channel in channels:
            with contextlib.suppress(OSError):
                channel.socket.shutdown(socket.SHUT_RDWR)

    def add(self, fault: Fault, **when: object) -> Rule:
        """Add a rule; see `Rule`."""
        rule = Rule(fault, **when)  # type: ignore[arg-type]
        with self._lock:
            self.rules.append(rule)
        return rule

    def clear(self) -> None:
        """Remove all rules and forget exchanges and counts."""
        with self._lock:
            self.rules.clear()
            self.injected.clear()
            self.exchanges.clear()
            self._first.clear()

    def settled(self, seconds: float = 60) -> list[Exchange]:
        """The exchanges, once none is under way; a client may have its answer just before the proxy has noted it."""
        with self._idle:
            self._idle.wait_for(lambda: not self._busy, seconds)
            return list(self.exchanges)

    def _accept(self, listener: socket.socket) -> None:
        while self._listener is listener:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(Channel(connection),), daemon=True).start()

    def _serve(self, client: Channel) -> None:
        """All exchanges of one connection of a client, over one connection to the server."""
        server: Channel | None = None
        with self._lock:
            self._open.add(client)
        try:
            client.socket.settimeout(_SECONDS)
            while self._listener is not None:
                request = client.head()
                server = server or self._connect()
                if not self._exchange(client, server, request):
                    return
        except Drop:
            client.reset()
        except (Closed, OSError, ValueError):
            pass
        finally:
            with self._lock:
                self._open.discard(client)
            client.close()
            if server is not None:
                server.close()

    def _connect(self) -> Channel:
        connection = socket.create_connection((_HOST, self.upstream), timeout=_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Channel(connection)

    def _exchange(self, client: Channel, server: Channel, request: Message) -> bool:
        """One request and its answer; False if the connection cannot be used for another."""
        method, target, _ = request.start.split(" ", 2)
        length = request.length
        names: list[str] = []

        def count(fault: Fault) -> None:
            names.append(fault.kind)
            with self._lock:
                self.injected[fault.kind] += 1

        with self._lock:
            self._busy += 1
        active = self._strike(method, target, length)
        answer = _Exchange(client, server, request, active, count, self._random, self._first)
        try:
            return answer.run(method, target)
        finally:
            ranges, signed = request.get("Range"), request.get("Authorization")
            seen = Exchange(method, target, ranges, length, answer.status, answer.sent, tuple(names), signed)
            with self._idle:
                self.exchanges.append(seen)
                self._busy -= 1
                self._idle.notify_all()

    def _strike(self, method: str, target: str, body: int) -> list[Fault]:
        with self._lock:
            found = []
            for rule in self.rules:
                if rule.matches(method, target, body) and self._random.random() < rule.probability:
                    rule.struck += 1
                    found.append(rule.fault)
            return found


class _Exchange:
    """One request on its way to the server and the answer on its way back, with the faults that struck it."""

    def __init__(
        self,
        client: Channel,
        server: Channel,
        request: Message,
        active: list[Fault],
        count: Callable[[Fault], None],
        dice: random.Random,
        first: dict[str, tuple[Message, bytes]],
    ) -> None:
        self.client = client
        self.server = server
        self.request = request
        self.active = {type(fault): fault for fault in active}
        self.count = count
        self.dice = dice
        self.first = first
        self.status = 0
        self.sent = 0

    def run(self, method: str, target: str) -> bool:
        if delay := self._fault(faults.Delay):
            self.count(delay)
            time.sleep(delay.seconds)
        if hold := self._fault(faults.Hold):
            self.count(hold)
            hold.until.wait(_SECONDS)
        if early := self._fault(faults.ResetBefore):
            self.count(early)
            raise Drop
        if self.request.get("Expect").lower() == "100-continue":
            self.client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.request.set("Expect", None)
        if refuse := self._fault(faults.Refuse):
            return self._refuse(refuse, method)
        self._forward()
        answer = self._answer_head()
        if lost := self._fault(faults.LostAnswer):
            self.count(lost)
            for _ in self._answer_body(answer, method):
                pass
            raise Drop
        return self._give(answer, method, target)

    def _fault(self, kind: type[F]) -> F | None:
        return self.active.get(kind)  # type: ignore[return-value]

    def _refuse(self, fault: faults.Refuse, method: str) -> bool:
        for _ in self._request_body():
            pass
        quoted = f"<StringToSign>{escape(self.request.encode().decode())}</StringToSign>"
        body = (
            f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>injected</Message>{quoted}</Error>".encode()
        )
        answer = Message(f"HTTP/1.1 {fault.status} Injected", [("Content-Type", "application/xml")])
        if fault.retry_after is not None:
            answer.set("Retry-After", str(fault.retry_after))
        answer.set("Content-Length", str(len(body)))
        self.status = fault.status
        self.count(fault)
        self.client.send(answer.encode() + (b"" if method == "HEAD" else body))
        return True

    def _request_body(self) -> Iterator[bytes]:
        return self.client.chunks() if self.request.chunked else self.client.body(self.request.length)

    def _forward(self) -> None:
        if (without := self._fault(faults.Without)) and self.request.get(without.name):
            self.count(without)
            self.request.set(without.name, None)
        if self.request.chunked or self._fault(faults.FlipInRequest) or self._fault(faults.ResetDuringRequest):
            body = b"".join(self._request_body())
            self.request.set("Transfer-Encoding", None)
            self.request.set("Content-Length", str(len(body)))
            if (flip := self._fault(faults.FlipInRequest)) and body:
                body = self._flipped(flip, body)
            self.server.send(self.request.encode())
            if fault := self._fault(faults.ResetDuringRequest):
                self.count(fault)
                self.server.send(body[: int(len(body) * fault.share)])
                self.server.reset()
                raise Drop
            self.server.send(body)
            return
        self.server.send(self.request.encode())
        for piece in self._request_body():
            self.server.send(piece)

    def _answer_head(self) -> Message:
        try:
            while (answer := self.server.head()).start.split(" ")[1] == "100":
                pass
        except (Closed, OSError):
            raise Drop from None
        return answer

    def _answer_body(self, answer: Message, method: str) -> Iterator[bytes]:
        if method == "HEAD" or answer.start.split(" ")[1] in ("204", "304"):
            return iter(())
        if answer.chunked:
            return self.server.chunks()
        return self.server.body(answer.length) if answer.get("Content-Length") else self.server.rest()

    def _give(self, answer: Message, method: str, target: str) -> bool:
        """Pass the answer on, as it comes if nothing happens to its body."""
        self.status = int(answer.start.split(" ")[1])
        if header := self._fault(faults.Header):
            self.count(header)
            answer.set(header.name, header.value)
        empty = method == "HEAD" or self.status in (204, 304)
        if empty or not self._touches_body():
            return self._pass(answer, method, empty=empty)
        body = b"".join(self._answer_body(answer, method))
        if stale := self._fault(faults.Stale):
            answer, body = self._first(stale, target, answer, body)
        if (flip := self._fault(faults.FlipInAnswer)) and body:
            body = self._flipped(flip, body)
        return self._maim(answer, body)

    def _touches_body(self) -> bool:
        return any(
            self._fault(kind)
            for kind in (faults.Stale, faults.FlipInAnswer, faults.Truncate, faults.ResetDuringAnswer, faults.Trickle)
        )

    def _pass(self, answer: Message, method: str, *, empty: bool) -> bool:
        if answer.chunked and not empty:
            body = b"".join(self._answer_body(answer, method))
            answer.set("Transfer-Encoding", None)
            answer.set("Content-Length", str(len(body)))
            self.client.send(answer.encode() + body)
            self.sent = len(body)
            return True
        self.client.send(answer.encode())
        try:
            for piece in self._answer_body(answer, method):
                self.client.send(piece)
                self.sent += len(piece)
        except Closed:
            raise Drop from None
        framed = empty or bool(answer.get("Content-Length"))
        return framed and "close" not in answer.get("Connection").lower()

    def _maim(self, answer: Message, body: bytes) -> bool:
        truncate, reset = self._fault(faults.Truncate), self._fault(faults.ResetDuringAnswer)
        claimed = len(body)
        if cut := truncate or reset:
            if body:
                self.count(cut)
            body = body[: int(claimed * cut.share)]
        if truncate and not truncate.honest:
            claimed = len(body)
        answer.set("Transfer-Encoding", None)
        answer.set("Content-Length", str(claimed))
        self.client.send(answer.encode())
        self._send_slowly(body)
        if reset:
            # What was sent must arrive before the reset, which would discard it.
            time.sleep(0.05)
            raise Drop
        return claimed == len(body)

    def _send_slowly(self, body: bytes) -> None:
        slow = self._fault(faults.Trickle)
        if slow and body:
            self.count(slow)
        step = slow.piece if slow else max(1, len(body))
        for start in range(0, len(body), step):
            self.client.send(body[start : start + step])
            self.sent += len(body[start : start + step])
            if slow:
                time.sleep(slow.seconds)

    def _first(self, stale: Fault, target: str, answer: Message, body: bytes) -> tuple[Message, bytes]:
        first = self.first.setdefault(target, (answer, body))
        if first[1] != body:
            self.count(stale)
        return Message(first[0].start, list(first[0].headers)), first[1]

    def _flipped(self, fault: Fault, body: bytes) -> bytes:
        self.count(fault)
        changed = bytearray(body)
        changed[self.dice.randrange(len(body))] ^= 1 << self.dice.randrange(8)
        return bytes(changed)
