"""An object store for the examples of pages that need one, with the buckets that these name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import boto3

from tests.servers import Endpoint

PAGES = ("pipelines.md",)
BUCKETS = ("training", "models")


@contextmanager
def environment(endpoint: Endpoint) -> Iterator[None]:
    """Inside, ``s3://training`` and ``s3://models`` are empty buckets of the server."""
    with mock.patch.dict(os.environ, {**endpoint.environment(), "UCP_STORE_RETRY_SECONDS": "10"}):
        client = boto3.client("s3")
        for bucket in BUCKETS:
            client.create_bucket(Bucket=bucket)
            for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
                for entry in page.get("Contents", []):
                    client.delete_object(Bucket=bucket, Key=entry["Key"])
        client.close()
        yield
