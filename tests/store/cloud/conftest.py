from __future__ import annotations

import os
import uuid

import pytest

from tests.servers.endpoint import BUCKET, Endpoint
from ucp.store import open_store

PREFIXES = ("AWS_", "AZURE_", "GOOGLE_", "UCP_STORE_", "STORAGE_EMULATOR")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    """No credentials or settings of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith(PREFIXES):
            monkeypatch.delenv(name)


@pytest.fixture
def s3(served, monkeypatch, nothing_set) -> Endpoint:
    endpoint = served("moto")
    for name, value in endpoint.environment().items():
        monkeypatch.setenv(name, value)
    return endpoint


@pytest.fixture
def bucket(s3):
    """boto3's view of the bucket, independent of what is tested."""
    import boto3

    return boto3.resource("s3", endpoint_url=s3.address).Bucket(BUCKET)


@pytest.fixture
def prefix() -> str:
    return f"cloud/{uuid.uuid4()}"


@pytest.fixture
def store(s3, prefix):
    return open_store(f"s3://{BUCKET}/{prefix}")
