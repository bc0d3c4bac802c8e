"""Conversions of a real checkpoint where storage fails, is forbidden or changes: an error with its exit code, nothing
that is taken for a checkpoint, and the same command ends equal to a run that was never disturbed."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.converters.deepspeed.fake import Fake, write
from tests.real.hostile import ROOT, contents, digests, no_checkpoint, refused, ucp
from tests.support.cases import CASES
from ucp.checkpoint import open_checkpoint
from ucp.errors import CorruptError, FitError, NotFoundError, StorageError, UsageError
from ucp.run.convert import convert
from ucp.run.progress import Progress

FAMILIES = ["universal", "deepspeed-universal"]
MODEL = "mp_rank_00_model_states.pt"

SLOW = """
import sys, time
from ucp.store import LocalStore
from ucp.cli import main
create = LocalStore.create
def slow(self, path, size):
    time.sleep(0.2)
    return create(self, path, size)
LocalStore.create = slow
sys.argv[0] = "ucp"
main()
"""


@pytest.fixture(scope="module")
def kept(deepspeed_case) -> Path:
    return deepspeed_case(CASES["z1_bf16_dp4"]) / "ckpt"


@pytest.fixture
def source(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "source"))


@pytest.fixture(scope="module")
def expected(kept: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    for family in FAMILIES:
        convert(str(kept), str(folder / family), to=family)
    return {family: contents(folder / family) for family in FAMILIES}


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a small file system in memory; skips where this is not allowed."""
    mounted: list[Path] = []

    def make(options: str) -> Path:
        there = tmp_path / "mounted"
        there.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(there)]
        if sys.platform != "linux" or shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
            pytest.skip("needs to mount a small file system, which takes root on Linux")
        mounted.append(there)
        return there

    yield make
    for there in mounted:
        subprocess.run(["umount", str(there)], check=True)


def remount(there: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(there)], check=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", ["8k", "64k", "200k", "440k"])
def test_a_full_disk(source, expected, mount, family, size) -> None:
    """440k has room for all but the last few objects."""
    before = digests(source)
    there = mount(f"size={size}")
    destination = there / "new"
    error = ucp("convert", source, destination, "--to", family, exit_code=StorageError.exit_code)
    assert "No space left" in error
    assert "resumes" in error
    no_checkpoint(destination)
    remount(there, "size=8m")
    ucp("convert", source, destination, "--to", family)
    assert contents(destination) == expected[family]
    assert digests(source) == before


def test_a_limit_on_the_size_of_files(source, expected, tmp_path) -> None:
    """As a full disk, without being root: no file may be larger than a page."""
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
    limited = limit + "import sys; sys.argv[0] = 'ucp'; from ucp.cli import main; main()"
    error = ucp("convert", source, tmp_path / "new", program=limited, exit_code=StorageError.exit_code)
    assert "resumes" in error
    no_checkpoint(tmp_path / "new")
    ucp("convert", source, tmp_path / "new")
    assert contents(tmp_path / "new") == expected["universal"]


def test_a_read_only_destination(source, mount) -> None:
    there = mount("size=1m")
    remount(there, "ro")
    before = digests(source)
    error = ucp("convert", source, there / "new", exit_code=StorageError.exit_code)
    assert "ead-only" in error
    assert str(there / "new") in error
    assert digests(source) == before


