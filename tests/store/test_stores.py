from __future__ import annotations

import errno
import fcntl
import os
import resource
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import pytest

from ucp.errors import ConflictError, NotFoundError, StorageError, UsageError
from ucp.store import LocalStore, open_store
from ucp.testing.stores import StoreConformance


class TestLocal(StoreConformance):
    in_place = True

    @pytest.fixture
    def store(self, tmp_path):
        return open_store(str(tmp_path / "root"))

    def test_file_urls(self, store):
        store.put("a", b"1")
        assert open_store(f"file://{store.url}").read("a") == b"1"

    def test_local_urls_and_home(self, store, monkeypatch):
        store.put("a", b"1")
        assert open_store(f"local://{store.url}").read("a") == b"1"
        monkeypatch.setenv("HOME", str(store.root))
        assert open_store("~").url == store.root
        assert open_store("~/b/").url == f"{store.root}/b"

    @pytest.mark.parametrize("url", ["", "file://", "file:/tmp/x"])
    def test_what_names_no_folder(self, url):
        """An unset variable in a script must not become the current folder."""
        with pytest.raises(UsageError):
            open_store(url)

    def test_links_are_followed_once_and_dangling_ones_passed_over(self, store, tmp_path):
        store.put("a/b", b"12")
        os.symlink(store.root, f"{store.root}/a/loop")
        os.symlink("nothing", f"{store.root}/a/dangling")
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "c").write_bytes(b"345")
        os.symlink(tmp_path / "elsewhere", f"{store.root}/linked")
        assert [(entry.path, entry.size) for entry in store.entries()] == [("a/b", 2), ("linked/c", 3)]

    def test_what_a_killed_put_left_is_tidied(self, store):
        store.put("a/b", b"1")
        os.makedirs(f"{store.root}/x")
        with open(f"{store.root}/x/y.12-34.tmp", "wb"):
            pass
        store.tidy()
        assert store.children() == ["a/"]

    def test_deleting_the_last_object_of_a_folder_deletes_the_folder(self, store):
        store.put("a/b/c", b"1")
        store.put("a/d", b"1")
        store.delete("a/b/c")
        assert store.children("a") == ["d"]
        store.delete("a/d")
        assert store.children() == []
        assert os.path.isdir(store.root)

    def test_more_files_than_are_kept_open(self, store):
        for number in range(100):
            store.put(f"{number}", b"%d" % number)
        for _ in range(2):
            assert [store.read(f"{number}") for number in range(100)] == [b"%d" % number for number in range(100)]

    def test_what_another_process_replaced_is_read_anew(self, store):
        """An open file still has the old bytes, of which the new size would show a part."""
        store.put("a", b"the old one")
        assert store.read("a") == b"the old one"
        LocalStore(store.root).put("a", b"new")
        assert store.read("a") == b"new"

    def test_a_full_disk_is_a_storage_error_with_a_remedy(self, store):
        """A limit on file size is as close to a full disk as a process can bring itself."""
        program = """
            import resource, signal, sys
            from ucp.errors import StorageError
            from ucp.store import open_store
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            try:
                with open_store(sys.argv[1]).create("big", 5000) as writer:
                    writer.write_at(0, bytes(5000))
            except StorageError as error:
                assert "big" in str(error), error
                sys.exit(error.exit_code)
        """
        run = subprocess.run([sys.executable, "-c", textwrap.dedent(program), store.url], check=False)
        assert run.returncode == 7

    def test_two_writers_of_one_folder(self, store):
        with (
            store.exclusive(),
            pytest.raises(ConflictError, match="another process"),
            LocalStore(store.root).exclusive(),
        ):
            pass
        with store.exclusive():
            pass

    @pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
    def test_file_systems_without_locks_and_reservations(self, store, monkeypatch, number):
        """As Lustre without the mount option flock."""

        def refuse(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", refuse)
        monkeypatch.setattr(os, "posix_fallocate", refuse)
        with store.exclusive(), store.create("a", 3) as writer:
            writer.write_at(0, b"abc")
        assert store.read("a") == b"abc"

    def test_a_lock_that_fails_is_a_storage_error(self, store, monkeypatch):
        def fail(*_):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(fcntl, "flock", fail)
        with pytest.raises(StorageError), store.exclusive():
            pass

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_no_permission(self, tmp_path):
        folder = tmp_path / "closed"
        folder.mkdir(mode=0o500)
        with pytest.raises(StorageError, match="closed"):
            open_store(str(folder)).put("a", b"")


class TestMemory(StoreConformance):
    in_place = True

    @pytest.fixture
    def store(self):
        return open_store(f"memory://{uuid.uuid4()}/root")


def test_an_unknown_protocol_is_a_usage_error():
    with pytest.raises(UsageError, match="nonesuch"):
        open_store("nonesuch://bucket/x")


def _open_below(folder):
    """Files below it that this process has open; other threads open and close what they like."""
    links = (os.path.join("/proc/self/fd", number) for number in os.listdir("/proc/self/fd"))
    return [name for link in links if os.path.islink(link) and (name := os.readlink(link)).startswith(str(folder))]


def test_descriptors_are_closed(tmp_path):
    store = open_store(str(tmp_path))
    for number in range(80):
        store.put(f"{number}", b"x")
    store.close()
    for number in range(80):
        store.read(f"{number}", 0, 1)
    assert 0 < len(_open_below(tmp_path)) < 80
    store.close()
    assert not _open_below(tmp_path)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 64


@pytest.mark.parametrize(
    "url", ["memory://me:secret@host/a", "memory://me:se@cret@host/a", "memory://host/a?sig=secret"]
)
def test_credentials_are_used_and_not_shown(url):
    store = open_store(url)
    store.put("b/c", b"1")
    assert "secret" not in store.url + store.child("b").url
    assert "cret" not in store.url
    with pytest.raises(NotFoundError) as caught:
        store.read("nothing")
    assert "cret" not in str(caught.value)
    again = open_store(url)
    assert again.read("b/c") == again.child("b").read("c") == b"1"
    assert not store.overlaps(open_store(url.replace("secret", "other").replace("cret", "other")))


def test_an_unknown_protocol_does_not_show_credentials():
    with pytest.raises(UsageError) as caught:
        open_store("nonsense://me:secret@host/a")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["file://localhost/tmp/x", "FILE:///tmp/x", "file:///tmp/x", "local:///tmp/x"])
