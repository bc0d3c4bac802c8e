"""A local folder that others write and empty at the same time, as watchers and collectors do."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from ucp.store import open_store

ROUNDS = 300


def test_folders_that_others_remove_while_they_are_empty(tmp_path):
    """Each removes the folder with its last file, when others are about to write there."""
    store, over = open_store(str(tmp_path)), threading.Event()

    def removes():
        while not over.is_set():
            store._prune(str(tmp_path / "a" / "b"))
            time.sleep(random.random() * 1e-3)  # else it would leave the other thread no moment at all

    with ThreadPoolExecutor(1) as pool:
        removing = pool.submit(removes)
        try:
            for number in range(ROUNDS):
                store.put("a/b/x", b"x", durable=False)
                store.delete("a/b/x")
                with store.create("a/b/in-place", 1) as writer:
                    writer.write_at(0, b"x")
                assert store.read("a/b/in-place") == b"x", number
                store.delete("a/b/in-place")
        finally:
            over.set()
        removing.result()


def test_files_that_go_while_they_are_listed(tmp_path):
    store, over = open_store(str(tmp_path)), threading.Event()
    store.put("a/stays", b"x")

    def work(number):
        own = open_store(str(tmp_path))
        while not over.is_set():
            own.put(f"a/{number}", b"x", durable=False)
            own.delete(f"a/{number}")

    with ThreadPoolExecutor(2) as pool:
        working = [pool.submit(work, number) for number in range(2)]
        try:
            for _ in range(ROUNDS):
                assert "a/stays" in [entry.path for entry in store.entries("")]
        finally:
            over.set()
        for one in working:
            one.result()


def test_the_same_file_is_deleted_twice_at_once(tmp_path):
    stores = [open_store(str(tmp_path)) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(ROUNDS):
            stores[0].put("a/x", b"x", durable=False)
            list(pool.map(lambda store: store.delete("a/x"), stores))
    assert list(tmp_path.iterdir()) == []
