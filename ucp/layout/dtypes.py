"""Element types by the one name used everywhere: torch's name without ``torch.``.

The tables say how other formats spell them: safetensors (its README, "dtype") and Zarr v3 (core spec and the
zarr-extensions registry for bfloat16 and float8).
"""

from __future__ import annotations

from ucp.errors import FitError

ITEMSIZE: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
}

SAFETENSORS: dict[str, str] = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}

FROM_SAFETENSORS: dict[str, str] = {code: name for name, code in SAFETENSORS.items()}


def itemsize(dtype: str) -> int:
    """Bytes per element of `dtype`; FitError for a dtype that ucp does not know."""
    try:
        return ITEMSIZE[dtype]
    except KeyError:
        raise FitError(f"unknown dtype {dtype!r}", hint=f"known: {' '.join(ITEMSIZE)}") from None
