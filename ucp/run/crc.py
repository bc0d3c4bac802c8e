"""CRC-32 (zip) and CRC-32C (Castagnoli) of buffers, and of concatenations from the parts' values alone."""

from __future__ import annotations

import crc32c as _crc32c
from isal import isal_zlib

from ucp.container.crc import Algorithm, combine
from ucp.store import Buffer


def crc(algorithm: Algorithm, data: Buffer, value: int = 0) -> int:
    """CRC of `data`, continuing from `value`."""
    return isal_zlib.crc32(data, value) if algorithm == "crc32" else _crc32c.crc32c(data, value)


__all__ = ["Algorithm", "combine", "crc"]
