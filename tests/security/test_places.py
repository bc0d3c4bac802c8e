"""A source is never written to, however its place is spelt, and links lead nowhere that was not asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import ucp
from tests.real.hostile import digests
from tests.security.folders import copied
from ucp.errors import NotFoundError, UcpError, UsageError
from ucp.store import open_store


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A universal checkpoint, which is the form that can be replaced."""
    return copied("universal", tmp_path)


def linked(source: Path) -> str:
    link = source.parent / "link"
    link.symlink_to(source)
    return str(link)


def linked_parent(source: Path) -> str:
    link = source.parent / "up"
    link.symlink_to(source.parent)
    return str(link / source.name / "inside")


SPELLINGS: dict[str, Callable[[Path], str]] = {
    "itself": str,
    "with a slash": lambda source: f"{source}/",
    "with two slashes": lambda source: str(source).replace("/", "//"),
    "with dots": lambda source: f"{source.parent}/./x/../{source.name}",
    "as a URL": lambda source: f"file://{source}",
    "as a URL of two schemes": lambda source: f"local://{source}",
    "through a link": linked,
    "a folder in it": lambda source: str(source / "tensors" / "new"),
    "a folder in it, through a link": linked_parent,
    "the folder around it": lambda source: str(source.parent),
    "relative": os.path.relpath,
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_destination_that_is_the_source(source: Path, spelling: str, overwrite: bool) -> None:
    there = SPELLINGS[spelling](source)
    before = digests(source.parent)
    with pytest.raises(UsageError, match="overlap"):
        ucp.convert(str(source), there, overwrite=overwrite)
    assert digests(source.parent) == before


def test_a_folder_that_is_the_same_by_another_name(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on file systems that ignore case, or spell names otherwise: the system tells which folders are one."""
    other = source.parent / "SOURCE"
    stat = os.stat

    def ignoring_case(path, *args, **options):
        return stat(str(path).replace("SOURCE", "source") if isinstance(path, str | Path) else path, *args, **options)

    monkeypatch.setattr(os, "stat", ignoring_case)
    for there in (other, other / "inside"):
        assert open_store(str(source)).overlaps(open_store(str(there)))
        assert open_store(str(there)).overlaps(open_store(str(source)))
    assert not open_store(str(source)).overlaps(open_store(str(source.parent / "elsewhere")))


def test_a_destination_with_a_link_in_its_place(source: Path, tmp_path: Path) -> None:
    """The destination's own path is the user's word; what lies at the link's end must be empty as well."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    before = digests(tmp_path)
    with pytest.raises(UsageError, match="not empty"):
        ucp.convert(str(source), str(tmp_path / "link"))
    assert digests(tmp_path) == before


def test_a_link_that_leads_to_itself(source: Path) -> None:
    (source / "digests.bin").unlink()
    (source / "digests.bin").symlink_to("digests.bin")
    with pytest.raises(UcpError, match="symbolic links"):
        ucp.open(str(source))


def test_links_around_in_a_circle(source: Path) -> None:
    (source / "tensors" / "around").symlink_to(source)
    with ucp.open(str(source)) as found:
        assert len(list(found)) > 3


def test_a_pipe_is_no_file(source: Path) -> None:
    """Opening one would wait for ever."""
    (source / "state.json").unlink()
    os.mkfifo(source / "state.json")
    with pytest.raises(UcpError, match=r"state\.json"):
        ucp.open(str(source))


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "a\0b"])
def test_stores_do_not_lead_outside(tmp_path: Path, path: str) -> None:
    store = open_store(str(tmp_path / "root"))
    for act in (store.entry, store.read, store.child, store.delete, lambda p: store.put(p, b"x")):
        with pytest.raises(UsageError, match="not a path inside"):
            act(path)
    assert not list(tmp_path.iterdir())


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    for path in ("a" * 5000, "/".join(["a" * 250] * 40)):
        with pytest.raises(NotFoundError):
            open_store(str(tmp_path)).read(path)
