"""Folders for one user alone, in places such as ``/dev/shm`` where everybody can make some.

Jobs of a user share the upper ones, and each removes those that are empty when it ends: they may go, and come, at any
moment while another job begins.
"""

from __future__ import annotations

import os
import random
import stat
import time
from contextlib import suppress

from ucp.errors import UnsafeError
from ucp.store.errors import translated

_TRIES, _PAUSE = 100, 1e-4


def private_folder(root: str, *names: str) -> str:
    """The folder ``<root>/<names>``, of which all but the `root` are made for this user alone, if they are not there.

    UnsafeError where one of them is a link, another user's, or one in which others could have made something.
    """
    top = os.path.abspath(root)
    parts = [os.path.join(top, *names[: count + 1]) for count in range(len(names))]
    with translated(parts[-1]):
        for tries in range(_TRIES):
            time.sleep(random.random() * tries * _PAUSE)  # two that do it in step would do so for long
            with suppress(FileNotFoundError):
                os.makedirs(top, exist_ok=True)
                for part in parts:
                    _make(part)
                return parts[-1]
        raise FileNotFoundError(parts[-1])


def _make(path: str) -> None:
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
    info = os.lstat(path)
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o022:
        raise UnsafeError(
            f"{path}: is not a folder of this user alone", hint="find out who made it, and remove it or choose another"
        )
    if info.st_mode & 0o055:
        _close(path)


def _close(path: str) -> None:
    """Others could look into it, but not write, nor put another in its place, as it is of this user."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchmod(fd, 0o700)
    finally:
        os.close(fd)
