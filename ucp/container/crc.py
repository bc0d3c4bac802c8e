"""CRCs of concatenations from the parts' values alone.

Combining works in GF(2)[x] modulo the CRC polynomial: appending n zero bytes multiplies by x^(8n) (the method of zlib's
``crc32_combine``). It lets ranges that were read or written in any order, by any worker, be checked against one digest.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

Algorithm = Literal["crc32", "crc32c"]

_POLYNOMIAL = {"crc32": 0xEDB88320, "crc32c": 0x82F63B78}


def combine(algorithm: Algorithm, first: int, second: int, length: int) -> int:
    """CRC of a ++ b from the CRCs of a and b and the length of b in bytes."""
    return _multiply(_POLYNOMIAL[algorithm], _shift(algorithm, length), first) ^ second


@lru_cache(maxsize=4096)
def _shift(algorithm: Algorithm, length: int) -> int:
    """x^(8·length) modulo the polynomial, bits reflected."""
    polynomial = _POLYNOMIAL[algorithm]
    result, base, bits = 1 << 31, 1 << 30, length * 8
    while bits:
        if bits & 1:
            result = _multiply(polynomial, base, result)
        base = _multiply(polynomial, base, base)
        bits >>= 1
    return result


def _multiply(polynomial: int, a: int, b: int) -> int:
    """a·b modulo the polynomial; bit 31 is the coefficient of x^0."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (polynomial if b & 1 else 0)
    return product
