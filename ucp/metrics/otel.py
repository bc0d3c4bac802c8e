"""OpenTelemetry: the same metrics as instruments of the process's meter provider.

ucp sets no provider up: the application does, or ``opentelemetry-instrument ucp …`` by the usual ``OTEL_*`` variables.
Names and units follow the semantic conventions of OpenTelemetry (dots; UCUM units beside the name).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ucp.errors import UsageError
from ucp.metrics.timings import BUCKETS, NAMES, TIMINGS
from ucp.store.traffic import TRAFFIC, Requests, Retries

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation

SCHEME, OPERATION, REASON = "ucp.store.scheme", "ucp.store.operation", "ucp.store.retry.reason"

_REQUESTS: tuple[tuple[str, str, str, Callable[[Requests], float]], ...] = (
    ("ucp.store.read", "By", "Bytes read from storage.", lambda row: row.read),
    ("ucp.store.written", "By", "Bytes written to storage.", lambda row: row.written),
    ("ucp.store.requests", "{request}", "Requests that storage answered.", lambda row: row.count),
    ("ucp.store.failures", "{request}", "Requests that failed for good.", lambda row: row.failed),
)
_RETRIES: tuple[tuple[str, str, str, Callable[[Retries], float]], ...] = (
    ("ucp.store.retries", "{retry}", "Requests that were tried again.", lambda row: row.count),
    ("ucp.store.stall", "s", "Time waited before trying again.", lambda row: row.waited),
)


def instrument(provider: MeterProvider | None = None) -> None:
    """Report to `provider`, by default the global one. UsageError if `opentelemetry-api` is not installed."""
    try:
        from opentelemetry.metrics import get_meter
    except ImportError:
        raise UsageError(
            "metrics for OpenTelemetry need the package opentelemetry-api",
            hint="pip install 'universal-checkpoint[otel]'",
        ) from None
    meter = get_meter("ucp", meter_provider=provider)
    for name, unit, text, number in _REQUESTS:
        meter.create_observable_counter(name, [_requests(number)], unit=unit, description=text)
    for name, unit, text, amount in _RETRIES:
        meter.create_observable_counter(name, [_retries(amount)], unit=unit, description=text)
    durations = {
        name: meter.create_histogram(
            f"ucp.{name.replace('_', '.')}",
            unit="s",
            description=f"{text[0].upper()}{text[1:]}.",
            explicit_bucket_boundaries_advisory=BUCKETS,
        )
        for name, text in NAMES.items()
    }
    TIMINGS.listen(lambda name, seconds: durations[name].record(seconds))


Callback = Callable[["CallbackOptions"], Iterable["Observation"]]


def _requests(number: Callable[[Requests], float]) -> Callback:
    def observe(_: CallbackOptions) -> Iterable[Observation]:
        from opentelemetry.metrics import Observation

        for (scheme, operation), row in TRAFFIC.snapshot().requests.items():
            yield Observation(number(row), {SCHEME: scheme, OPERATION: operation})

    return observe


def _retries(number: Callable[[Retries], float]) -> Callback:
    def observe(_: CallbackOptions) -> Iterable[Observation]:
        from opentelemetry.metrics import Observation

        for (scheme, reason), row in TRAFFIC.snapshot().retries.items():
            yield Observation(number(row), {SCHEME: scheme, REASON: reason})

    return observe
