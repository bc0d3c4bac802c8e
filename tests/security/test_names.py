"""Names of tensors that no path should have: held inside the destination and the same when read back, or refused."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import ucp
from ucp.errors import FitError

NAMES = {
    "upwards": ["../../escaped"],
    "absolute": ["/escaped"],
    "a drive": ["C:\\escaped", "C:escaped"],
    "a share": ["\\\\server\\share\\escaped"],
    "NUL": ["escaped\0.txt"],
    "very long": ["w" * 20_000],
    "devices": ["con", "NUL", "aux.txt", "com1.weight"],
    "dots and blanks": [".", "..", " ", "w.", "w "],
    "ours": ["zarr.json", "state.json", "c/0/0", "__x", "@value", "=2f"],
    "case": ["Norm", "norm", "NORM"],
    "normal forms": [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")],
    "compatible": ["ﬁ", "fi", "ſ", "s", "K", "K"],
    "terminals": ["\x1b[2J", "a\nb", "\u202egnp", "\u200b"],
}
FAMILIES = ("universal", "dcp", "torch", "safetensors", "deepspeed-universal")


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_names(family: str, kind: str, tmp_path: Path) -> None:
    names = list(dict.fromkeys(NAMES[kind]))
    tensors = {name: np.full((2, 3), number, "f4") for number, name in enumerate(names)}
    (tmp_path / "a" / "source").mkdir(parents=True)
    save_file(tensors, tmp_path / "a" / "source" / "x.safetensors")
    there = tmp_path / "a" / "b" / "new"
    try:
        ucp.convert(str(tmp_path / "a" / "source"), str(there), to=family)
    except FitError:
        assert family != "universal", "it has a place for every name"
    else:
        with ucp.open(str(there)) as found:
            assert {name: found[name]["value"][...].tolist() for name in found} == {
                name: tensor.tolist() for name, tensor in tensors.items()
            }
        paths = [path.relative_to(there).as_posix() for path in there.rglob("*")]
        if family == "deepspeed-universal":  # its folders are called as DeepSpeed calls them: as the tensors are
            assert all(path.isprintable() for path in paths)
        else:
            assert all(path.isascii() for path in paths)
            assert len({path.lower() for path in paths}) == len(paths), "on a file system that ignores case"
    outside = {path for path in tmp_path.rglob("*") if not path.is_relative_to(there)}
    expected = {"a", "a/b", "a/source", "a/source/x.safetensors"}
    assert {path.relative_to(tmp_path).as_posix() for path in outside} <= expected
    assert not Path("/escaped").exists()
