"""Just enough HTTP/1.1: heads and framed bodies over blocking sockets."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_PIECE = 256 << 10
_MOST_HEAD = 64 << 10


class Closed(Exception):
    """The other side closed the connection between two messages."""


@dataclass(slots=True)
class Message:
    """Start line and headers, in order, as they came."""

    start: str
    headers: list[tuple[str, str]]

    def get(self, name: str) -> str:
        """A header's value, "" if it is not there."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), "")

    def set(self, name: str, value: str | None) -> None:
        """Give a header another value; None removes it."""
        self.headers = [(key, old) for key, old in self.headers if key.lower() != name.lower()]
        if value is not None:
            self.headers.append((name, value))

    def encode(self) -> bytes:
        lines = [self.start, *(f"{name}: {value}" for name, value in self.headers)]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    @property
    def chunked(self) -> bool:
        return "chunked" in self.get("Transfer-Encoding").lower()

    @property
    def length(self) -> int:
        return int(self.get("Content-Length") or 0)


class Channel:
    """A socket with a buffer for what was read ahead."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.ahead = b""

    def head(self) -> Message:
        """The next message's head; Closed if there is none."""
        while (end := self.ahead.find(b"\r\n\r\n")) < 0:
            piece = self.socket.recv(_PIECE)
            if not piece or len(self.ahead) > _MOST_HEAD:
                raise Closed
            self.ahead += piece
        text, self.ahead = self.ahead[:end].decode("latin-1"), self.ahead[end + 4 :]
        start, *lines = text.split("\r\n")
        pairs = (line.partition(":") for line in lines)
        return Message(start, [(name, value.strip()) for name, _, value in pairs])

    def body(self, length: int) -> Iterator[bytes]:
        """`length` bytes, in pieces; Closed if they do not come."""
        while length:
            piece = self.ahead[:length] or self.socket.recv(min(length, _PIECE))
            if not piece:
                raise Closed
            self.ahead = self.ahead[len(piece) :] if self.ahead else b""
            length -= len(piece)
            yield piece

    def chunks(self) -> Iterator[bytes]:
        """The data of a chunked body, without its framing."""
        while size := int(self._line().partition(b";")[0], 16):
            yield from self.body(size)
            self._line()
        while self._line():
            pass

    def rest(self) -> Iterator[bytes]:
        """All until the other side closes."""
        if self.ahead:
            yield self.ahead
            self.ahead = b""
        while piece := self.socket.recv(_PIECE):
            yield piece

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def close(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        """End the connection with RST, not FIN: with no time to linger, close sends a reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _line(self) -> bytes:
        while (end := self.ahead.find(b"\r\n")) < 0:
            piece = self.socket.recv(_PIECE)
            if not piece:
                raise Closed
            self.ahead += piece
        line, self.ahead = self.ahead[:end], self.ahead[end + 2 :]
        return line
