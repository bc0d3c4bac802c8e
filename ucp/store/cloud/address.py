"""URLs of object storage: which service, which bucket or container, which folder in it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ucp.errors import UsageError
from ucp.store.cloud.keys import check_path
from ucp.store.errors import without_secrets

_S3, _GCS, _AZURE = "s3", "gs", "az"
FAMILIES = {
    "s3": _S3,
    "s3a": _S3,
    "gs": _GCS,
    "gcs": _GCS,
    "az": _AZURE,
    "azure": _AZURE,
    "abfs": _AZURE,
    "abfss": _AZURE,
}
"""Which service a scheme means: s3a and abfs(s) are how Hadoop spells them."""

_SIGNED = re.compile(r"\?(.*&)?[^=&]*(sig|signature|token|secret|credential|password|key)[^=&]*=", re.IGNORECASE)
"""A query with what signs requests, such as a shared access signature: else ``?`` is a character of a name."""


@dataclass(frozen=True, slots=True)
class Address:
    """A folder of a bucket. `host` is the account's host where an Azure URL names one (``container@host``)."""

    family: str
    bucket: str
    prefix: str = ""
    host: str = ""

    @property
    def url(self) -> str:
        """As people write it, with one spelling for each service, so that records of it compare."""
        bucket = f"abfss://{self.bucket}@{self.host}" if self.host else f"{self.family}://{self.bucket}"
        return f"{bucket}/{self.prefix}" if self.prefix else bucket

    def key(self, path: str) -> str:
        """Name of the object at `path` in the bucket; UsageError if it leaves the folder or no store could hold it."""
        check_path(path, self.url)
        return f"{self.prefix}/{path}" if self.prefix and path else self.prefix or path

    def child(self, path: str) -> Address:
        """The folder at `path` in this one."""
        return replace(self, prefix=self.key(path.rstrip("/")))

    @property
    def account(self) -> str:
        """The Azure account of `host`, which is its first label."""
        return self.host.partition(".")[0]


def parse(url: str) -> Address:
    """The address that `url` writes; UsageError if it names no bucket, or has credentials in it."""
    scheme, _, rest = url.partition("://")
    family = FAMILIES[scheme]
    bucket, _, prefix = rest.partition("/")
    bucket, sign, host = bucket.partition("@")
    if (sign and not scheme.startswith("abfs")) or _SIGNED.search(rest):
        raise UsageError(
            f"{without_secrets(url)}: credentials do not belong into a URL",
            hint="give them as the environment or the profile of the service (docs/storage.md)",
        )
    if not bucket:
        raise UsageError(f"{without_secrets(url)} names no bucket", hint=f"{scheme}://bucket/folder is one")
    top = Address(family, bucket, host=host)
    return top.child(prefix) if prefix.strip("/") else top
