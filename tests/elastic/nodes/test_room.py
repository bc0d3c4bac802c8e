"""How much can be written before somebody is killed for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ucp.elastic.nodes import room
from ucp.errors import NotFoundError

GIB = 1 << 30


def group(path: Path, most: str, current: int, cached: int = 0) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "memory.max").write_text(f"{most}\n")
    (path / "memory.current").write_text(f"{current}\n")
    (path / "memory.stat").write_text(f"anon 7\nactive_file {cached}\ninactive_file 1\nslab_reclaimable 2\n")


def test_the_tightest_control_group_decides(tmp_path: Path) -> None:
    """Those around count as well; files that are cached make way."""
    table = tmp_path / "cgroup"
    table.write_text("12:devices:/x\n0::/pod/job\n")
    group(tmp_path / "fs" / "pod" / "job", "max", 5 * GIB)
    group(tmp_path / "fs" / "pod", str(16 * GIB), 15 * GIB, 9 * GIB)
    found = room._left_in_group(str(table), str(tmp_path / "fs"))
    assert found == [10 * GIB + 3]
    group(tmp_path / "fs", str(6 * GIB), 5 * GIB)
    assert min(room._left_in_group(str(table), str(tmp_path / "fs"))) == GIB + 3


def test_groups_of_the_first_version_count_too(tmp_path: Path) -> None:
    """Beside those of the second, which may be mounted without the controller; a container sees its own as the top."""
    table = tmp_path / "cgroup"
    table.write_text("12:devices:/x\n4:memory:/pod\n0::/\n")
    for path, most, taken in (("pod", 16 * GIB, 15 * GIB), ("", 1 << 62, 17 * GIB)):
        folder = tmp_path / "fs" / "memory" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.limit_in_bytes").write_text(f"{most}\n")
        (folder / "memory.usage_in_bytes").write_text(f"{taken}\n")
        (folder / "memory.stat").write_text(f"total_active_file {GIB}\ntotal_inactive_file {GIB}\nactive_file 7\n")
    assert min(room._left_in_group(str(table), str(tmp_path / "fs"))) == 3 * GIB
    table.write_text("4:cpu,memory:/elsewhere\n")
    assert room._left_in_group(str(table), str(tmp_path / "fs")) == [(1 << 62) - 15 * GIB]


@pytest.mark.parametrize("text", ["", "0::/\n", "3:memory:/x\n"])
def test_where_nothing_tells_there_is_no_limit(tmp_path: Path, text: str) -> None:
    (tmp_path / "cgroup").write_text(text)
    assert room._left_in_group(str(tmp_path / "cgroup"), str(tmp_path / "fs")) == []
    assert room._left_in_group(str(tmp_path / "missing"), str(tmp_path / "fs")) == []


def test_of_a_file_system_in_memory_no_more_than_the_machine_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = os.statvfs(tmp_path)
    monkeypatch.setattr(room, "_available", lambda: [123])
    monkeypatch.setattr(room, "_kind", lambda major, minor: "ext4")
    assert room.room_of(str(tmp_path)) == pytest.approx(disk.f_bavail * disk.f_frsize, rel=0.1)
    monkeypatch.setattr(room, "_kind", lambda major, minor: "tmpfs")
    assert room.room_of(str(tmp_path)) == 123
    monkeypatch.setattr(room, "_left_in_group", lambda: [-5])
    assert room.room_of(str(tmp_path)) == 0


def test_this_machine_tells() -> None:
    device = os.stat("/proc").st_dev
    assert room._kind(os.major(device), os.minor(device)) == "proc"
    assert room._available()[0] > 0
    with pytest.raises(NotFoundError):
        room.room_of("/nothing/here")
