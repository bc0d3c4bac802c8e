"""Google Cloud Storage. Credentials: the application default ones (environment, gcloud, instance)."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ucp.errors import UsageError
from ucp.store.cloud.address import Address
from ucp.store.cloud.options import Options

if TYPE_CHECKING:
    from obstore.store import ObjectStore


_EMULATOR = "STORAGE_EMULATOR_HOST"
"""Where Google's own clients find an emulator. It must speak the XML interface, which this client uses."""


def _no_credentials() -> Any:
    """What an emulator asks for."""
    return {"token": "emulator", "expires_at": None}


def store(address: Address, options: Options, **settings: Any) -> ObjectStore:
    """The client of a bucket; UsageError for options that Google has no use for."""
    from obstore.store import GCSStore

    if options.sse or options.sse_kms_key or options.sse_customer_key:
        raise UsageError("a bucket of Google has its encryption key as a setting", hint="leave the sse options out")
    emulator = os.environ.get(_EMULATOR, "")
    if emulator and not options.endpoint:
        options = replace(options, endpoint=emulator if "://" in emulator else f"http://{emulator}")
        settings["credential_provider"] = _no_credentials
    if options.endpoint and options.endpoint.startswith("http://"):
        settings["client_options"]["allow_http"] = True
    config = {"base_url": options.endpoint, "skip_signature": options.anonymous}
    given: Any = {name: value for name, value in config.items() if value is not None}
    return GCSStore(address.bucket, config=given, **settings)
