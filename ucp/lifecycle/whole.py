"""Whether a checkpoint is whole: what is asked before it takes the place of another one."""

from __future__ import annotations

from ucp.converter import read_catalog
from ucp.errors import CorruptError
from ucp.run.verify import verify


def check_whole(url: str, *, workers: int | None = None) -> None:
    """CorruptError unless every byte of the checkpoint at `url` is as its digests say; all of it is read.

    NotFoundError if there is none, StorageError.
    """
    catalog, store = read_catalog(url)
    for finding in verify(catalog, store, deep=True, workers=workers).findings:
        raise CorruptError(f"{url}: {finding.where}: {finding.message}", hint=f"`ucp repair {url}` may put it right")


__all__ = ["check_whole"]