def test_spellings_of_a_local_folder(url: str) -> None:
    assert open_store(url).url == "/tmp/x"


@pytest.mark.parametrize("url", ["file://elsewhere/tmp/x", "file://tmp/x", "file://localhost"])
def test_files_of_other_hosts_are_refused(url: str) -> None:
    with pytest.raises(UsageError, match="another host"):
        open_store(url)


def test_schemes_are_of_any_case() -> None:
    assert open_store("S3://bucket/a").url == "s3://bucket/a"
    assert open_store("MEMORY://a").url == "memory://a"


def test_a_chained_url_can_only_be_read(tmp_path: Path) -> None:
    """It ends in a place that nobody would know again by it, such as a source that must not be changed."""
    LocalStore(str(tmp_path)).put("a", b"1")
    chained = open_store(f"simplecache::file://{tmp_path}")
    assert chained.read("a") == b"1"
    for write in (
        lambda: chained.put("b", b""),
        lambda: chained.create("b", 0),
        lambda: chained.replace("a", 0),
        lambda: chained.delete("a"),
    ):
        with pytest.raises(UsageError, match="can only be read"):
            write()
    assert [entry.path for entry in LocalStore(str(tmp_path)).entries()] == ["a"]
    assert chained.overlaps(LocalStore(str(tmp_path))), "nor is what it ends in written when it is the source"
    assert not chained.overlaps(LocalStore(str(tmp_path / "..") + "/other"))
