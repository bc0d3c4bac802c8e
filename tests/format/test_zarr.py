"""The data types that ``import ucp.zarr`` adds to zarr-python."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import zarr
from zarr.dtype import data_type_registry

import ucp.zarr
from ucp.errors import UsageError

NAMES = ("bfloat16", "float8_e4m3fn", "float8_e5m2")


@pytest.mark.parametrize("name", NAMES)
def test_entry_points_name_the_types(name: str) -> None:
    (point,) = entry_points(group="zarr.data_type", name=name)
    assert point.load() is data_type_registry.get(name)


FILLS = [(name, fill) for name in NAMES for fill in (0.0, -1.5, float("nan"), float("inf"))]
FILLS.remove(("float8_e4m3fn", float("inf")))  # it has no infinity


@pytest.mark.parametrize(("name", "fill"), FILLS)
def test_zarr_python_writes_and_reads_them(tmp_path: Path, name: str, fill: float) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name))
    array = zarr.create_array(str(tmp_path), shape=(4, 3), chunks=(2, 3), dtype=dtype, fill_value=fill)
    array[:2] = np.arange(6).reshape(2, 3).astype(dtype)
    found = zarr.open_array(str(tmp_path), mode="r")[:]
    assert found.dtype == dtype
    assert found[:2].astype("f4").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found[2:].tobytes() == np.full((2, 3), fill, dtype).tobytes()


def test_fill_values_may_be_bits() -> None:
    kind = ucp.zarr.BFloat16()
    assert kind.from_json_scalar("0x3fc0", zarr_format=3) == 1.5


def test_a_type_of_zarr_itself_stays() -> None:
    theirs = data_type_registry.get("bfloat16")
    own = type("Own", (ucp.zarr.BFloat16,), {})
    data_type_registry.register("bfloat16", own)
    try:
        ucp.zarr.register()
        assert data_type_registry.get("bfloat16") is own
    finally:
        data_type_registry.register("bfloat16", theirs)


def test_without_ml_dtypes_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(UsageError, match="need ml_dtypes"):
        ucp.zarr.BFloat16().to_native_dtype()
