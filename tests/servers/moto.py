"""moto's S3: a mock in one process, quick to start, with every conditional operation. Data is lost with it."""

from __future__ import annotations

import importlib.util
import sys
from typing import ClassVar

from tests.servers.endpoint import BUCKET, Endpoint
from tests.servers.s3 import make_bucket
from tests.servers.server import Server, answers


class Moto(Server):
    name: ClassVar[str] = "moto"
    keeps_data: ClassVar[bool] = False

    @classmethod
    def missing(cls) -> str:
        return "" if importlib.util.find_spec("moto") else "moto is not installed: pip install 'moto[server]'"

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint("s3", f"http://127.0.0.1:{self.port()}", "AKIAIOSFODNN7MOTO", "moto/secret+key=of/the/tests")

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port())]
        self.launch(command, {"MOTO_S3_ALLOW_CROSSACCOUNT_ACCESS": "true"})
        self.wait(lambda: answers(f"{self.endpoint.address}/moto-api/"), "moto_server")
        make_bucket(self.endpoint, BUCKET)
