"""Conversions that replace a checkpoint: the old one is there until the new one is, and nothing of it after that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ucp
from ucp.errors import ConflictError, NotFoundError, StorageError, UcpError, UsageError
from ucp.run import commit, convert
from ucp.run.claim import HEAD, claim, claim_of
from ucp.run.convert import carry_out, prepare
from ucp.run.verify import verify
from ucp.store import LocalStore, Store
from ucp.testing.watched import Around


class Lockless(Around):
    """A store that keeps nobody out."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.locks = False

    def exclusive(self):
        return Store.exclusive(self)

    def child(self, path: str) -> Lockless:
        return Lockless(self.inner.child(path))


@pytest.fixture(params=["locks", "no locks"])
def there(request, tmp_path, monkeypatch) -> str:
    if request.param == "no locks":
        monkeypatch.setattr(convert, "open_store", lambda url: Lockless(LocalStore(url)))
    return str(tmp_path / "there")


@pytest.fixture
def sources(tmp_path) -> list[str]:
    """Three checkpoints of the same names and shapes, and so of objects of the same names and sizes."""
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        folder = tmp_path / f"source-{seed}"
        folder.mkdir()
        save_file({f"layer.{n}.weight": torch.randn(6, 5) for n in range(4)}, folder / "model.safetensors")
        found.append(str(folder))
    return found


def weights(url: str) -> dict[str, torch.Tensor]:
    with ucp.open(url) as ckpt:
        return ckpt.state_dict()


def same(a: str, b: str) -> bool:
    x, y = weights(a), weights(b)
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def folders(there: str) -> set[str]:
    return {path.parts[0] for path in map(Path, (entry.path for entry in LocalStore(there).entries()))}


def test_a_checkpoint_is_replaced_only_when_asked(there, sources):
    ucp.convert(sources[0], there)
    with pytest.raises(UsageError, match="already holds another") as refused:
        ucp.convert(sources[1], there)
    assert "--overwrite" in refused.value.hint
    ucp.convert(sources[1], there, overwrite=True)
    assert same(there, sources[1])
    assert ucp.convert(sources[1], there, overwrite=True).already_done
    ucp.convert(sources[2], there, overwrite=True)
    assert same(there, sources[2])


def test_nothing_is_left_of_the_old_one(there, sources):
    ucp.convert(sources[0], there)
    before = {entry.path for entry in LocalStore(there).entries()}
    LocalStore(there).put("notes.txt", b"mine")
    ucp.convert(sources[1], there, overwrite=True)
    after = {entry.path for entry in LocalStore(there).entries()}
    assert before & after == {"zarr.json"}
    assert len(after) == len(before) + 1
    assert "notes.txt" in after


def test_the_same_content_has_the_same_id(there, sources, tmp_path):
    ucp.convert(sources[1], str(tmp_path / "fresh"))
    ucp.convert(sources[0], there)
    ucp.convert(sources[1], there, overwrite=True)
    ids = [ucp.open(url).catalog.source.detail["id"] for url in (there, str(tmp_path / "fresh"))]
    assert ids[0] == ids[1]


def test_zarr_clients_open_what_replaced_another(there, sources):
    zarr = pytest.importorskip("zarr")
    ucp.convert(sources[0], there)
    ucp.convert(sources[1], there, overwrite=True)
    ((name, group),) = zarr.open_group(there, mode="r").groups()
    assert name.startswith("tensors.")
    array = torch.from_numpy(group["layer.2.weight"][0])
    assert torch.equal(array, weights(sources[1])["layer.2.weight"])


def test_until_the_new_root_is_put_the_old_checkpoint_is_whole(there, sources, monkeypatch):
    ucp.convert(sources[0], there)
    monkeypatch.setattr(commit, "_put_root", _stop)
    with pytest.raises(StorageError):
        ucp.convert(sources[1], there, overwrite=True)
    assert same(there, sources[0])
    assert ucp.convert(sources[0], there).already_done
    monkeypatch.undo()
    with pytest.raises(UsageError, match="unfinished"):
        ucp.convert(sources[2], there, overwrite=True)
    ucp.convert(sources[2], there, overwrite=True, restart=True)
    assert same(there, sources[2])
    assert len(folders(there)) == 5, "root, tensors, digests, state, record"


def test_an_overwrite_that_was_cut_short_resumes(there, sources, monkeypatch):
    ucp.convert(sources[0], there)
    monkeypatch.setattr(commit, "_put_root", _stop)
    with pytest.raises(StorageError):
        ucp.convert(sources[1], there, overwrite=True)
    monkeypatch.undo()
    report = ucp.convert(sources[1], there, overwrite=True)
    assert report.resumed_objects == report.objects > 0
    assert same(there, sources[1])
    assert not {path for path in folders(there) if path.startswith(".")}


def test_a_reader_of_the_old_one_is_told(there, sources):
    ucp.convert(sources[0], there)
    old = ucp.open(there)
    ucp.convert(sources[1], there, overwrite=True)
    with pytest.raises(UcpError):
        old.state_dict()


def test_families_that_one_put_cannot_replace_are_refused(sources, tmp_path):
    with pytest.raises(UsageError, match="cannot replace"):
        prepare(sources[0], str(tmp_path / "there"), to="safetensors", overwrite=True)


def test_one_who_took_over_cannot_be_spoilt_by_one_who_goes_on(sources, tmp_path, monkeypatch):
    """A slow writer that everybody took for dead writes on after another has taken over, and after that one is done."""
    monkeypatch.setattr(convert, "open_store", lambda url: Lockless(LocalStore(url)))
    there = str(tmp_path / "there")
    slow = prepare(sources[0], there)

    def overtaken(_: object) -> None:
        if claim_of(LocalStore(there)) is not None and not LocalStore(there).exists("zarr.json"):
            ucp.convert(sources[1], there, restart=True)

    with pytest.raises((ConflictError, StorageError)):
        carry_out(slow, workers=1, on_progress=overtaken)
    assert same(there, sources[1])
    with ucp.open(there) as ckpt:
        assert not verify(ckpt.catalog, ckpt.store, deep=True).findings


def test_of_two_who_begin_together_the_second_is_told(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "open_store", lambda url: Lockless(LocalStore(url)))
    there = str(tmp_path / "there")
    first, second = prepare(sources[0], there), prepare(sources[1], there)
    store = LocalStore(there)
    claim(store, first.wanted.fingerprint)
    with pytest.raises(UsageError, match="unfinished"):
        carry_out(second)
    carry_out(first)
    assert same(there, sources[0])
    with pytest.raises(UsageError, match="already holds"):
        carry_out(second)


def test_a_claim_has_one_holder(tmp_path):
    store = LocalStore(str(tmp_path))
    assert claim_of(store) is None
    mine = claim(store, "a", generation="g")
    assert claim(store, "a").generation == "g", "the same plan is shared"
    with pytest.raises(ConflictError):
        claim(store, "b")
    seen = claim_of(store)
    assert (seen.fingerprint, seen.generation) == (mine.fingerprint, mine.generation)
    claim(store, "b", generation="h", over=seen)
    with pytest.raises(ConflictError):
        claim(store, "c", over=seen)
    store.put(HEAD, b"{")
    assert claim_of(store).fingerprint == ""
    store.delete(HEAD)
    with pytest.raises(ConflictError):
        claim(store, "d", over=seen)
    with pytest.raises(NotFoundError):
        ucp.open(str(tmp_path))


def _stop(*_: object) -> None:
    raise StorageError("stopped before the root")
