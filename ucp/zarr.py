"""bfloat16 and float8 for zarr-python and zarrs: ``import ucp.zarr`` before opening a checkpoint that has them.

The names are those of the zarr-extensions registry ("data-types"), the NumPy types those of ml_dtypes. The entry points
in group ``zarr.data_type`` name the same classes; zarr-python 3.1 collects that group but does not load it
(zarr/core/dtype/registry.py, ``_lazy_load`` has no caller), hence the import. zarrs hands bfloat16 and float8 on to
zarr-python, float8 with a warning. tensorstore needs none of this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
from zarr.core.dtype.common import HasEndianness, HasItemSize
from zarr.dtype import DataTypeValidationError, ZDType, data_type_registry

from ucp.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class _MlFloat(ZDType[Any, Any], HasItemSize):
    """A floating-point type of ml_dtypes; Zarr v3 only, always little-endian."""

    _zarr_v3_name: ClassVar[str]

    @classmethod
    def _dtype(cls) -> np.dtype[Any]:
        try:
            import ml_dtypes
        except ImportError as error:
            raise UsageError(f"{cls._zarr_v3_name} arrays need ml_dtypes", hint="pip install ml_dtypes") from error
        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, cls._zarr_v3_name))
        return found

    @property
    def item_size(self) -> int:
        """Bytes per element."""
        return self._dtype().itemsize

    @classmethod
    def from_native_dtype(cls, dtype: np.dtype[Any]) -> Self:
        if dtype.name != cls._zarr_v3_name:
            raise DataTypeValidationError(f"{dtype} is not {cls._zarr_v3_name}")
        return cls()

    def to_native_dtype(self) -> np.dtype[Any]:
        return self._dtype()

    @classmethod
    def _from_json_v2(cls, data: object) -> Self:
        raise DataTypeValidationError(f"Zarr v2 has no {cls._zarr_v3_name}: {data!r}")

    @classmethod
    def _from_json_v3(cls, data: object) -> Self:
        if data != cls._zarr_v3_name:
            raise DataTypeValidationError(f"{data!r} is not {cls._zarr_v3_name}")
        return cls()

    def to_json(self, zarr_format: Literal[2, 3]) -> Any:
        if zarr_format == 2:
            raise DataTypeValidationError(f"Zarr v2 has no {self._zarr_v3_name}")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> bool:
        try:
            self.cast_scalar(data)
        except (TypeError, ValueError):
            return False
        return True

    def cast_scalar(self, data: Any) -> Any:
        return self._dtype().type(float(data))

    def default_scalar(self) -> Any:
        return self.cast_scalar(0)

    def from_json_scalar(self, data: Any, *, zarr_format: Literal[2, 3]) -> Any:
        """A fill value: a number, ``NaN``, ``Infinity``, ``-Infinity``, or the bits as ``0x…``."""
        if isinstance(data, str) and data.startswith("0x"):
            bits = int(data, 16).to_bytes(self.item_size, "little")
            return np.frombuffer(bits, self._dtype())[0]
        return self.cast_scalar(data)

    def to_json_scalar(self, data: object, *, zarr_format: Literal[2, 3]) -> Any:
        value = float(self.cast_scalar(data))
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


@dataclass(frozen=True, kw_only=True)
class BFloat16(_MlFloat, HasEndianness):
    """``bfloat16``: the upper half of a float32."""

    _zarr_v3_name: ClassVar[str] = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class Float8E4M3FN(_MlFloat):
    """``float8_e4m3fn``: 4 exponent and 3 mantissa bits, no infinities."""

    _zarr_v3_name: ClassVar[str] = "float8_e4m3fn"


@dataclass(frozen=True, kw_only=True)
class Float8E5M2(_MlFloat):
    """``float8_e5m2``: 5 exponent and 2 mantissa bits."""

    _zarr_v3_name: ClassVar[str] = "float8_e5m2"


def register() -> None:
    """Make zarr-python know these types, unless it already has its own."""
    for kind in (BFloat16, Float8E4M3FN, Float8E5M2):
        if kind._zarr_v3_name not in data_type_registry.contents:
            data_type_registry.register(kind._zarr_v3_name, kind)


register()