def unprivileged() -> None:
    """Give up what lets root pass by the permissions of files."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        assert ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) == 0  # PR_CAPBSET_DROP


def test_a_destination_that_may_not_be_written(source, tmp_path) -> None:
    there = tmp_path / "closed"
    there.mkdir(mode=0o500)
    options = {"preexec_fn": unprivileged} if os.geteuid() == 0 else {}
    error = ucp("convert", source, there / "new", exit_code=StorageError.exit_code, **options)
    assert "ermission" in error
    assert str(there) in error
    assert digests(there) == {}


@pytest.mark.parametrize("name", [MODEL, "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt", ""])
def test_a_source_that_may_not_be_read(source, tmp_path, name) -> None:
    (folder,) = source.glob("global_step*")
    closed, mode = folder / name, (folder / name).stat().st_mode
    closed.chmod(0)
    options = {"preexec_fn": unprivileged} if os.geteuid() == 0 else {}
    try:
        error = ucp("convert", source, tmp_path / "new", exit_code=StorageError.exit_code, **options)
    finally:
        closed.chmod(mode)
    assert str(closed) in error
    assert "ermission" in error
    no_checkpoint(tmp_path / "new")


@pytest.mark.parametrize("inside", ["new", "global_step3/new", "."])
def test_a_destination_inside_the_source(source, inside) -> None:
    before = digests(source)
    for family in FAMILIES:
        error = ucp("convert", source, source / inside, "--to", family, exit_code=UsageError.exit_code)
        assert "overlap" in error
    assert digests(source) == before


def test_a_source_inside_the_destination(source, tmp_path) -> None:
    before = digests(tmp_path)
    assert "overlap" in ucp("convert", source, tmp_path, exit_code=UsageError.exit_code)
    assert digests(tmp_path) == before


@pytest.mark.parametrize("linked", ["source", "destination", "parent"])
def test_source_and_destination_that_are_one_through_a_link(source, tmp_path, linked) -> None:
    before, link = digests(source), tmp_path / "link"
    link.symlink_to(tmp_path if linked == "parent" else source)
    here, there = (link, source) if linked == "source" else (source, link / source.name if linked == "parent" else link)
    assert "overlap" in ucp("convert", here, there, exit_code=UsageError.exit_code)
    assert digests(source) == before


@pytest.mark.parametrize("change", ["touched", "rewritten", "truncated", "deleted"])
def test_a_source_that_changes_meanwhile(source, tmp_path, change) -> None:
    path = max(source.glob("*/*rank_3*"))

    def disturb(progress: Progress) -> None:
        if progress.objects_done != 3:
            return
        data = path.read_bytes()
        if change == "touched":
            os.utime(path)
        elif change == "deleted":
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(data if change == "rewritten" else data[:9000])

    kinds = (CorruptError, NotFoundError)
    with pytest.raises(kinds) as caught:
        convert(str(source), str(tmp_path / "new"), workers=1, on_progress=disturb)
    assert path.name in str(caught.value)
    no_checkpoint(tmp_path / "new")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stopped_conversion_resumes(source, expected, tmp_path, family, number) -> None:
    before, there = digests(source), tmp_path / "new"
    command = [sys.executable, "-c", SLOW, "convert", str(source), str(there), "--to", family]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    deadline = time.monotonic() + 60
    while sum(path.is_file() for path in there.rglob("*")) < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "resumes" in error
    no_checkpoint(there)
    ucp("convert", source, there, "--to", family)
    assert contents(there) == expected[family]
    assert digests(source) == before


ESCAPES = {
    "upwards": "../../x",
    "upwards below": "a/../../x",
    "absolute": "/tmp/ucp-escaped",
    "NUL": "a\0b",
    "very long": "w" * 5000,
    "empty": "",
    "dot": ".",
    "device": "con",
    "control characters": "a\x1b[2Jb\n",
    "surrogate": "a\ud800",
    "root": "zarr.json",
}


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_names_that_try_to_leave_the_destination(tmp_path, family, name) -> None:
    """Either the name is held inside, and comes back the same, or the conversion is refused."""
    hostile, source, there = ESCAPES[name], tmp_path / "a" / "source", tmp_path / "a" / "new"
    written = write(Fake([{hostile: (3, 4), "v": (5,)}]), source)
    before, outside = digests(tmp_path), set(Path("/tmp").glob("ucp-escaped*"))
    try:
        convert(str(source), str(there), to=family)
    except FitError:
        no_checkpoint(there)
    else:
        with open_checkpoint(str(there)) as found:
            assert torch.equal(found[hostile]["exp_avg"][...], written.states[hostile]["exp_avg"])
    made = {path for path in digests(tmp_path) if path not in before}
    assert all(path.startswith("a/new") for path in made), made
    assert not set(Path("/tmp").glob("ucp-escaped*")) - outside


@pytest.mark.parametrize("family", FAMILIES)
def test_names_that_differ_by_case_alone(tmp_path, family) -> None:
    written = write(Fake([{"Norm.w": (3, 4), "norm.w": (3, 4), "NORM.W": (4,)}]), tmp_path / "source")
    convert(str(tmp_path / "source"), str(tmp_path / "new"), to=family)
    with open_checkpoint(str(tmp_path / "new")) as found:
        for name, states in written.states.items():
            assert torch.equal(found[name]["exp_avg"][...], states["exp_avg"])
    if family == "universal":
        paths = [path.lower() for path in digests(tmp_path / "new")]
        assert len(set(paths)) == len(paths), "on a file system that ignores case they would be one"


def test_a_destination_that_holds_something_else(source, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    before = digests(tmp_path)
    assert "not empty" in ucp("convert", source, tmp_path / "mine", exit_code=UsageError.exit_code)
    file = tmp_path / "mine" / "thesis.tex"
    ucp("convert", source, file, exit_code=UsageError.exit_code)
    assert digests(tmp_path) == before


def test_a_link_to_a_file_elsewhere_is_a_file_like_any_other(source, tmp_path) -> None:
    """Checkpoints of deduplicating stores are folders of links; a dangling one is a missing file."""
    path = max(source.glob("*/*rank_1*optim*"))
    moved = tmp_path / "moved.pt"
    path.rename(moved)
    path.symlink_to(moved)
    open_checkpoint(str(source)).close()
    moved.unlink()
    refused(source, NotFoundError, path.name, folder=tmp_path)
