"""The public API is what ``ucp.__all__`` says: no more, no less, in order."""

from __future__ import annotations

from types import ModuleType

import pytest

import ucp


def test_all_is_sorted_and_without_repetition() -> None:
    assert list(ucp.__all__) == sorted(set(ucp.__all__))


def test_every_name_is_there_and_none_is_a_module() -> None:
    assert not [name for name in ucp.__all__ if isinstance(getattr(ucp, name), ModuleType)]


def test_all_is_everything_public() -> None:
    for name in ucp.__all__:
        getattr(ucp, name)
    here = {name for name in {*vars(ucp), *dir(ucp)} if not name.startswith("_")}
    public = {name for name in here if not isinstance(getattr(ucp, name), ModuleType) and not _borrowed(name)}
    assert public == {name for name in ucp.__all__ if not name.startswith("_")}


def _borrowed(name: str) -> bool:
    """Whether a name of ``ucp`` belongs to the standard library or another package, like ``annotations`` or ``Any``."""
    return name == "TYPE_CHECKING" or not getattr(getattr(ucp, name), "__module__", "ucp").startswith("ucp")


def test_a_name_that_is_not_there_says_so() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ucp.no_such_name
