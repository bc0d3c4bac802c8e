"""S3 and what speaks like it. Credentials: environment, shared configuration, web identity, container, instance."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ucp.errors import UsageError
from ucp.store.cloud.address import Address
from ucp.store.cloud.options import Options

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_OWN_CHAIN = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
"""Where the client finds credentials by itself, besides the metadata of an instance."""


def store(address: Address, options: Options, **settings: Any) -> ObjectStore:
    """The client of an S3 bucket; UsageError where a profile is asked for that cannot be read."""
    from obstore.store import S3Store

    profile = _profile(options)
    endpoint = options.endpoint or _from(_ENDPOINTS) or profile.get("endpoint")
    if endpoint and endpoint.startswith("http://"):
        settings["client_options"]["allow_http"] = True
    config = {
        "endpoint": endpoint,
        "region": options.region or _from(("AWS_REGION", "AWS_DEFAULT_REGION")) or profile.get("region"),
        "skip_signature": options.anonymous,
        "request_payer": options.requester_pays,
        "server_side_encryption": options.sse or ("sse-c" if options.sse_customer_key else None),
        "sse_kms_key_id": options.sse_kms_key,
        "sse_customer_key_base64": options.sse_customer_key,
        # Measured: to sign the payload costs 4 CPU-seconds per GB. The checksums of ucp guard the bytes.
        "unsigned_payload": True,
        "disable_bulk_delete": True,
    }
    given: Any = {name: value for name, value in config.items() if value is not None}
    return S3Store(address.bucket, config=given, credential_provider=profile.get("provider"), **settings)


def _profile(options: Options) -> dict[str, Any]:
    """Region, endpoint and credentials of a profile, where the client would not find any by itself."""
    if options.anonymous or os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true"):
        return {}
    if options.profile is None and _from(_OWN_CHAIN):
        return {}
    named = options.profile or os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE")
    if not named and not _shared_file("AWS_SHARED_CREDENTIALS_FILE", "credentials"):
        return {}
    try:
        import botocore.exceptions
        import botocore.session
    except ImportError:
        raise UsageError(
            f"{f'profile {named}' if named else 'the shared credentials file'} of AWS needs the package botocore",
            hint='pip install "universal-checkpoint[aws]"',
        ) from None
    try:
        return _read_profile(botocore.session.Session(profile=options.profile or named))
    except botocore.exceptions.BotoCoreError as error:
        raise UsageError(f"profile {named} of AWS: {error}", hint="check AWS_PROFILE and ~/.aws/config") from None


def _read_profile(session: Any) -> dict[str, Any]:
    scoped = session.get_scoped_config()
    found = {"region": session.get_config_variable("region"), "endpoint": scoped.get("endpoint_url")}
    credentials = session.get_credentials()
    return found | ({"provider": _Provider(credentials)} if credentials is not None else {})


class _Provider:
    """Hands the client the credentials of botocore, which renews those that expire."""

    def __init__(self, credentials: Any) -> None:
        self.credentials = credentials

    def __call__(self) -> Any:
        from datetime import UTC, datetime, timedelta

        frozen = self.credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + timedelta(minutes=5),
        }


def _shared_file(variable: str, name: str) -> bool:
    return Path(os.environ.get(variable) or Path.home() / ".aws" / name).is_file()


def _from(variables: tuple[str, ...]) -> str | None:
    return next((os.environ[name] for name in variables if os.environ.get(name)), None)
