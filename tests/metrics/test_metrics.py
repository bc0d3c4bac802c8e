"""Metrics as real Prometheus and OpenTelemetry clients read them."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
import uuid
from pathlib import Path

import pytest
import torch
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client.parser import text_string_to_metric_families

import ucp
from ucp import metrics
from ucp.errors import UsageError
from ucp.metrics import TIMINGS
from ucp.metrics.otel import instrument
from ucp.metrics.prometheus import serve, write_file
from ucp.metrics.timings import Timings
from ucp.store import open_store
from ucp.store.traffic import TRAFFIC

LABELS = ("scheme", "operation", "reason", "le")
WORK = """
import sys, torch, ucp
ucp.save({"w": torch.arange(8.0)}, sys.argv[1], step=1)
ucp.convert(sys.argv[1], sys.argv[2])
"""


def families(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """Samples by their full name and the values of their labels, as Prometheus parses them."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(sample.labels[name] for name in LABELS if name in sample.labels)
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def run(variable: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A process of its own that saves and converts."""
    return subprocess.run(
        [sys.executable, "-c", WORK, str(folder / "a"), str(folder / "b")],
        env={**os.environ, "UCP_METRICS": variable, "RANK": "3"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_process_leaves_a_text_file_for_the_node_exporter(tmp_path):
    done = run(f"prometheus:{tmp_path}/ucp-{{rank}}.prom", tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.glob("*.prom*")] == ["ucp-3.prom"]
    found = families((tmp_path / "ucp-3.prom").read_text())
    written = sum(path.stat().st_size for path in (tmp_path / "b").rglob("*") if path.is_file())
    assert sum(found["ucp_store_written_bytes_total"].values()) > written >= 32
    assert found["ucp_store_read_bytes_total"]["file", "get"] >= 32
    assert found["ucp_store_requests_total"]["file", "put"] >= 5
    assert found["ucp_store_failures_total"]["file", "put"] == 0
    for name in ("save_stall", "save_committed", "convert"):
        assert found[f"ucp_{name}_seconds_count"] == {(): 1}
        assert found[f"ucp_{name}_seconds_bucket"]["+Inf",] == 1
        assert 0 < found[f"ucp_{name}_seconds_sum"][()] < 60


def test_names_follow_the_conventions(tmp_path):
    TRAFFIC.request("s3", "get", 10)
    TRAFFIC.retried("s3", "throttled", 0.25)
    TIMINGS.add("load", 0.5)
    path = tmp_path / "x.prom"
    write_file(str(path), every=3600.0)
    for family in text_string_to_metric_families(path.read_text()):
        assert family.documentation.endswith(".")
        assert family.type in ("counter", "histogram")
        assert family.name.startswith("ucp_")
        if family.type == "counter":
            assert {sample.name for sample in family.samples} <= {f"{family.name}_total"}
        else:
            assert family.name.endswith("_seconds")
    found = families(path.read_text())
    assert found["ucp_store_retries_total"]["s3", "throttled"] >= 1
    assert found["ucp_store_stall_seconds_total"]["s3", "throttled"] >= 0.25


def test_it_is_served_over_http():
    TRAFFIC.request("gs", "put", written=7)
    port = serve("0")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        found = families(answer.read().decode())
    assert found["ucp_store_written_bytes_total"]["gs", "put"] >= 7
    with pytest.raises(UsageError, match="cannot serve"):
        serve(f"127.0.0.1:{port}x")
    with pytest.raises(UsageError, match="cannot serve"):
        serve(f"127.0.0.1:{port}")


def points(reader: InMemoryMetricReader) -> dict[str, list]:
    data = reader.get_metrics_data()
    found = [metric for one in data.resource_metrics for scope in one.scope_metrics for metric in scope.metrics]
    return {metric.name: [metric.unit, *metric.data.data_points] for metric in found}


def test_opentelemetry_reads_the_same():
    reader = InMemoryMetricReader()
    instrument(MeterProvider([reader]))
    scheme = f"memory-{uuid.uuid4().hex}"
    TRAFFIC.request(scheme, "get", read=100)
    TRAFFIC.request(scheme, "put", written=40)
    TRAFFIC.failed(scheme, "put")
    TRAFFIC.retried(scheme, "reset", 1.5)
    TIMINGS.add("save_stall", 0.2)
    TIMINGS.add("save_stall", 20.0)
    found = points(reader)

    def number(name: str, **labels: str) -> float:
        wanted = {f"ucp.store.{key}": value for key, value in {"scheme": scheme, **labels}.items()}
        return sum(p.value for p in found[name][1:] if wanted.items() <= p.attributes.items())

    assert found["ucp.store.read"][0] == "By"
    assert found["ucp.store.stall"][0] == found["ucp.save.stall"][0] == "s"
    assert number("ucp.store.read") == 100
    assert number("ucp.store.written", operation="put") == 40
    assert number("ucp.store.requests") == 2
    assert number("ucp.store.failures", operation="put") == 1
    assert number("ucp.store.retries", **{"retry.reason": "reset"}) == 1
    assert number("ucp.store.stall") == 1.5
    _, point = found["ucp.save.stall"]
    assert point.count == 2
    assert point.sum == pytest.approx(20.2)
    assert [bound for bound, n in zip(point.explicit_bounds, point.bucket_counts, strict=False) if n] == [0.3, 30.0]


def test_saves_and_loads_are_timed(tmp_path):
    before = TIMINGS.snapshot()
    state = {"w": torch.arange(4.0)}
    handle = ucp.async_save(state, str(tmp_path / "a"), step=1)
    handle.result()
    ucp.load(state, str(tmp_path / "a"))
    after = TIMINGS.snapshot()
    for name in ("save_stall", "save_staged", "save_committed", "load"):
        assert after[name].count == (before[name].count if name in before else 0) + 1, name


def test_worker_processes_add_what_they_counted(tmp_path):
    ucp.save({"w": torch.arange(100_000.0)}, str(tmp_path / "a"), step=1)
    before = TRAFFIC.snapshot()
    report = ucp.convert(str(tmp_path / "a"), str(tmp_path / "b"), workers=2, processes=True)
    since = TRAFFIC.snapshot().since(before)
    assert since.requests["file", "part"].written >= 400_000
    assert since.read >= report.bytes_read >= 400_000


def test_without_the_variable_no_exporter_is_even_imported(tmp_path):
    code = WORK + "\nassert not [m for m in sys.modules if 'prometheus' in m or 'opentelemetry' in m]\n"
    environment = {name: value for name, value in os.environ.items() if name != "UCP_METRICS"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a"), str(tmp_path / "b")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("variable", ["statsd", "prometheus", "prometheus:", "prometheus:/no/such/folder/x.prom"])
def test_what_cannot_be_had_is_a_usage_error(tmp_path, variable, monkeypatch):
    monkeypatch.setenv("UCP_METRICS", variable)
    monkeypatch.setattr(metrics, "_asked", False)
    with pytest.raises(UsageError, match=r"UCP_METRICS"):
        open_store(str(tmp_path))


@pytest.mark.parametrize(("package", "start"), [("prometheus_client", "prometheus:x"), ("opentelemetry", "otel")])
def test_a_package_that_is_missing_is_named(monkeypatch, package, start):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.metrics", None)
    with pytest.raises(UsageError, match="need the package") as caught:
        metrics.start(start)
    assert "pip install" in caught.value.hint


def test_a_duration_is_counted_in_its_class():
    timings = Timings()
    for seconds in (0.01, 0.02, 5000.0):
        timings.add("load", seconds)
    assert timings.snapshot()["load"].buckets == (1, 1, *[0] * 10, 1)
    assert timings.snapshot()["load"].seconds == pytest.approx(5000.03)
