"""Azurite, the vendor's own emulator of Azure blob storage."""

from __future__ import annotations

import base64
import hashlib
import hmac
import shutil
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

from tests.servers.endpoint import BUCKET, Endpoint
from tests.servers.installed import missing_file, servers_folder
from tests.servers.server import Server, answers

_ACCOUNT = "devstoreaccount1"
_KEY = base64.b64encode(hashlib.sha512(b"a key of the tests").digest()).decode()
_PROGRAM = "npm/node_modules/.bin/azurite-blob"


class Azurite(Server):
    name: ClassVar[str] = "azurite"

    @classmethod
    def missing(cls) -> str:
        return missing_file(_PROGRAM) or ("" if shutil.which("node") else "azurite needs node")

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint("az", f"http://127.0.0.1:{self.port()}", _ACCOUNT, _KEY)

    def start(self) -> None:
        data = self.folder / "data"
        command: list[str | Path] = [
            servers_folder() / _PROGRAM,
            "--silent",
            "--skipApiVersionCheck",
            "--disableTelemetry",
        ]
        where: list[str | Path] = ["--location", data, "--blobHost", "127.0.0.1", "--blobPort", str(self.port())]
        self.launch([*command, *where], {"AZURITE_ACCOUNTS": f"{_ACCOUNT}:{_KEY}"})
        self.wait(lambda: answers(self.endpoint.address), "azurite")
        _make_container(self.endpoint, BUCKET)


def _make_container(endpoint: Endpoint, name: str) -> None:
    """Create Container with a Shared Key signature (learn.microsoft.com, "Authorize with Shared Key")."""
    date = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    version = "2021-08-06"
    # Twelve header lines, all empty, then the x-ms headers, then the resource; the account comes twice at an emulator.
    text = (
        f"PUT\n\n\n\n\n\n\n\n\n\n\n\nx-ms-date:{date}\nx-ms-version:{version}\n"
        f"/{endpoint.key}/{endpoint.key}/{name}\nrestype:container"
    )
    signature = base64.b64encode(hmac.digest(base64.b64decode(endpoint.secret), text.encode(), "sha256")).decode()
    request = urllib.request.Request(
        f"{endpoint.address}/{endpoint.key}/{name}?restype=container",
        method="PUT",
        headers={
            "x-ms-date": date,
            "x-ms-version": version,
            "Authorization": f"SharedKey {endpoint.key}:{signature}",
        },
    )
    try:
        with urllib.request.urlopen(request):
            pass
    except urllib.error.HTTPError as error:
        with error:
            if error.code != 409:
                raise
