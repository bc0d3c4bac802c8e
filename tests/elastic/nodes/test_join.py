"""Ranks find each other's folders, and the URL means them from then on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.elastic.nodes import jobs
from tests.support.gloo import spawn
from ucp.elastic.nodes import NodeFolder, join
from ucp.errors import UsageError
from ucp.store import open_store


def test_ranks_save_to_the_nodes_and_load_from_them(tmp_path: Path) -> None:
    found = spawn(jobs.join_two_per_node, 4, str(tmp_path))
    assert [one["leads"] for one in found] == [True, False, True, False]
    assert found[0]["nodes"] == ("n0", "n1")
    assert found[3]["targets"] == ("n1", "n0")
    assert all(one["right"] for one in found)
    assert all(set(map(tuple, one["holders"].values())) == {("n0", "n1")} for one in found)
    assert all(one["room"] > 0 for one in found)
    assert any(path.endswith("ucp.json") for path in found[0]["holders"])
    assert os.listdir(tmp_path) == [], "the last one to leave takes the folders along"


def test_the_folder_of_a_node_that_only_spare_ranks_are_on_is_looked_after(tmp_path: Path) -> None:
    """What is old or of a history that was given up is removed there, what is damaged is found, and made again."""
    spare = tmp_path / f"ucp-{os.geteuid()}" / "job" / "n2"
    for path in (spare.parent.parent, spare.parent, spare):
        path.mkdir(mode=0o700)
    NodeFolder(str(spare)).put("e00001/step-00000009/shards/rank-0-x.bin", b"given up")
    first, second, _ = spawn(jobs.save_beside_a_spare_node, 3, str(tmp_path))
    for one in (first, second):
        assert one["begun"] == ["run.json"], "which says whose the folder is now"
        assert one["kept"] == ["step-00000003/"]
        assert one["holders"] == ("n0", "n1")
        assert one["again"] == ("n0", "n1", "n2")
    assert len(first["bad"]) + len(second["bad"]) == 1
    assert [first["healed"], second["healed"]].count(True) == 1


def test_two_machines_of_one_name_are_told(tmp_path: Path) -> None:
    told = spawn(jobs.join_by_one_name, 2, str(tmp_path))
    assert all("'same'" in one for one in told)


def test_a_folder_that_others_may_write_is_refused_everywhere(tmp_path: Path) -> None:
    told = spawn(jobs.join_where_one_may_not, 2, str(tmp_path))
    assert all("not a folder of this user alone" in one for one in told)


def test_one_process_is_one_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setenv("UCP_NODE", "only")
    store = join(str(tmp_path), "job", copies=2)
    assert store.nodes == ("only",)
    assert "2 copies are asked for" in caplog.text
    open_store("nodes://memory/e00001").put("a", b"1")
    assert store.read("e00001/a") == b"1"
    assert Path(store.folder.root, "e00001", "a").read_bytes() == b"1"
    again = join(str(tmp_path), "job", copies=1)
    assert open_store("nodes://memory/").read("e00001/a") == b"1"
    again.leave()
    with pytest.raises(UsageError, match="joined no nodes"):
        open_store("nodes://memory/e00001")
    store.leave()


def test_what_killed_writers_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCP_NODE", "only")
    store = join(str(tmp_path), "job", copies=1)
    store.create("a", 1 << 20).write_at(0, b"half")
    left = [name for _, _, names in os.walk(store.folder.top) for name in names]
    assert len(left) == 1
    assert list(store.entries()) == []
    again = join(str(tmp_path), "job", copies=1)
    assert not [name for _, _, names in os.walk(store.folder.top) for name in names]
    again.leave()
