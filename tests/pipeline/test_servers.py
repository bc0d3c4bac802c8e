"""The whole pipeline as a user runs it, from one real object store to another, on a machine that can write no file."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ucp
from tests.pipeline.scene import check, published, save
from tests.servers import Endpoint
from ucp.store import open_store

PROGRAM = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
from ucp.cli import main
main()
"""
"""The limit holds for all code in the process, in whatever language: no byte of it gets into a file."""

ROUTES = [
    pytest.param("moto", "moto", id="moto"),
    pytest.param("moto", "azurite", id="s3-to-az", marks=pytest.mark.slow),
    pytest.param("ceph", "ceph", id="ceph", marks=pytest.mark.slow),
    pytest.param("ceph", "azurite", id="ceph-to-az", marks=pytest.mark.slow),
]


class Route:
    """A prefix in a source store and one in a destination, and the command that watches them."""

    def __init__(self, source: str, destination: str, folder: Path) -> None:
        self.source, self.destination, self.folder = source, destination, folder

    def start(self, *options: str) -> subprocess.Popen[str]:
        """A watcher on a machine without a disk."""
        command = [sys.executable, "-c", PROGRAM, "watch", self.source, self.destination, "--json", *options]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env={**os.environ, "TMPDIR": str(self.folder / "none"), "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def once(self, *options: str, code: int = 0) -> Any:
        """One pass; the document that it prints."""
        process = self.start("--once", *options)
        out, errors = process.communicate(timeout=240)
        assert process.returncode == code, out + errors
        return json.loads(out)

    def folders(self) -> list[str]:
        return [name for name in open_store(self.destination).children() if name.startswith("step")]


@pytest.fixture
def route(
    request: pytest.FixtureRequest,
    served: Callable[[str], Endpoint],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Route:
    ends = [served(name) for name in request.param]
    for end in ends:
        for name, value in end.environment().items():
            monkeypatch.setenv(name, value)
    mark = uuid.uuid4().hex[:8]
    return Route(ends[0].url(f"{mark}/run"), ends[1].url(f"{mark}/out"), tmp_path)


def with_routes(*routes: Any) -> Any:
    found = [pytest.param(each.values, id=each.id, marks=each.marks) for each in routes]
    return pytest.mark.parametrize("route", found, indirect=True)


@with_routes(*ROUTES)
def test_from_store_to_store_without_a_local_disk(route):
    for step in (1, 2, 3):
        save(route.source, step)
    document = route.once("--keep", "2", "--grace", "0s")
    assert document["ok"] is True
    assert document["kept"] == ["step-3", "step-2"]
    assert published(route.destination) == {**document["published"], "format": "ucp-pointer", "version": 1}
    with ucp.open(document["published"]["url"]) as found:
        assert found.step == 3
    save(route.source, 4)
    document = route.once("--keep", "2", "--grace", "0s")
    told = [f"{event['event']} {event['name']}" for event in document["events"]]
    assert told == [
        "converting step-4",
        "verifying step-4",
        "verified step-4",
        "published step-4",
        "retired step-2",
        "pruned step-2",
    ]
    assert route.folders() == ["step-3/", "step-4/"]
    for step in (3, 4):
        check(route.destination, step)
    assert route.once("--keep", "2")["events"] == []
    assert not [*route.folder.iterdir()]


@with_routes(ROUTES[0])
def test_what_is_damaged_is_told_and_the_rest_goes_on(route):
    for step in (1, 2):
        save(route.source, step)
    store = open_store(route.source)
    [shard] = [entry.path for entry in store.entries("step-2/") if entry.path.endswith(".safetensors")]
    data = bytearray(store.read(shard))
    data[-1] ^= 1
    store.put(shard, bytes(data))
    document = route.once("--every", "1s", code=6)
    assert document["ok"] is False
    [failed] = document["failed"]
    assert (failed["name"], failed["code"], failed["exit_code"]) == ("step-2", "corrupt", 6)
    assert document["published"]["name"] == "step-1"
    assert route.once(code=6)["events"] == [], "it is tried again later, not at once"


@pytest.mark.slow
@with_routes(ROUTES[0])
def test_killed_at_any_moment_and_run_again_it_ends_the_same(route):
    for step in (1, 2, 3):
        save(route.source, step)
    choose = random.Random(3)
    for _ in range(4):
        process = route.start("--keep", "2", "--grace", "0s", "--every", "1s")
        time.sleep(choose.uniform(0.5, 4.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (said := published(route.destination)) is not None:
            check(route.destination, said["step"])
    document = route.once("--keep", "2", "--grace", "0s", "--lease", "1s")
    assert document["kept"] == ["step-3", "step-2"]
    assert route.folders() == ["step-2/", "step-3/"]
    assert published(route.destination)["name"] == "step-3"
    for step in (2, 3):
        check(route.destination, step)
    left = [entry.path for entry in open_store(route.destination).entries()]
    assert not [path for path in left if "journal" in path or "leases" in path]


@with_routes(ROUTES[0])
def test_sigterm_ends_a_watcher_in_order(route):
    save(route.source, 1)
    process = route.start("--every", "1s")
    assert process.stdout is not None
    lines = [json.loads(process.stdout.readline()) for _ in range(4)]
    assert [line["event"] for line in lines] == ["converting", "verifying", "verified", "published"]
    process.terminate()
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert json.loads(out)["error"]["code"] == "interrupted"
    assert errors == ""


@with_routes(ROUTES[0])
def test_storage_that_is_not_there_is_exit_code_7(route, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("UCP_STORE_RETRY_SECONDS", "1")
    document = route.once(code=7)
    assert document["error"]["code"] == "storage"


@pytest.mark.slow
@with_routes(ROUTES[0])
def test_watchers_side_by_side_share_the_work(route):
    for step in range(1, 6):
        save(route.source, step)
    watchers = [route.start("--keep", "3", "--grace", "0s", "--every", "0.2s") for _ in range(2)]
    deadline = time.monotonic() + 120
    while route.folders() != ["step-3/", "step-4/", "step-5/"] or published(route.destination) is None:
        assert time.monotonic() < deadline, route.folders()
        time.sleep(0.5)
    save(route.source, 6)
    while published(route.destination)["step"] != 6 or "step-3/" in route.folders():
        assert time.monotonic() < deadline, route.folders()
        time.sleep(0.5)
    for process in watchers:
        process.terminate()
    told = [process.communicate(timeout=60) for process in watchers]
    assert [process.returncode for process in watchers] == [130, 130], told
    events = [json.loads(line) for out, _ in told for line in out.splitlines() if line.startswith('{"event"')]
    assert not [event for event in events if event["event"] == "failed"]
    assert route.once("--keep", "3")["kept"] == ["step-6", "step-5", "step-4"]
    for step in (4, 5, 6):
        check(route.destination, step)
