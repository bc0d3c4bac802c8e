"""Every server starts, is shared, keeps what it was given, and is gone when nobody needs it."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest

from tests.servers import SERVERS, Proxy, running, shared
from tests.servers.endpoint import BUCKET
from tests.servers.faults import LostAnswer, Refuse
from tests.servers.fixtures import REQUIRED, server_kind
from tests.servers.moto import Moto
from tests.servers.s3 import client
from tests.servers.server import answers

USER = """
import sys, time
from pathlib import Path
from tests.servers import SERVERS, shared
with shared(SERVERS["moto"], Path(sys.argv[1])) as endpoint:
    print(endpoint.address, flush=True)
    time.sleep(60)
"""


def start_user(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", USER, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def gone(address: str) -> bool:
    until = time.monotonic() + 20
    while answers(address) and time.monotonic() < until:
        time.sleep(0.1)
    return not answers(address)


def test_users_share_a_server_that_ends_with_the_last_however_it_ends(tmp_path):
    users = [start_user(tmp_path) for _ in range(2)]
    addresses = {user.stdout.readline().strip() for user in users}
    (address,) = addresses
    users[0].kill()
    users[0].wait()
    time.sleep(1)
    assert answers(address)
    users[1].kill()
    users[1].wait()
    assert gone(address)
    for user in users:
        user.stdout.close()
    with shared(Moto, tmp_path) as endpoint:
        assert answers(endpoint.address)
    assert gone(endpoint.address)


def fast_and_slow(*names):
    return [pytest.param(name, marks=[] if name == "moto" else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("name", fast_and_slow("moto", "ceph", "swift"))
def test_s3_servers_keep_what_they_acknowledged(name):
    kind = server_kind(name)
    with running(kind) as server, closing(client(server.endpoint)) as s3:
        s3.put_object(Bucket=BUCKET, Key="a", Body=b"data")
        address = server.endpoint.address
        server.kill()
        assert not answers(address)
        server.start()
        assert server.endpoint.address == address
        if kind.keeps_data:
            assert s3.get_object(Bucket=BUCKET, Key="a")["Body"].read() == b"data"
    assert not answers(address)


@pytest.mark.parametrize("name", fast_and_slow("moto", "ceph", "swift"))
def test_signed_requests_pass_through_the_proxy(name, served):
    endpoint = served(name)
    with (
        Proxy(endpoint.port) as proxy,
        closing(client(endpoint.through(proxy.port), retries={"mode": "standard", "max_attempts": 4})) as s3,
    ):
        proxy.add(LostAnswer(), method="PUT")
        proxy.add(Refuse(503), method="PUT", skip=1)
        s3.put_object(Bucket=BUCKET, Key=f"proxy/{name}", Body=bytes(100_000))
        assert s3.get_object(Bucket=BUCKET, Key=f"proxy/{name}")["Body"].read() == bytes(100_000)
        assert proxy.injected == {LostAnswer.kind: 1, Refuse.kind: 1}
        assert [seen.status for seen in proxy.settled()] == [0, 503, 200, 200]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["azurite", "gcs"])
def test_other_servers_refuse_or_list_nothing(name):
    """What the stores' own tests do not show: that a server comes back on its port after it was killed."""
    with running(server_kind(name)) as server:
        address = server.endpoint.address
        server.kill()
        assert not answers(address)
        server.start()
        assert answers(address)
    assert not answers(address)


@pytest.mark.slow
def test_nginx_serves_ranges(served):
    endpoint = served("nginx")
    Path(endpoint.key, "some").write_bytes(b"0123456789")
    request = urllib.request.Request(endpoint.url("some"), headers={"Range": "bytes=2-4"})
    with urllib.request.urlopen(request) as answer:
        assert (answer.status, answer.read()) == (206, b"234")


def test_what_is_not_installed_is_told_with_the_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("UCP_TEST_SERVERS", str(tmp_path))
    monkeypatch.delenv(REQUIRED, raising=False)
    for name in ("ceph", "swift", "azurite", "nginx"):
        assert "just servers" in SERVERS[name].missing()
    with pytest.raises(pytest.skip.Exception, match="just servers"):
        server_kind("ceph")
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match="just servers"):
        server_kind("ceph")
