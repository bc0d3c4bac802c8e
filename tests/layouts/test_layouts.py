"""Saved in one layout, gone on with in another."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from filelock import FileLock

from tests.layouts.layouts import LAYOUTS
from tests.layouts.results import Saved, folder_name, resumed, saved

ROUNDING = 2e-6
"""Largest relative difference of a loss: layouts sum up in another order."""

VARIED = ("FSDP1 on 3", "FSDP2 2 × TP 2", "EP 2", "PP 2 × FSDP2 2 × TP 2", "ZeRO-1 on 2", "ZeRO-3 on 4")


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of a test run share."""
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if base.name.startswith("popen-") else base) / "layouts"
    place.mkdir(exist_ok=True)
    return place


def source(place: Path, layout: str) -> Saved:
    """What `layout` saved, trained once per test run."""
    record = place / f"{folder_name(layout)}.record"
    with FileLock(f"{record}.lock"):
        if not record.exists():
            record.write_bytes(pickle.dumps(saved(place, layout)))
    found: Saved = pickle.loads(record.read_bytes())
    return found


def check(place: Path, folder: Path, layout: str, names: tuple[str, ...]) -> None:
    sources = {name: source(place, name) for name in names}
    for name, result in resumed(folder, layout, sources).items():
        assert not result.differences, f"{layout} from {name}"
        assert result.drift(sources[name].after) < ROUNDING, f"{layout} from {name}"


def test_goes_on_as_if_never_interrupted(place: Path, tmp_path: Path) -> None:
    """The short one of all the pairs."""
    check(place, tmp_path, "DDP on 2", ("FSDP2 2 × TP 2",))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_goes_on_from_varied_ones(place: Path, tmp_path: Path, layout: str) -> None:
    check(place, tmp_path, layout, VARIED)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_alike_and_is_a_source(place: Path, tmp_path: Path, layout: str) -> None:
    """So that a layout that is wrong in itself is told from one that is loaded wrongly."""
    one, plain = source(place, layout), source(place, "DDP on 2")
    for mine, theirs in zip(one.before + one.after, plain.before + plain.after, strict=True):
        assert mine == pytest.approx(theirs, rel=ROUNDING)
    (result,) = resumed(tmp_path, "DDP on 2", {layout: one}).values()
    assert not result.differences
    assert result.drift(one.after) < ROUNDING
