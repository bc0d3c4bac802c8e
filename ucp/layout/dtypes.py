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

WORDS: dict[str, str] = {
    "bool": "bool",
    "u8": "uint8",
    "i8": "int8",
    "u16": "uint16",
    "i16": "int16",
    "u32": "uint32",
    "i32": "int32",
    "u64": "uint64",
    "i64": "int64",
    "f16": "float16",
    "bf16": "bfloat16",
    "f32": "float32",
    "f64": "float64",
    "f8e4m3": "float8_e4m3fn",
    "f8e5m2": "float8_e5m2",
}
"""Element types as conversion programs write them."""

_DIGITS: dict[str, tuple[int, int]] = {
    "f64": (53, 11),
    "f32": (24, 8),
    "bf16": (8, 8),
    "f16": (11, 5),
    "f8e4m3": (4, 4),
    "f8e5m2": (3, 5),
    **{f"{sign}{bits}": (bits - (sign == "i"), 0) for sign in "ui" for bits in (8, 16, 32, 64)},
    "bool": (1, 0),
}


def narrows(source: str, target: str) -> bool:
    """Whether a cast from `source` to `target`, both as programs write them, can change a value."""
    if source == target:
        return False
    (digits, exponent), (kept, room) = _DIGITS[source], _DIGITS[target]
    if exponent == 0 and room:
        return digits > kept or (target == "f16" and digits > 15)
    if exponent or room:
        return kept < digits or room < exponent
    return kept < digits or (source.startswith("i") and not target.startswith("i"))


def itemsize(dtype: str) -> int:
    """Bytes per element of `dtype`; FitError for a dtype that ucp does not know."""
    try:
        return ITEMSIZE[dtype]
    except KeyError:
        raise FitError(f"unknown dtype {dtype!r}", hint=f"known: {' '.join(ITEMSIZE)}") from None
