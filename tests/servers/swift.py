"""OpenStack Swift with its S3 interface: one replica, one process of each kind, objects in plain files."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import ClassVar

from tests.servers.endpoint import BUCKET, Endpoint
from tests.servers.installed import missing_file, servers_folder
from tests.servers.s3 import make_bucket
from tests.servers.server import Server, answers

_BIN = "swift/bin"
_KINDS = ("account", "container", "object")
_COMMON = """
[swift-hash]
swift_hash_path_suffix = x
swift_hash_path_prefix = y
[storage-policy:0]
name = p0
default = yes
"""
_DEFAULT = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
log_level = WARNING
"""
_BACK = """
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""
_FILTERS = "catch_errors cache listing_formats bulk s3api tempauth copy slo dlo"
_PROXY = f"""
[pipeline:main]
pipeline = {_FILTERS} proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = {{secret}} .admin
[filter:s3api]
use = egg:swift#s3api
s3_acl = false
location = us-east-1
check_bucket_owner = false
[filter:cache]
use = egg:swift#memcache
""" + "".join(
    f"[filter:{name}]\nuse = egg:swift#{name}\n"
    for name in _FILTERS.split()
    if name not in ("tempauth", "s3api", "cache")
)


class Swift(Server):
    name: ClassVar[str] = "swift"

    @classmethod
    def missing(cls) -> str:
        return missing_file(f"{_BIN}/swift-proxy-server")

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint("s3", f"http://127.0.0.1:{self.port()}", "test:tester", "swift-secret-of-the-tests")

    def start(self) -> None:
        if not (self.folder / "swift.conf").exists():
            self._configure()
        for kind in (*_KINDS, "proxy"):
            program = servers_folder() / _BIN / f"swift-{kind}-server"
            self.launch([program, self.folder / f"{kind}-server.conf"], {"SWIFT_DIR": str(self.folder)})
        for kind in _KINDS:
            self._wait_for(self.port(kind), kind)
        self._wait_for(self.port(), "proxy")
        make_bucket(self.endpoint, BUCKET)

    def _wait_for(self, port: int, kind: str) -> None:
        self.wait(lambda: answers(f"http://127.0.0.1:{port}/"), f"swift {kind}")

    def _configure(self) -> None:
        (self.folder / "devices" / "d1").mkdir(parents=True)
        (self.folder / "swift.conf").write_text(_COMMON)
        for kind in _KINDS:
            self._write(f"{kind}-server", _DEFAULT + _BACK, port=self.port(kind), kind=kind)
            ring: list[str | Path] = [servers_folder() / _BIN / "swift-ring-builder", f"{kind}.builder"]
            _run([*ring, "create", "4", "1", "1"], self.folder)
            _run([*ring, "add", f"r1z1-127.0.0.1:{self.port(kind)}/d1", "1"], self.folder)
            _run([*ring, "rebalance"], self.folder)
        self._write("proxy-server", _DEFAULT + _PROXY, port=self.port(), secret=self.endpoint.secret)

    def _write(self, name: str, text: str, **values: object) -> None:
        import pwd

        user = pwd.getpwuid(os.getuid()).pw_name
        (self.folder / f"{name}.conf").write_text(text.format(folder=self.folder, user=user, **values))


def _run(command: list[str | Path], folder: Path) -> None:
    """Ring builders end with 1 for a warning."""
    done = subprocess.run([str(word) for word in command], cwd=folder, capture_output=True, check=False)
    if done.returncode > 1:
        raise RuntimeError(done.stdout.decode() + done.stderr.decode())
