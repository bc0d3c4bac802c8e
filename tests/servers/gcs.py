"""gcp-storage-emulator: the JSON interface of Google's storage, in memory. It ignores generation conditions."""

from __future__ import annotations

import importlib.util
import json
import sys
import urllib.request
from typing import ClassVar

from tests.servers.endpoint import BUCKET, Endpoint
from tests.servers.server import Server, answers


class GcsEmulator(Server):
    name: ClassVar[str] = "gcs"
    keeps_data: ClassVar[bool] = False

    @classmethod
    def missing(cls) -> str:
        found = importlib.util.find_spec("gcp_storage_emulator")
        return "" if found else "gcp-storage-emulator is not installed: pip install gcp-storage-emulator"

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint("gs", f"http://127.0.0.1:{self.port()}")

    def start(self) -> None:
        program = "from gcp_storage_emulator.__main__ import main; main()"
        where = ["start", "--host=127.0.0.1", f"--port={self.port()}", "--in-memory"]
        self.launch([sys.executable, "-c", program, *where])
        self.wait(lambda: answers(f"{self.endpoint.address}/storage/v1/b"), "gcp-storage-emulator")
        request = urllib.request.Request(
            f"{self.endpoint.address}/storage/v1/b?project=tests",
            data=json.dumps({"name": BUCKET}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request):
            pass
