"""The object store that the other tests write to is one, from forked processes too."""

from __future__ import annotations

import os
import pickle

import pytest

from tests.commit.objects import Bucket, ObjectStore
from ucp.errors import ConflictError
from ucp.store import Store
from ucp.testing.stores import StoreConformance


class TestObjects(StoreConformance):
    @pytest.fixture
    def store(self) -> Store:
        return ObjectStore(Bucket(), "root/")

    def test_stores_cross_process_boundaries(self, store: Store) -> None:
        """Only by a fork."""
        store = ObjectStore(Bucket().serve())
        out, into = os.pipe()
        if os.fork() == 0:
            store.put("a", b"1")
            try:
                store.put("a", b"2", if_absent=True)
            except ConflictError as error:
                os.write(into, pickle.dumps(str(error)))
            os._exit(0)
        assert "already exists" in pickle.loads(os.read(out, 1000))
        os.wait()
        assert store.read("a") == b"1"
