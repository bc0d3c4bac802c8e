"""Training state as JSON without loss, and its tensors as one safetensors object.

JSON values stand for themselves where they can; everything else is an object with one member whose name starts with
``$``. No number but integers below 2^53 is ever written as a JSON number, so that no reader rounds one.
Normative text: spec/universal-format.md, "Trees".
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ucp.container.values import Reference, Size
from ucp.errors import CorruptError, FitError
from ucp.format.documents import canonical
from ucp.format.records import PLAIN
from ucp.format.shard import framed
from ucp.layout import Shape, itemsize
from ucp.layout.dtypes import SAFETENSORS
from ucp.plan import Extent
from ucp.tree import Opaque, TensorLeaf, Tree, walk

INLINE_BYTES = 256
"""Tensors and byte strings up to this size are part of the JSON text."""

_SAFE_INT = 2**53

Read = Callable[[TensorLeaf], bytes]
"""Gives the bytes of a tensor leaf, C order, little-endian."""


@dataclass(frozen=True, slots=True)
class Blob:
    """A tensor, or a byte string as uint8, in the blobs object; `offset` is absolute."""

    dtype: str
    shape: Shape
    offset: int
    path: str = PLAIN.blobs

    @property
    def extent(self) -> Extent:
        """Where it lies."""
        return Extent.contiguous(self.path, self.offset, self.shape, self.dtype)


@dataclass(slots=True)
class Encoder:
    """Encodes trees and collects their tensors; equal tensors are kept once."""

    read: Read
    _blobs: dict[tuple[str, Shape, bytes], str] = field(default_factory=dict)
    _placed: dict[Extent, dict[str, str]] = field(default_factory=dict)

    def encode(self, tree: Tree, *, where: str = "state") -> Any:
        """`tree` as JSON values; FitError naming `where` for a value that is no part of a tree."""
        for _ in walk(tree, where=where):
            pass
        return self._encode(tree, where)

    def _encode(self, node: Tree, where: str) -> Any:
        if node is None or isinstance(node, bool):
            return node
        if isinstance(node, list):
            return [self._encode(item, where) for item in node]
        if isinstance(node, dict):
            return self._dict(node, where)
        if isinstance(node, tuple):
            tag = "$size" if isinstance(node, Size) else "$tuple"
            return {tag: [self._encode(item, where) for item in node]}
        if isinstance(node, set | frozenset):
            tag = "$set" if isinstance(node, set) else "$frozenset"
            return {tag: sorted((self._encode(item, where) for item in node), key=canonical)}
        if isinstance(node, TensorLeaf):
            return {"$tensor": self._tensor(node)}
        if isinstance(node, Reference):
            return {"$reference": [node.module, node.name]}
        if isinstance(node, Opaque):
            return {"$object": self._opaque(node, where)}
        if isinstance(node, bytes):
            return self._bytes(node)
        return _number_or_text(node, where)

    def _dict(self, node: dict[Tree, Tree], where: str) -> Any:
        if all(_is_member(key) for key in node):
            return {key: self._encode(value, where) for key, value in node.items()}
        return {"$dict": [[self._encode(key, where), self._encode(value, where)] for key, value in node.items()]}

    def _opaque(self, node: Opaque, where: str) -> dict[str, Any]:
        parts: dict[str, list[Tree]] = {
            "args": list(node.args),
            "kwargs": [list(pair) for pair in node.kwargs.items()],
            "state": [] if node.state is None else [node.state],
            "items": node.items,
            "pairs": [list(pair) for pair in node.pairs],
        }
        held = {key: self._encode(part, where) for key, part in parts.items() if part}
        return {"module": node.module, "name": node.name, **held}

    def _tensor(self, leaf: TensorLeaf) -> dict[str, Any]:
        extent = leaf.extent
        found = {"dtype": extent.dtype, "shape": list(extent.shape), "numpy": leaf.numpy}
        if leaf.inline is not None:
            return found | self._place(extent.dtype, extent.shape, leaf.inline)
        if extent not in self._placed:  # a small pickle can name a large tensor many times
            self._placed[extent] = self._place(extent.dtype, extent.shape, self.read(leaf))
        return found | self._placed[extent]

    def _bytes(self, data: bytes) -> dict[str, Any]:
        return {"$bytes": self._place("uint8", (len(data),), data)}

    def _place(self, dtype: str, shape: Shape, data: bytes) -> dict[str, str]:
        if len(data) <= INLINE_BYTES:
            return {"data": base64.b64encode(data).decode()}
        name = self._blobs.setdefault((dtype, shape, data), str(len(self._blobs)))
        return {"blob": name}

    def blobs(self) -> tuple[bytes, dict[str, Any]]:
        """The safetensors object of everything collected (empty if nothing was), and a table of it.

        The table maps names to dtype, shape and absolute offset. Wider elements come first, so that all are aligned.
        """
        entries: dict[str, object] = {}
        table: dict[str, Any] = {}
        ordered = sorted(self._blobs.items(), key=lambda item: (-itemsize(item[0][0]), int(item[1])))
        if not ordered:
            return b"", {}
        at = 0
        for (dtype, shape, data), name in ordered:
            end = at + len(data)
            entries[name] = {"dtype": SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [at, end]}
            table[name] = {"dtype": dtype, "shape": list(shape), "offset": at}
            at = end
        header = framed(entries, align=8)
        for row in table.values():
            row["offset"] += len(header)
        return header + b"".join(data for (_, _, data), _ in ordered), table


def _is_member(key: Tree) -> bool:
    return isinstance(key, str) and not key.startswith("$") and _is_unicode(key)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _number_or_text(node: Tree, where: str) -> Any:
    if isinstance(node, str):
        return node if _is_unicode(node) else {"$str": base64.b64encode(node.encode(errors="surrogatepass")).decode()}
    if isinstance(node, int):
        return node if abs(node) < _SAFE_INT else {"$int": hex(node)}
    if isinstance(node, float):
        return {"$float": repr(node)}
    if isinstance(node, complex):
        return {"$complex": [repr(node.real), repr(node.imag)]}
    raise FitError(f"{where}: a {type(node).__module__}.{type(node).__qualname__} cannot be stored")


@dataclass(frozen=True, slots=True)
class Decoder:
    """Gives back what `Encoder` encoded. `blobs` is its table; `read` is called for byte strings kept there."""

    blobs: Mapping[str, Blob]
    read: Read
    _held: dict[str, bytes] = field(default_factory=dict)

    def decode(self, value: Any, *, where: str = "state") -> Tree:
        """The tree; CorruptError naming `where` for anything that `Encoder` does not write."""
        try:
            return self._decode(value)
        except (KeyError, TypeError, ValueError, RecursionError, FitError) as error:
            raise CorruptError(f"{where}: not a stored value: {error}", hint="the file is damaged") from error

    def _decode(self, value: Any) -> Tree:
        if isinstance(value, list):
            return [self._decode(item) for item in value]
        if isinstance(value, dict):
            if len(value) == 1 and next(iter(value)).startswith("$"):
                ((tag, body),) = value.items()
                return self._tagged(tag, body)
            if any(key.startswith("$") for key in value):
                raise ValueError(f"members {sorted(value)} beside a tag")
            return {key: self._decode(item) for key, item in value.items()}
        if isinstance(value, float):
            raise ValueError("a bare fraction")
        return value

    def _tagged(self, tag: str, body: Any) -> Tree:
        plain = _PLAIN.get(tag)
        if plain is not None:
            return plain(body)
        if tag in _CONTAINERS:
            return _CONTAINERS[tag](self._decode(_list(body)))
        if tag == "$bytes":
            return self._bytes(body)
        if tag == "$tensor":
            return self._tensor(body)
        if tag == "$object":
            return self._object(body)
        raise ValueError(f"unknown tag {tag!r}")

    def _tensor(self, body: dict[str, Any]) -> TensorLeaf:
        shape = tuple(_size(n) for n in body["shape"])
        extent = Extent.contiguous("", 0, shape, str(body["dtype"]))
        if "data" in body:
            data = base64.b64decode(body["data"], validate=True)
            if len(data) != extent.nbytes:
                raise ValueError(f"{len(data)} bytes for shape {list(shape)} of {extent.dtype}")
            return TensorLeaf(extent, numpy=body["numpy"] is True, inline=data)
        blob = self.blobs[body["blob"]]
        if (blob.shape, blob.dtype) != (shape, extent.dtype):
            raise ValueError(f"blob {body['blob']} is {blob.dtype}{list(blob.shape)}")
        return TensorLeaf(blob.extent, numpy=body["numpy"] is True)

    def _bytes(self, body: dict[str, Any]) -> bytes:
        if "data" in body:
            return base64.b64decode(body["data"], validate=True)
        name = _text(body["blob"])
        if name not in self._held:  # a small document can name a large blob many times
            self._held[name] = self.read(TensorLeaf(self.blobs[name].extent))
        return self._held[name]

    def _object(self, body: dict[str, Any]) -> Opaque:
        def part(key: str) -> list[Tree]:
            return _list(self._decode(body.get(key, [])))

        return Opaque(
            _text(body["module"]),
            _text(body["name"]),
            args=tuple(part("args")),
            kwargs={_text(key): item for key, item in part("kwargs")},
            state=next(iter(part("state")), None),
            items=part("items"),
            pairs=[(key, item) for key, item in part("pairs")],
        )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a string was expected")
    return value


def _complex(parts: Any) -> complex:
    real, imag = parts
    return complex(float(real), float(imag))


def _reference(parts: Any) -> Reference:
    module, name = parts
    return Reference(_text(module), _text(name))


def _size(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("a list was expected")
    return value


_PLAIN: dict[str, Callable[[Any], Tree]] = {
    "$float": float,
    "$int": lambda text: int(text, 16),
    "$complex": _complex,
    "$reference": _reference,
    "$str": lambda text: base64.b64decode(text, validate=True).decode(errors="surrogatepass"),
}
_CONTAINERS: dict[str, Callable[[list[Tree]], Tree]] = {
    "$tuple": tuple,
    "$size": Size,
    "$set": set,
    "$frozenset": frozenset,
    "$dict": dict,
}
