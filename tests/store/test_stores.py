from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap
import uuid

import pytest

from ucp.errors import ConflictError, StorageError, UsageError
from ucp.store import LocalStore, open_store
from ucp.testing.stores import StoreConformance


class TestLocal(StoreConformance):
    @pytest.fixture
    def store(self, tmp_path):
        return open_store(str(tmp_path / "root"))

    def test_file_urls(self, store):
        store.put("a", b"1")
        assert open_store(f"file://{store.url}").read("a") == b"1"

    def test_more_files_than_are_kept_open(self, store):
        for number in range(100):
            store.put(f"{number}", b"%d" % number)
        for _ in range(2):
            assert [store.read(f"{number}") for number in range(100)] == [b"%d" % number for number in range(100)]

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

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_no_permission(self, tmp_path):
        folder = tmp_path / "closed"
        folder.mkdir(mode=0o500)
        with pytest.raises(StorageError, match="closed"):
            open_store(str(folder)).put("a", b"")


class TestMemory(StoreConformance):
    @pytest.fixture
    def store(self):
        return open_store(f"memory://{uuid.uuid4()}/root")


def test_an_unknown_protocol_is_a_usage_error():
    with pytest.raises(UsageError, match="nonesuch"):
        open_store("nonesuch://bucket/x")


def test_descriptors_are_closed(tmp_path):
    store = open_store(str(tmp_path))
    for number in range(80):
        store.put(f"{number}", b"x")
    store.close()
    before = len(os.listdir("/proc/self/fd"))
    for number in range(80):
        store.read(f"{number}")
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 64
