"""Files of ranks that hold the same pickle: it is run once, and each file's tensors are its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.container.torchfiles import same, save, tensors
from ucp.container import torchfile
from ucp.container.torchfile import TorchFiles, read_torch_file
from ucp.container.unpickle import unpickle
from ucp.errors import CorruptError
from ucp.store import LocalStore


def model(rank: int) -> dict[str, Any]:
    flat = torch.arange(40.0) + rank
    return {
        "tensors": {str(key): value for key, value in tensors().items()},
        "views": (flat[3:13].view(2, 5), [flat[13:40].view(3, 9).t()]),
        "placeholders": {name: torch.empty(0) for name in "abc"},
        "parameter": torch.nn.Parameter(torch.full((3,), float(rank))),
        "plain": {"steps": [1, 2.5, None], "text": "x" * 30},
    }


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose pickle was run."""
    done: list[str] = []

    def counted(data: bytes, *, where: str, persistent: Any) -> Any:
        done.append(where.rpartition("/")[2])
        return unpickle(data, where=where, persistent=persistent)

    monkeypatch.setattr(torchfile, "unpickle", counted)
    return done


def test_each_file_has_its_own_tensors(tmp_path: Path, runs: list[str]) -> None:
    # Names of other lengths move everything inside the zip: torch puts the file's name before each record's.
    paths = [save(tmp_path / f"{'rank' * (rank + 1)}{rank}.pt", model(rank)) for rank in range(4)]
    store = LocalStore(str(tmp_path))
    files = TorchFiles(store)
    found = [files.read(path.name) for path in paths]
    for path, file in zip(paths, found, strict=True):
        alone = read_torch_file(store, path.name)
        assert file.checksums == alone.checksums
        same(store, file.root, torch.load(path, weights_only=False))
    assert runs == [paths[0].name, *(path.name for path in paths)]
    assert found[0].root["plain"] is found[3].root["plain"]
    assert found[0].root["placeholders"] is found[3].root["placeholders"]


def test_another_pickle_is_run(tmp_path: Path, runs: list[str]) -> None:
    save(tmp_path / "a.pt", {"step": 1})
    save(tmp_path / "b.pt", {"step": 2})
    files = TorchFiles(LocalStore(str(tmp_path)))
    assert [files.read(name).root["step"] for name in ("a.pt", "b.pt")] == [1, 2]
    assert runs == ["a.pt", "b.pt"]


def test_storages_of_other_sizes_are_noticed(tmp_path: Path) -> None:
    """A damaged directory is no less noticed in the second file of a kind than in the first."""
    paths = [save(tmp_path / f"{name}.pt", {"w": torch.arange(20.0)}) for name in "ab"]
    data = bytearray(paths[1].read_bytes())
    entry = data.rindex(b"b/data/0") - 46
    for at in (entry + 20, entry + 24):
        data[at : at + 4] = (76).to_bytes(4, "little")
    paths[1].write_bytes(data)
    files = TorchFiles(LocalStore(str(tmp_path)))
    files.read("a.pt")
    with pytest.raises(CorruptError, match=r"b\.pt"):
        files.read("b.pt")
