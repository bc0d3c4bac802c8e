"""Where a server answers, and what a client must say to it."""

from __future__ import annotations

from dataclasses import dataclass, replace

BUCKET = "ucp-test"
"""Every server has this bucket, empty, when it is ready."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`protocol` is the scheme of the store's URLs (``s3``, ``az``, ``gs``, ``http``); `address` that of the server."""

    protocol: str
    address: str
    key: str = ""
    secret: str = ""

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2].partition("/")[0])

    def through(self, port: int) -> Endpoint:
        """The same server behind another port, such as a proxy's."""
        return replace(self, address=self.address.replace(f":{self.port}", f":{port}", 1))

    def url(self, path: str) -> str:
        """URL of a folder in the bucket, as a user writes it."""
        if self.protocol == "http":
            return f"{self.address}/{path}"
        return f"{self.protocol}://{BUCKET}/{path}"

    def environment(self) -> dict[str, str]:
        """What a user sets to reach it."""
        if self.protocol == "s3":
            return {
                "AWS_ENDPOINT_URL": self.address,
                "AWS_ACCESS_KEY_ID": self.key,
                "AWS_SECRET_ACCESS_KEY": self.secret,
                "AWS_REGION": "us-east-1",
            }
        if self.protocol == "az":
            return {
                "AZURE_STORAGE_ENDPOINT": f"{self.address}/{self.key}",
                "AZURE_STORAGE_ACCOUNT_NAME": self.key,
                "AZURE_STORAGE_ACCOUNT_KEY": self.secret,
            }
        if self.protocol == "gs":
            return {"STORAGE_EMULATOR_HOST": self.address}
        return {}
