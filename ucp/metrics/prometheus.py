"""Prometheus: counters in a text file for the node exporter's textfile collector, or over HTTP.

Names follow https://prometheus.io/docs/practices/naming/: base units in the name, ``_total`` for what only grows.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ucp.errors import UsageError
from ucp.metrics.timings import BUCKETS, NAMES, TIMINGS, Timing
from ucp.store.traffic import TRAFFIC, Traffic

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

EVERY_SECONDS = 15.0
"""How often the text file is written."""


class Collector:
    """What ucp has counted, as `prometheus_client` asks for it; `registry.register(Collector())` adds it to yours."""

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that nothing is counted when it is registered."""
        return []

    def collect(self) -> Iterable[Metric]:
        """All metrics as they are now."""
        yield from _traffic(TRAFFIC.snapshot())
        yield from _timings(TIMINGS.snapshot())


def _traffic(traffic: Traffic) -> Iterable[Metric]:
    from prometheus_client.core import CounterMetricFamily

    by_request, by_reason = ["scheme", "operation"], ["scheme", "reason"]
    counters = (
        ("ucp_store_read_bytes", "Bytes read from storage.", "read"),
        ("ucp_store_written_bytes", "Bytes written to storage.", "written"),
        ("ucp_store_requests", "Requests that storage answered.", "count"),
        ("ucp_store_failures", "Requests that failed for good.", "failed"),
    )
    for name, text, attribute in counters:
        family = CounterMetricFamily(name, text, labels=by_request)
        for key, row in sorted(traffic.requests.items()):
            family.add_metric(key, getattr(row, attribute))
        yield family
    retries = CounterMetricFamily("ucp_store_retries", "Requests that were tried again.", labels=by_reason)
    stalls = CounterMetricFamily("ucp_store_stall_seconds", "Time waited before trying again.", labels=by_reason)
    for key, again in sorted(traffic.retries.items()):
        retries.add_metric(key, again.count)
        stalls.add_metric(key, again.waited)
    yield retries
    yield stalls


def _timings(timings: Mapping[str, Timing]) -> Iterable[Metric]:
    from prometheus_client.core import HistogramMetricFamily

    for name, timing in sorted(timings.items()):
        text = NAMES[name]
        family = HistogramMetricFamily(f"ucp_{name}_seconds", f"{text[0].upper()}{text[1:]}.")
        below, rows = 0, []
        for bound, count in zip([*map(str, BUCKETS), "+Inf"], timing.buckets, strict=True):
            below += count
            rows.append((bound, below))
        family.add_metric([], rows, timing.seconds)
        yield family


def registry() -> CollectorRegistry:
    """A registry that holds the metrics of ucp alone. UsageError if `prometheus_client` is not installed."""
    try:
        from prometheus_client import CollectorRegistry
    except ImportError:
        raise UsageError(
            "metrics for Prometheus need the package prometheus-client",
            hint="pip install 'universal-checkpoint[metrics]'",
        ) from None
    made = CollectorRegistry()
    made.register(Collector())
    return made


def write_file(path: str, *, every: float = EVERY_SECONDS) -> None:
    """Write all metrics to the text file at `path` now, `every` so many seconds, and when the process ends.

    It is replaced as a whole, so that it can be read at any time. UsageError if it cannot be written.
    """
    from prometheus_client import write_to_textfile

    held, process, over = registry(), os.getpid(), threading.Event()

    def write() -> None:
        if os.getpid() == process:
            write_to_textfile(path, held)

    def go_on() -> None:
        while not over.wait(every):
            _quietly(write)

    def end() -> None:
        over.set()
        _quietly(write)

    try:
        write()
    except OSError as error:
        raise UsageError(f"UCP_METRICS: {path} cannot be written: {error.strerror}") from error
    threading.Thread(target=go_on, name="ucp-metrics", daemon=True).start()
    atexit.register(end)


def _quietly(write: object) -> None:
    """A file that cannot be written any more must not disturb a training job."""
    assert callable(write)
    try:
        write()
    except OSError:
        return


def serve(address: str) -> int:
    """Serve all metrics over HTTP at ``PORT`` or ``HOST:PORT`` (host 127.0.0.1 by default); gives the port.

    Port 0 takes any. UsageError if the address cannot be used.
    """
    held = registry()
    from prometheus_client import start_http_server

    host, _, port = address.rpartition(":")
    try:
        server, _thread = start_http_server(int(port), host or "127.0.0.1", held)
    except (ValueError, OverflowError, OSError) as error:
        raise UsageError(f"UCP_METRICS: cannot serve at {address!r}: {error}", hint="HOST:PORT is expected") from error
    return int(server.server_port)
