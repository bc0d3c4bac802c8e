"""Object storage: S3, Google Cloud Storage, Azure and plain HTTP, by the client obstore, loaded at first use."""

from __future__ import annotations

from typing import Any

from ucp.store.base import Store
from ucp.store.cloud.address import FAMILIES, parse
from ucp.store.cloud.options import Options, options_from

SCHEMES = frozenset({*FAMILIES, "http", "https"})
"""Schemes that `open_cloud` takes."""


def open_cloud(url: str, options: dict[str, Any]) -> Store:
    """The store at `url`; UsageError if it names no bucket, or an option is none. Nothing is asked of the service."""
    if url.startswith(("http://", "https://")):
        from ucp.store.cloud.http import HttpStore

        return HttpStore(url, options_from(options))
    from ucp.store.cloud.store import CloudStore

    return CloudStore(parse(url), options_from(options))


__all__ = ["SCHEMES", "Options", "open_cloud"]
