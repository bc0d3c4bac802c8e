"""The whole suite of stores in Google's interface, as far as a translation to the mock of S3 can tell."""

from __future__ import annotations

import pytest

from tests.servers.endpoint import BUCKET
from tests.store.cloud.generations import translated
from ucp.store import open_store
from ucp.testing.stores import StoreConformance


@pytest.fixture(scope="module")
def port(served):
    with translated(served("moto")) as port:
        yield port


@pytest.mark.slow
class TestGoogle(StoreConformance):
    large_bytes = (9 << 20) + 13

    @pytest.fixture
    def store(self, port, prefix, monkeypatch):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"127.0.0.1:{port}")
        return open_store(f"gs://{BUCKET}/{prefix}")
