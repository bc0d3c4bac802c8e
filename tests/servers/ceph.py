"""Ceph with its S3 gateway: one monitor, one OSD, one gateway, from the distribution's packages, not installed."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import uuid
from pathlib import Path
from typing import ClassVar

from tests.servers.endpoint import BUCKET, Endpoint
from tests.servers.installed import missing_file, servers_folder
from tests.servers.s3 import make_bucket
from tests.servers.server import Server, ServerError, answers

_CONFIGURATION = """
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{monitor}
public network = 127.0.0.0/8
ms bind msgr2 = false
ms bind ipv4 = true
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon data avail crit = 1
mon osd full ratio = .99
osd crush chooseleaf type = 0
erasure code dir = {lib}/ceph/erasure-code
plugin dir = {lib}/ceph
osd class dir = {lib}/rados-classes
run dir = {folder}
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
pid file = {folder}/$name.pid
osd class update on start = false
osd crush update on start = false
mon data = {folder}/monitor
osd data = {folder}/osd
osd objectstore = bluestore
bluestore block size = 34359738368
bluestore block create = true
osd memory target = 939524096
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{gateway}
rgw data = {folder}/gateway
rgw thread pool size = 64
rgw enable usage log = false
"""
_PROGRAMS = tuple(f"root/usr/bin/{name}" for name in ("ceph", "ceph-mon", "ceph-osd", "radosgw", "radosgw-admin"))


class Ceph(Server):
    """`kill` ends the gateway only; objects are in the OSD, which goes on."""

    name: ClassVar[str] = "ceph"

    @classmethod
    def missing(cls) -> str:
        return missing_file(*_PROGRAMS)

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint("s3", f"http://127.0.0.1:{self.port()}", "CEPHKEYOFTHETESTS", "ceph/secret+key=of/the/tests")

    def start(self) -> None:
        if not (self.folder / "ceph.conf").exists():
            self._start_cluster()
        self._launch("radosgw", "-n", "client.rgw")
        self.wait(lambda: answers(self.endpoint.address), "radosgw")
        make_bucket(self.endpoint, BUCKET)

    def kill(self) -> None:
        gateway = self.processes.pop()
        self._end([gateway], signal.SIGKILL)

    def _start_cluster(self) -> None:
        for name in ("monitor", "osd", "gateway"):
            (self.folder / name).mkdir()
        fsid = str(uuid.uuid4())
        ports = {"monitor": self.port("monitor"), "gateway": self.port()}
        lib = next((servers_folder() / "root/usr/lib").glob("*/rados-classes")).parent
        text = _CONFIGURATION.format(fsid=fsid, folder=self.folder, lib=lib, **ports)
        (self.folder / "ceph.conf").write_text(text)
        self._start_monitor(fsid)
        self._start_osd()
        user = ["user", "create", "--uid=tests", "--display-name=tests"]
        keys = [f"--access-key={self.endpoint.key}", f"--secret={self.endpoint.secret}"]
        self._run("radosgw-admin", "-n", "client.rgw", *user, *keys)

    def _start_monitor(self, fsid: str) -> None:
        monmap = str(self.folder / "monmap")
        address = f"[v1:127.0.0.1:{self.port('monitor')}]"
        self._run("monmaptool", "--create", "--addv", "a", address, "--fsid", fsid, monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap)
        self._launch("ceph-mon", "-i", "a")

    def _start_osd(self) -> None:
        number = str(uuid.uuid4())
        self._run_client("osd", "new", number)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", number)
        self._launch("ceph-osd", "-i", "0")
        self._run_client("osd", "crush", "add", "osd.0", "1.0", "root=default", "host=localhost")
        self.wait(lambda: "1 up" in self._run_client("osd", "stat"), "ceph-osd")

    def _launch(self, program: str, *words: str) -> None:
        command: list[str | Path] = [
            servers_folder() / "root/usr/bin" / program,
            "-c",
            self.folder / "ceph.conf",
            *words,
            "-f",
        ]
        self.launch(command, _environment(self.folder))

    def _run(self, program: str, *words: str) -> str:
        return _output([str(servers_folder() / "root/usr/bin" / program), *words], self.folder)

    def _run_client(self, *words: str) -> str:
        """The command line is a Python program for the distribution's own interpreter."""
        program = str(servers_folder() / "root/usr/bin/ceph")
        return _output(["/usr/bin/python3", program, "--connect-timeout", "60", *words], self.folder)


def _output(command: list[str], folder: Path) -> str:
    environment = {**os.environ, **_environment(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False, timeout=120)
    if done.returncode:
        raise ServerError(f"{' '.join(command)}: {done.stderr.decode(errors='replace')[-2000:]}")
    return done.stdout.decode()


def _environment(folder: Path) -> dict[str, str]:
    return {"CEPH_CONF": str(folder / "ceph.conf"), **_libraries()}


@functools.cache
def _libraries() -> dict[str, str]:
    root = servers_folder() / "root"
    folders = sorted({str(path.parent) for path in root.rglob("*.so*")})
    return {"LD_LIBRARY_PATH": ":".join(folders), "PYTHONPATH": str(root / "usr/lib/python3/dist-packages")}
