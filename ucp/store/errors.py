"""Lower-layer exceptions become ucp's own, with the object's URL in the message."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from ucp.errors import ConflictError, NotFoundError, StorageError, UcpError
from ucp.store.traffic import TRAFFIC

_HINTS = {
    errno.ENOSPC: "free some space and run the same command again: it resumes",
    errno.EDQUOT: "raise the quota and run the same command again: it resumes",
    errno.EACCES: "check the permissions of this path",
    errno.EPERM: "check the permissions of this path",
    errno.EROFS: "the file system is read-only; choose another destination",
}


def scheme_of(url: str) -> str:
    """The scheme of a URL; ``file`` for a path."""
    scheme, sign, _ = url.partition("://")
    return scheme.rpartition("::")[2] if sign else "file"


def without_secrets(url: str) -> str:
    """`url` as it may be printed: ``***`` for user and password, and for the query, where signatures are."""
    shown = re.sub(r"://[^/]*@", "://***@", url)
    return re.sub(r"\?.*", "?***", shown) if "://" in url else shown


@contextmanager
def translated(url: str, op: str = "") -> Iterator[None]:
    """Turn an OSError raised inside into NotFoundError or StorageError that names `url`.

    With `op` it is counted: that there is no such object as an answered request, a StorageError as a failed one.
    """
    try:
        yield
    except UcpError:
        raise
    except FileNotFoundError as error:
        if op:
            TRAFFIC.request(scheme_of(url), op)
        raise NotFoundError(f"{url}: no such object") from error
    except (IsADirectoryError, NotADirectoryError) as error:
        raise NotFoundError(f"{url}: not an object ({error.strerror})") from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):  # a name from a file can be one that nothing can have
            raise NotFoundError(f"{url:.300}: no such object ({error.strerror})") from error
        if op:
            TRAFFIC.failed(scheme_of(url), op)
        hint = _HINTS.get(error.errno or 0, "run the same command again: it resumes")
        raise StorageError(f"{url}: {error.strerror or error}", hint=hint) from error


def exists_already(name: str) -> ConflictError:
    """What `put` raises where something is there that should not be."""
    return ConflictError(f"{name}: already exists", hint="another writer was first; choose another destination")


def replaced_meanwhile(name: str) -> ConflictError:
    """What `put` raises where something else is there than what was to be replaced, or nothing any more."""
    return ConflictError(
        f"{name}: was changed or removed by another writer", hint="look at what is there now, and try again"
    )
