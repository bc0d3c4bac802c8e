"""What lies on the server in the end, seen by another client."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from multiprocessing import get_context

import pytest

from ucp.errors import ConflictError, StorageError, UcpError
from ucp.store import open_store
from ucp.store.traffic import TRAFFIC

LARGE = random.Random(7).randbytes((19 << 20) + 5)


def uploads(bucket):
    return list(bucket.multipart_uploads.all())


@pytest.mark.parametrize("name", ["ünï/ço dé", "x%2Fy", "100%", "a#b?c", "[1]*", "a+b&c=d", "日本", "a\\b", "~ ' \" |"])
def test_keys_are_the_names(store, bucket, prefix, name):
    with store.create(name, 3) as writer:
        writer.write_at(0, b"abc")
    assert [found.key for found in bucket.objects.filter(Prefix=prefix)] == [f"{prefix}/{name}"]


def test_keys_of_others_are_found(store, bucket, prefix):
    bucket.put_object(Key=f"{prefix}/a b/%2e#", Body=b"xyz")
    assert store.read("a b/%2e#") == b"xyz"
    assert store.children() == ["a b/"]


def test_folders_of_a_console_are_no_objects(store, bucket, prefix):
    for key in ("a/", "a/b", "c/"):
        bucket.put_object(Key=f"{prefix}/{key}", Body=b"")
    assert [entry.path for entry in store.entries()] == ["a/b"]
    assert store.children() == ["a/", "c/"]
    assert store.children("a") == ["b"]
    assert not store.exists("a")


def test_lists_are_paged_and_sorted(store, bucket, prefix):
    names = [f"{number:04}" for number in range(1003)]
    for name in names:
        bucket.put_object(Key=f"{prefix}/{name}", Body=b"1")
    assert [entry.path for entry in store.entries()] == names
    assert store.children() == names


class TestLargeObjects:
    def test_parts_come_together(self, store, bucket):
        before = TRAFFIC.snapshot()
        with store.create("large", len(LARGE)) as writer:
            for at in range(0, len(LARGE), 3 << 20):
                block = bytearray(LARGE[at : at + (3 << 20)])
                writer.write_at(at, block)
                block[:] = bytes(len(block))  # a caller may use its buffer again
                assert not store.exists("large")
        assert store.read("large") == LARGE
        assert not uploads(bucket)
        assert TRAFFIC.snapshot().since(before).requests["s3", "part"].written == len(LARGE)

    @pytest.mark.parametrize("written", [0, 5 << 20, 18 << 20])
    def test_one_given_up_leaves_nothing(self, store, bucket, written):
        writer = store.create("large", len(LARGE))
        writer.write_at(0, LARGE[:written])
        writer.abort()
        writer.abort()
        assert not uploads(bucket)
        assert not store.exists("large")

    @pytest.mark.parametrize("size", [4, 9 << 20])
    def test_one_that_is_too_short_or_too_long_is_none(self, store, bucket, size):
        with pytest.raises(StorageError, match="written of"), store.create("x", size) as writer:
            writer.write_at(0, bytes(size - 1))
        with pytest.raises(StorageError, match="written of"), store.create("x", size) as writer:
            writer.write_at(0, bytes(size + 1))
        assert not uploads(bucket)
        assert not store.exists("x")

    def test_a_server_that_refuses_is_told_while_writing(self, s3):
        store = open_store("s3://no-such-bucket/x", attempts=1)
        part = bytes(8 << 20)

        def write():
            with store.create("large", 25 * len(part)) as writer:
                for number in range(25):
                    writer.write_at(number * len(part), part)

        with pytest.raises(UcpError, match="no such bucket"):
            write()


def test_small_reads_are_one_request_and_neighbours_too(store):
    store.put("a", LARGE[: 1 << 20])
    before = TRAFFIC.snapshot()
    assert store.read("a") == LARGE[: 1 << 20]
    buffers = [memoryview(bytearray(100)) for _ in range(50)]
    store.read_ranges("a", [(number * 8000, buffer) for number, buffer in enumerate(buffers)])
    runs = memoryview(bytearray(5000))
    store.read_runs("a", range(0, 400_000, 8000), 100, runs)
    counted = TRAFFIC.snapshot().since(before).requests
    assert {key: row.count for key, row in counted.items()} == {("s3", "get"): 3}
    assert b"".join(buffers) == runs == b"".join(LARGE[at : at + 100] for at in range(0, 400_000, 8000))


def test_a_condition_is_the_fingerprint(store):
    store.put("a", b"1")
    seen = store.entry("a").fingerprint
    assert seen == next(store.entries("a")).fingerprint
    store.put("a", b"2", if_match=seen)
    for path in ("a", "gone"):
        with pytest.raises(ConflictError):
            store.put(path, b"3", if_match=seen)
    assert store.read("a") == b"2"


def _ask(url, queue, credentials):
    os.environ.update(credentials)  # a server that forks for us may have started before they were set
    try:
        queue.put(open_store(url).read("a"))
    except UcpError as error:
        queue.put(f"{error} {error.hint}")


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_other_processes(store, method):
    """The client's threads do not survive a fork: a forked process is told so, and does not hang."""
    store.put("a", b"1")
    context = get_context(method)
    queue = context.Queue()
    process = context.Process(target=_ask, args=(store.url, queue, dict(os.environ)))
    process.start()
    answer = queue.get(timeout=60)
    process.join()
    if method == "fork":
        assert "forkserver" in answer
    else:
        assert answer == b"1"


def test_a_process_that_forks_before_may_ask_afterwards(store):
    store.put("a", b"1")
    program = f"""
import os
from ucp.store import open_store
store = open_store({store.url!r})
child = os.fork()
data = store.read("a")
assert data == b"1"
if child:
    assert os.waitpid(child, 0)[1] == 0
else:
    os._exit(0)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_the_client_is_loaded_at_first_use():
    program = "import sys, ucp.store as s; s.open_store('s3://b/x').child('y'); s.open_store('https://h/x'); "
    check = "assert not {'obstore', 'botocore', 'asyncio'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program + check], check=True)
