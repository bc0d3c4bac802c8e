"""What the files hold: tensors, or regions of tensors, with the places of their bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ucp.catalog import Checksum
from ucp.container.safetensors import SafetensorsFile, read_header
from ucp.container.torchfile import TorchFiles
from ucp.errors import CorruptError, FitError
from ucp.plan import Extent
from ucp.store import Entry, Store
from ucp.tree import TensorLeaf

_INFO, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
_AGAIN = "get the file again from where it was written"


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor or, with `start`, the region of one that begins there."""

    name: str
    extent: Extent
    start: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class File:
    """One file: its pieces, the digests it keeps of them, and for a safetensors file its metadata."""

    pieces: tuple[Piece, ...]
    checksums: tuple[Checksum, ...]
    entry: Entry
    metadata: dict[str, str]


def read_files(store: Store, paths: Sequence[str]) -> list[File]:
    """What each of `paths` holds; raises what `read_header` and `read_torch_file` raise."""
    torch = TorchFiles(store)
    return [_safe(store, path) if path.endswith(".safetensors") else _torch(store, torch, path) for path in paths]


def _safe(store: Store, path: str) -> File:
    header = read_header(store, path)
    starts = _starts(header, f"{store.url}/{path}")
    pieces = tuple(Piece(name, extent, starts.get(name)) for name, extent in header.tensors.items())
    return File(pieces, (), header.entry, dict(header.metadata))


def _starts(header: SafetensorsFile, where: str) -> dict[str, tuple[int, ...]]:
    """Where the regions of tensors begin that torch saved sharded (torch/distributed/checkpoint/filesystem.py)."""
    text = header.metadata.get(_INFO)
    if text is None:
        return {}
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        _damaged(where, f"its {_INFO} is not JSON")
    if not isinstance(told, dict) or told.keys() != header.tensors.keys():
        _damaged(where, f"its {_INFO} is not about the tensors that it holds")
    return {name: _start(where, name, told[name], len(extent.shape)) for name, extent in header.tensors.items()}


def _start(where: str, name: str, told: Any, dims: int) -> tuple[int, ...]:
    offsets = told.get(_OFFSETS) if isinstance(told, dict) else None
    if not isinstance(offsets, list) or len(offsets) != dims:
        _damaged(where, f"its {_INFO} has no {dims} {_OFFSETS} for {name}")
    if not all(type(offset) is int and 0 <= offset < 1 << 60 for offset in offsets):
        _damaged(where, f"its {_INFO} has {_OFFSETS} for {name} that are not natural numbers")
    return tuple(offsets)


def _torch(store: Store, torch: TorchFiles, path: str) -> File:
    file = torch.read(path)
    where = f"{store.url}/{path}"
    if not isinstance(file.root, dict):
        raise FitError(f"{where}: holds a {type(file.root).__name__} and not a dict of tensors", hint=_AGAIN)
    pieces = []
    for name, node in file.root.items():
        if not isinstance(name, str) or not isinstance(node, TensorLeaf) or node.numpy or node.inline is not None:
            raise FitError(
                f"{where}: {name!r:.80} is a {type(node).__name__} and not a tensor",
                hint="weights are a plain dict of tensors; --from torch reads other files of torch.save",
            )
        pieces.append(Piece(name, node.extent))
    return File(tuple(pieces), file.checksums, file.entry, {})


def _damaged(where: str, problem: str) -> NoReturn:
    raise CorruptError(f"{where}: {problem}", hint=_AGAIN)
