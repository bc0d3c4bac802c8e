from __future__ import annotations

import shutil
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from ucp import converter as module
from ucp.errors import NotFoundError, UsageError


@pytest.fixture
def broken(monkeypatch):
    """A third party's converter whose package does not import."""
    known = dict(module._entries())
    known["broken"] = EntryPoint("broken", "no_such_package.there:CONVERTER", module.__name__)
    monkeypatch.setattr(module, "_entries", lambda: known)


def test_a_broken_converter_hurts_nobody_else(broken, tmp_path):
    assert module.converter("universal").family == "universal"
    (tmp_path / "something").write_text("else")
    with pytest.raises(NotFoundError) as caught:
        module.read_catalog(str(tmp_path))
    assert "no_such_package" in caught.value.hint


def test_a_broken_converter_that_is_asked_for_says_why(broken):
    with pytest.raises(UsageError, match="no_such_package"):
        module.converter("broken")


def test_an_unknown_family():
    with pytest.raises(UsageError, match="nonesuch"):
        module.converter("nonesuch")


@pytest.mark.parametrize("family", module.families())
def test_each_family_is_registered_under_its_own_name(family):
    assert module.converter(family).family == family


def test_a_folder_of_checkpoints_says_which_it_holds(tmp_path):
    shutil.copytree(Path(__file__).parent / "data" / "universal-1.0", tmp_path / "checkpoint-3")
    with pytest.raises(NotFoundError) as caught:
        module.read_catalog(str(tmp_path))
    assert "checkpoint-3" in caught.value.hint
    assert caught.value.__notes__ == [f"hint: {caught.value.hint}"]
