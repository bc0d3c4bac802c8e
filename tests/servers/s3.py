"""The S3 requests that setting up takes, with the vendor's own client."""

from __future__ import annotations

from typing import Any

from tests.servers.endpoint import Endpoint


def client(endpoint: Endpoint, **config: Any) -> Any:
    """A boto3 client of an S3 server."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=endpoint.address,
        aws_access_key_id=endpoint.key,
        aws_secret_access_key=endpoint.secret,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}, **config),
    )


def make_bucket(endpoint: Endpoint, name: str) -> None:
    """Make a bucket, unless it is there."""
    s3 = client(endpoint)
    if name not in {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}:
        s3.create_bucket(Bucket=name)
    s3.close()
