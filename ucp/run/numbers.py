"""Values of raw elements, and statistics of them gathered block by block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from ucp.run.cast import Array, cast, storage_dtype


def values(raw: Array, dtype: str) -> Array:
    """C-order bytes (uint8, one dim) of elements of `dtype` as numbers that numpy computes with.

    bfloat16 and float8 come as float32, complex64 as pairs of float32, all else as it is.
    """
    stored = raw.view(storage_dtype(dtype))
    if dtype == "bfloat16":
        return cast(stored, dtype, "float32")
    if dtype == "float8_e5m2":
        return (stored.astype("<u2") << np.uint16(8)).view("<f2").astype("<f4")
    if dtype == "float8_e4m3fn":
        decoded: Array = _e4m3fn()[stored]
        return decoded
    return stored.view("<f4") if dtype == "complex64" else stored


@cache
def _e4m3fn() -> Array:
    """Value of each of the 256 codes: 4 exponent bits, bias 7, no infinities, one NaN per sign (OCP 8-bit FP, 2023)."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size[(codes & 127) == 127] = np.nan
    return np.where(codes & 128, -size, size).astype("<f4")


@dataclass(slots=True)
class Statistics:
    """Count, NaN and infinite elements, and of the finite ones the extremes, mean and standard deviation.

    The extremes are None, and mean and deviation NaN, where no element is finite.
    """

    count: int = 0
    nan: int = 0
    inf: int = 0
    min: float | int | None = None
    max: float | int | None = None
    mean: float = math.nan
    _finite: int = 0
    _squares: float = 0.0

    @property
    def std(self) -> float:
        """Standard deviation of the finite elements, as of a whole population."""
        return math.sqrt(self._squares / self._finite) if self._finite else math.nan

    def add(self, block: Array) -> None:
        """Take a block of numbers into account."""
        self.count += block.size
        if block.dtype.kind == "f":
            self.nan += int(np.count_nonzero(np.isnan(block)))
            self.inf += int(np.count_nonzero(np.isinf(block)))
            block = block[np.isfinite(block)] if self.nan or self.inf else block
        if block.size:
            self._merge(block)

    def _merge(self, block: Array) -> None:
        """Join the moments of two sets (Chan, Golub and LeVeque, 1979)."""
        low, high = block.min().item(), block.max().item()
        mean = float(block.mean(dtype=np.float64))
        squares = float(np.square(block.astype(np.float64) - mean).sum())
        if self._finite:
            total, apart = self._finite + block.size, mean - self.mean
            squares += self._squares + apart * apart * self._finite * block.size / total
            mean = self.mean + apart * block.size / total
        self.min = low if self.min is None else min(self.min, low)
        self.max = high if self.max is None else max(self.max, high)
        self.mean, self._squares = mean, squares
        self._finite += block.size


def not_finite(block: Array) -> tuple[int, int]:
    """How many numbers are NaN, and how many are infinite."""
    if block.dtype.kind != "f" or np.isfinite(block).all():
        return 0, 0
    return int(np.count_nonzero(np.isnan(block))), int(np.count_nonzero(np.isinf(block)))
