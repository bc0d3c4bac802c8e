"""Metrics for monitoring: bytes, requests, failures, retries, stalls, and how long saves, loads and conversions took.

Off unless asked for, by ``UCP_METRICS`` or `start`; what is counted is counted anyway, and costs next to nothing.
"""

from __future__ import annotations

import os

from ucp.errors import UsageError
from ucp.metrics.timings import TIMINGS, Timing

VARIABLE = "UCP_METRICS"
_FORMS = "prometheus:FILE, prometheus-http:HOST:PORT or otel, several with commas"
_started: set[str] = set()
_asked = False


def start(exporters: str) -> None:
    """Hand metrics to `exporters`: ``prometheus:FILE``, ``prometheus-http:[HOST:]PORT``, ``otel``, with commas.

    In a file's name ``{pid}``, ``{host}`` and ``{rank}`` stand for those of the process (rank: the variable ``RANK``,
    or 0). Each exporter is started once per process. UsageError for anything else, or if a package is missing.
    """
    for word in filter(None, (part.strip() for part in exporters.split(","))):
        if word not in _started:
            _start(word)
            _started.add(word)


def start_as_asked() -> None:
    """`start` with what the variable ``UCP_METRICS`` says, the first time that this is called."""
    global _asked  # noqa: PLW0603 - once per process
    if not _asked:
        start(os.environ.get(VARIABLE, ""))
        _asked = True


def _start(word: str) -> None:
    kind, _, where = word.partition(":")
    if kind == "prometheus" and where:
        from ucp.metrics.prometheus import registry, write_file

        registry()
        write_file(_named(where))
    elif kind == "prometheus-http" and where:
        from ucp.metrics.prometheus import serve

        serve(where)
    elif word == "otel":
        from ucp.metrics.otel import instrument

        instrument()
    else:
        raise UsageError(f"{VARIABLE}: {word!r} is no exporter", hint=f"give {_FORMS}")


def _named(path: str) -> str:
    import socket

    words = {"pid": str(os.getpid()), "host": socket.gethostname(), "rank": os.environ.get("RANK", "0")}
    for name, word in words.items():
        path = path.replace(f"{{{name}}}", word)
    return path


__all__ = ["TIMINGS", "VARIABLE", "Timing", "start", "start_as_asked"]
