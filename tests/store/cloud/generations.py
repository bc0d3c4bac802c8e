"""Google's XML interface in front of a server of S3: the two differ in how they spell conditions and versions.

Source: cloud.google.com, "XML API: headers" (``x-goog-if-generation-match``, ``x-goog-generation``). No server
that can be started here speaks it; what a client sends to Google is what this translates.
"""

from __future__ import annotations

import http.client
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote

from tests.servers.endpoint import Endpoint

_LOCK = threading.Lock()
_DROPPED = ("connection", "keep-alive", "transfer-encoding", "host", "authorization")


def generation(tag: str) -> int:
    """A number that tells an ETag from others."""
    return int(tag.strip('"').partition("-")[0][:12], 16) + 1


class Translator(http.server.BaseHTTPRequestHandler):
    """One request to Google as a request to S3."""

    protocol_version = "HTTP/1.1"
    upstream = 0
    key = ""

    def do(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _DROPPED}
        wanted = headers.pop("x-goog-if-generation-match", None)
        if wanted == "0":
            headers["If-None-Match"] = "*"
        with _LOCK:  # the mock looks whether a condition holds before it writes, not at once
            if wanted not in (None, "0") and wanted != self._now(headers):
                self._answer(412, {}, b"<Error><Code>PreconditionFailed</Code></Error>")
                return
            self._answer(*self._ask(self.command, body, headers))

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = do  # noqa: N815 - names of the base class

    def _now(self, headers: dict[str, str]) -> str:
        return self._ask("HEAD", b"", {})[1].get("x-goog-generation", "")

    def _ask(self, method: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=60)
        try:
            # The client encodes hyphens of the bucket, which the mock takes as they are.
            _, bucket, key = self.path.split("/", 2) if self.path.count("/") > 1 else (*self.path.split("/"), "")
            name, sign, query = bucket.partition("?")
            target = f"/{unquote(name)}{sign}{query}" + (f"/{key}" if key else "")
            # The mock takes any signature, and keeps what each account has apart.
            scope = f"{self.key}/20260101/us-east-1/s3/aws4_request"
            signed = f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host, Signature=0"
            connection.request(method, target, body, {**headers, "Authorization": signed})
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        found = {name: value for name, value in answer.getheaders() if name.lower() not in _DROPPED}
        if tag := answer.getheader("ETag"):
            found["x-goog-generation"] = str(generation(tag))
        return answer.status, found, data

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        length = headers.pop("Content-Length", None) if self.command == "HEAD" else None
        for name, value in headers.items():
            if name.lower() not in ("content-length", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def translated(endpoint: Endpoint) -> Iterator[int]:
    """The port of a translator in front of the mock of S3 at `endpoint`."""
    handler = type("Handler", (Translator,), {"upstream": endpoint.port, "key": endpoint.key})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
