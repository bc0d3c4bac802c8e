"""Mutations that keep an input well-formed, so that what lies behind the parser is reached too.

Each takes an input and a source of chance and gives another input; libFuzzer's own mutations are used in turn.
"""

from __future__ import annotations

import json
import pickletools
import random
from collections.abc import Callable
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

_NUMBERS = (0, 1, -1, 2, 7, 255, 2**31, -(2**31), 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400)
_TEXTS = (
    "",
    "..",
    "../../x",
    "/x",
    "a\0b",
    "\ud800",
    "float32",
    "value",
    "step",
    "a" * 300,
    "é",
    "\x1b[2J",
    "CON",
    "$int",
)
_VALUES: tuple[Any, ...] = (None, True, False, 0.5, 1e308, [], {}, [[]], {"": None}, *_NUMBERS, *_TEXTS)


def of_json(data: bytes, chance: random.Random) -> bytes:
    """One to three nodes of a JSON document changed."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return data
    for _ in range(chance.randint(1, 3)):
        document = _changed(document, chance)
    return json.dumps(document, separators=(",", ":")).encode()


def of_safetensors(data: bytes, chance: random.Random) -> bytes:
    """The header of a safetensors file changed, and its length with it."""
    length = int.from_bytes(data[:8], "little")
    header = of_json(data[8 : 8 + length], chance)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def of_pickle(data: bytes, chance: random.Random) -> bytes:
    """One to three opcodes of a pickle removed, repeated, moved, or with another argument."""
    try:
        starts = [position for _, _, position in pickletools.genops(data) if position is not None]
    except Exception:
        return data
    ops = [data[start:stop] for start, stop in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(chance.randint(1, 3)):
        values = [number for number, op in enumerate(ops) if op[:1] in _PUSHES]
        if values and chance.random() < 0.7:  # one value for another: the pickle stays one
            ops[chance.choice(values)] = chance.choice([*_VALUES_PUSHED, ops[chance.choice(values)]])
            continue
        at, other = chance.randrange(len(ops)), chance.randrange(len(ops))
        ops[at : at + 1] = chance.choice(
            (
                [],
                [ops[at], ops[at]],
                [ops[other]],
                [ops[other], ops[at]],
                [chance.choice(_OPS)],
                [ops[at], chance.choice(_OPS)],
                [chance.choice(_OPS), ops[at]],
                ops[other : other + chance.randint(1, 12)],
            )
        )
        ops = ops or [b"."]
    return b"".join(ops)


MUTATIONS: dict[str, Mutation] = {"json": of_json, "safetensors": of_safetensors, "pickle": of_pickle}


def _changed(node: Any, chance: random.Random) -> Any:
    """A copy of `node` with something in it replaced, removed, renamed, repeated or taken from elsewhere in it."""
    if not isinstance(node, dict | list) or not node or chance.random() < 0.15:
        return _other(node, chance)
    if isinstance(node, list):
        return _changed_list(list(node), chance)
    key = chance.choice(list(node))
    how = chance.random()
    if how < 0.1:
        return {name: value for name, value in node.items() if name != key}
    if how < 0.2:
        return {**node, chance.choice((key, *_TEXTS)) if chance.random() < 0.5 else f"{key}x": node[key]}
    if how < 0.3:
        return {**node, key: node[chance.choice(list(node))]}
    return {**node, key: _changed(node[key], chance)}


def _changed_list(node: list[Any], chance: random.Random) -> list[Any]:
    at = chance.randrange(len(node))
    how = chance.random()
    if how < 0.1:
        del node[at]
    elif how < 0.2:
        node.insert(at, node[chance.randrange(len(node))])
    elif how < 0.25:
        node.extend(node)
    else:
        node[at] = _changed(node[at], chance)
    return node


def _other(node: Any, chance: random.Random) -> Any:
    if isinstance(node, int) and chance.random() < 0.5:
        return node + chance.choice((-16, -4, -1, 1, 4, 16))
    if isinstance(node, str) and node and chance.random() < 0.3:
        at = chance.randrange(len(node))
        return node[:at] + chance.choice(("", "/", ".", "=", "$", "\n", "0")) + node[at + 1 :]
    return [node] if chance.random() < 0.1 else chance.choice(_VALUES)


def _op(code: str, argument: bytes = b"") -> bytes:
    return code.encode("latin-1") + argument


_OPS = (
    *(_op(code) for code in "(012N)]}lodtuaesbRQ.\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94"),
    *(_op("K", bytes([n])) for n in (0, 1, 2, 255)),
    *(_op("h", bytes([n])) for n in (0, 1, 2, 3)),
    *(_op("J", n.to_bytes(4, "little", signed=True)) for n in (-1, 2**31 - 1, -(2**31))),
    *(_op("\x8a", bytes([len(n)]) + n) for n in ((2**62).to_bytes(8, "little"), b"\xff" * 9, b"\x01" + b"\0" * 100)),
    *(_op("X", len(t).to_bytes(4, "little") + t) for t in (b"", b"x", b"../x", b"\xed\xa0\x80", b"step", b"a" * 300)),
    *(_op("G", n) for n in (b"\x7f\xf0" + bytes(6), b"\x7f\xf8" + bytes(6), bytes(8))),
    *(_op("B", len(t).to_bytes(4, "little") + t) for t in (b"", b"abc")),
    *(
        _op("c", name)
        for name in (b"collections\nOrderedDict\n", b"torch\nSize\n", b"torch\nfloat32\n", b"app\nThing\n")
    ),
)

_PUSHES = frozenset(bytes([code]) for code in b"NKJMXGB\x88\x89\x8a\x8c")
"""Opcodes that push a value other than a container and take none."""

_VALUES_PUSHED = tuple(op for op in _OPS if op[:1] in _PUSHES)
