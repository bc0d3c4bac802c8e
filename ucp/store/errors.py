"""Lower-layer exceptions become ucp's own, with the object's URL in the message."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from ucp.errors import NotFoundError, StorageError, UcpError

_HINTS = {
    errno.ENOSPC: "free some space and run the same command again: it resumes",
    errno.EDQUOT: "raise the quota and run the same command again: it resumes",
    errno.EACCES: "check the permissions of this path",
    errno.EPERM: "check the permissions of this path",
    errno.EROFS: "the file system is read-only; choose another destination",
}


def without_secrets(url: str) -> str:
    """`url` as it may be printed: ``***`` for user and password, and for the query, where signatures are."""
    shown = re.sub(r"://[^/]*@", "://***@", url)
    return re.sub(r"\?.*", "?***", shown) if "://" in url else shown


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Turn an OSError raised inside into NotFoundError or StorageError that names `url`."""
    try:
        yield
    except UcpError:
        raise
    except FileNotFoundError as error:
        raise NotFoundError(f"{url}: no such object") from error
    except (IsADirectoryError, NotADirectoryError) as error:
        raise NotFoundError(f"{url}: not an object ({error.strerror})") from error
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "run the same command again: it resumes")
        raise StorageError(f"{url}: {error.strerror or error}", hint=hint) from error
