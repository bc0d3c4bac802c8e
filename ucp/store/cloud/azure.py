"""Azure blob storage. Credentials: environment, connection string, workload identity, managed identity, Azure CLI."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

from ucp.errors import UsageError
from ucp.store.cloud.address import Address
from ucp.store.cloud.options import Options

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_OTHERS = ("KEY", "TOKEN", "SECRET", "SAS", "CLIENT", "MSI", "IDENTITY", "FEDERATED", "SKIP_SIGNATURE", "CLI", "OBJECT")
"""Parts of the names of variables that say how to be let in: without one the Azure CLI is asked, if there is one."""


def store(address: Address, options: Options, **settings: Any) -> ObjectStore:
    """The client of a container; UsageError if the environment names no account."""
    from obstore.store import AzureStore

    config: dict[str, Any] = {
        "account_name": address.account or None,
        "endpoint": options.endpoint,
        "skip_signature": options.anonymous,
        "encryption_key": options.sse_customer_key,
    }
    given = _connection_string() | {name: value for name, value in config.items() if value is not None}
    endpoint = given.get("endpoint") or os.environ.get("AZURE_STORAGE_ENDPOINT") or os.environ.get("AZURE_ENDPOINT")
    if endpoint and endpoint.startswith("http://"):
        settings["client_options"]["allow_http"] = True
    if not given.keys() & {"account_key", "sas_key", "skip_signature"} and _only_the_cli():
        given["use_azure_cli"] = True
    if options.sse or options.sse_kms_key:
        raise UsageError("a container of Azure has its encryption as a setting", hint="leave sse and sse_kms_key out")
    return AzureStore(address.bucket, config=given, **settings)  # type: ignore[arg-type]


def _connection_string() -> dict[str, Any]:
    """The settings in AZURE_STORAGE_CONNECTION_STRING.

    Source: learn.microsoft.com, "Configure Azure Storage connection strings".
    """
    text = os.environ.get("AZURE_STORAGE_CONNECTION_STRING", "")
    parts = dict(part.split("=", 1) for part in text.split(";") if "=" in part)
    if parts.get("UseDevelopmentStorage", "").lower() == "true":
        return {"use_emulator": True}
    names = {
        "account_name": "AccountName",
        "account_key": "AccountKey",
        "sas_key": "SharedAccessSignature",
        "endpoint": "BlobEndpoint",
    }
    return {name: parts[word] for name, word in names.items() if word in parts}


def _only_the_cli() -> bool:
    said = any(part in name for name in os.environ if name.startswith("AZURE_") for part in _OTHERS)
    return not said and shutil.which("az") is not None
