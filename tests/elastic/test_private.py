"""Folders for one user alone, which other jobs of his make and remove at the same time."""

from __future__ import annotations

import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ucp.elastic.private import private_folder
from ucp.elastic.timeline import Pulse, prune
from ucp.errors import UnsafeError


def mode(path):
    return path.stat().st_mode & 0o777


def test_all_but_the_root_are_closed_to_others(tmp_path):
    root = tmp_path / "root"
    before = os.umask(0o022)
    try:
        assert private_folder(str(root), "user", "job") == str(root / "user" / "job")
    finally:
        os.umask(before)
    assert [mode(root / name) for name in ("", "user", "user/job")] == [0o755, 0o700, 0o700]


def test_one_that_others_can_look_into_is_closed(tmp_path):
    """As `mkdir -p` makes them: nobody else can have put anything there."""
    (tmp_path / "user" / "job").mkdir(parents=True, mode=0o755)
    private_folder(str(tmp_path), "user", "job")
    assert [mode(tmp_path / name) for name in ("user", "user/job")] == [0o700, 0o700]


@pytest.mark.parametrize("name", ["user", "user/job"])
def test_one_that_others_can_write_to_is_refused(tmp_path, name):
    (tmp_path / "user" / "job").mkdir(parents=True)
    (tmp_path / name).chmod(0o770)
    with pytest.raises(UnsafeError, match=f"/{name}: is not a folder of this user alone"):
        private_folder(str(tmp_path), "user", "job")
    assert mode(tmp_path / name) == 0o770


@pytest.mark.parametrize("what", ["link", "file"])
def test_what_is_no_folder_is_refused(tmp_path, what):
    (tmp_path / "elsewhere").mkdir()
    if what == "link":
        (tmp_path / "user").symlink_to(tmp_path / "elsewhere")
    else:
        (tmp_path / "user").touch()
    with pytest.raises(UnsafeError, match="/user: is not a folder of this user alone"):
        private_folder(str(tmp_path), "user", "job")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_jobs_begin_while_others_end(tmp_path):
    """Who ends removes what is empty, up to the folder of the user; nobody opens it to others by making it again."""
    over, open_ones = threading.Event(), []

    def ends():
        while not over.is_set():
            prune(str(tmp_path / "user" / "another" / "n" / "beats"))
            for name in ("", "/job", "/job/n"):
                try:
                    if os.stat(f"{tmp_path}/user{name}").st_mode & 0o077:
                        open_ones.append(name)
                except FileNotFoundError:
                    continue
            time.sleep(random.random() * 1e-3)  # else it would leave the other thread no moment at all

    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(ends)
        try:
            for epoch in range(300):
                folder = private_folder(str(tmp_path), "user", "job", "n", "beats")
                Pulse(folder, epoch=epoch, rank=0, size=1).close(remove=True)
        finally:
            over.set()
        ending.result()
    assert open_ones == []
