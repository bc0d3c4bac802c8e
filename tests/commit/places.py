"""Where checkpoints are written to in these tests: what lies there can be told byte for byte, and put back."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tests.commit.objects import Bucket, ObjectStore
from ucp.store import LocalStore, Store, open_store
from ucp.store.general import FsspecStore
from ucp.testing.faults import Fault, crash

T = TypeVar("T")
State = dict[str, bytes]
"""Contents of every object by path; on a local disk, empty folders too, with a slash at the end."""

_MEMORY = "/dev/shm"


class Place(ABC):
    """A store, and a look behind it."""

    name: str
    store: Store

    def inside(self, work: Callable[[], T]) -> T:
        """Do `work` where the store may be used: here, or in a process of its own."""
        return work()

    @abstractmethod
    def state(self) -> State:
        """All that is there."""

    @abstractmethod
    def put_back(self, state: State) -> None:
        """Make it so that this is there and nothing else."""

    @abstractmethod
    def close(self) -> None:
        """Leave nothing behind."""


class LocalPlace(Place):
    """A folder on a local file system, in memory where there is one: nobody cuts the power in these tests."""

    name = "local"

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ucp-commit-", dir=_MEMORY if os.path.isdir(_MEMORY) else None))
        self.store: Store = LocalStore(str(self.folder))

    def state(self) -> State:
        found: State = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file():
                found[name] = path.read_bytes()
            elif not any(path.iterdir()):
                found[f"{name}/"] = b""
        return found

    def put_back(self, state: State) -> None:
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, data in state.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir() if name.endswith("/") else path.write_bytes(data)
        self.store.close()

    def close(self) -> None:
        shutil.rmtree(self.folder)


class FsspecPlace(LocalPlace):
    """The same folder through fsspec, which knows neither conditions nor locks, and leaves empty folders behind."""

    name = "fsspec"

    def __init__(self) -> None:
        super().__init__()
        self.store = FsspecStore(f"file://{self.folder}")

    def state(self) -> State:
        return {path: data for path, data in super().state().items() if not path.endswith("/")}


class ObjectPlace(Place):
    """A bucket in memory."""

    name = "objects"

    def __init__(self) -> None:
        self.bucket = Bucket().serve()
        self.store = ObjectStore(self.bucket)

    def state(self) -> State:
        self.bucket.settle()
        return {key: data for key, (data, _) in self.bucket.objects.items()}

    def put_back(self, state: State) -> None:
        self.bucket.settle()
        self.bucket.objects.clear()
        for key, data in state.items():
            self.store.put(key, data)

    def close(self) -> None:
        self.bucket.objects.clear()


class ServerPlace(Place):
    """A folder of a real object store. Its clients have threads, which no fork has, so that none is made in here."""

    def __init__(self, name: str, url: str) -> None:
        self.name, self.url = name, url

    @property
    def store(self) -> Store:  # type: ignore[override]
        return open_store(self.url)

    def inside(self, work: Callable[[], T]) -> T:
        with tempfile.TemporaryFile() as file:

            def told(_: Fault) -> None:
                file.write(pickle.dumps(work()))
                file.flush()

            ended = crash(told)
            assert not ended.error, ended.error
            file.seek(0)
            return pickle.load(file)

    def state(self) -> State:
        def look() -> State:
            store = self.store
            return {entry.path: store.read(entry.path) for entry in store.entries()}

        return self.inside(look)

    def put_back(self, state: State) -> None:
        def change() -> None:
            store = self.store
            for entry in store.entries():
                if entry.path not in state:
                    store.delete(entry.path)
            for path, data in state.items():
                store.put(path, data)

        self.inside(change)

    def close(self) -> None:
        self.put_back({})
