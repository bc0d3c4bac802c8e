"""Folders as ByteCheckpoint 0.0.2 writes them, made by us: EMULATED.

ByteCheckpoint pins a torch and a protobuf that nothing else here can live with, so that its own writer cannot be run in
these tests. What is written here follows its files bytecheckpoint/engine/store_engine.py, utilities/serialization.py
(``_serialize_tensor``) and checkpointer/meta_type.py.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

_MODULE = "bytecheckpoint.checkpointer.meta_type"


@dataclass
class _StorageInfo:
    relative_path: str
    offset: int
    length: int


@dataclass
class Metadata:
    """What ``.metadata`` pickles, under the name that it has in ByteCheckpoint."""

    state_dict_metadata: dict[str, Any] = field(default_factory=dict)
    planner_data: Any = None
    storage_data: dict[Any, Any] = field(default_factory=dict)
    all_tensor_metadata: dict[Any, Any] = field(default_factory=dict)
    bytecheckpoint_version: str = "0.0.2"
    user_defined_dict: dict[str, Any] = field(default_factory=dict)


def save(
    root: Path,
    *,
    model: Mapping[str, Tensor],
    optimizer: Mapping[tuple[str, ...], Any],
    extra: Sequence[Mapping[str, Any]],
    step: int = 5,
) -> Path:
    """``root/global_step_N``, written by as many ranks as there are dicts of extra state; tensors are cut into rows.

    `optimizer` has values by path, such as ``("state", "a", "exp_avg")``; what is no tensor is pickled.
    """
    ranks = len(extra)
    folder = root / f"global_step_{step}"
    write_part(folder / "model", {(name,): tensor for name, tensor in model.items()}, ranks)
    write_part(folder / "optimizer", optimizer, ranks)
    (folder / "extra_state").mkdir()
    for rank, held in enumerate(extra):
        torch.save(dict(held), folder / "extra_state" / f"extra_state_rank_{rank}.pt", pickle_protocol=4)
    (root / "latest_checkpointed_iteration.txt").write_text(str(step))
    return folder


def write_part(folder: Path, values: Mapping[tuple[str, ...], Any], ranks: int) -> None:
    """``model`` or ``optimizer``: one file of bare bytes for each rank, and ``.metadata``."""
    folder.mkdir(parents=True)
    metadata = Metadata(planner_data={".".join(path): path for path in values})
    files = [io.BytesIO() for _ in range(ranks)]
    for path, value in values.items():
        key = ".".join(path)
        if isinstance(value, Tensor):
            _add_tensor(metadata, files, key, value)
        else:
            metadata.state_dict_metadata[key] = BytesStorageMetadata()
            held = io.BytesIO()
            torch.save(value, held)
            _add(metadata, files, MetadataIndex(key), 0, held.getvalue(), None)
    for rank, file in enumerate(files):
        (folder / f"__{rank}_0.distcp").write_bytes(file.getvalue())
    write_metadata(folder, metadata)


def read_metadata(folder: Path) -> Metadata:
    """The metadata of a part, to be changed."""
    with _named():
        found: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    return found


def write_metadata(folder: Path, metadata: Metadata) -> None:
    """Write the metadata of a part."""
    with _named():
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _add_tensor(metadata: Metadata, files: list[io.BytesIO], key: str, tensor: Tensor) -> None:
    rows = tensor.chunk(len(files)) if tensor.ndim else (tensor,)
    chunks, start = [], 0
    for rank, part in enumerate(rows):
        offsets = (start, *[0] * (tensor.ndim - 1)) if tensor.ndim else ()
        chunks.append(ChunkStorageMetadata(torch.Size(offsets), part.shape))
        header, data = serialize(part.clone())
        _add(metadata, files, MetadataIndex(key, offsets, rank), rank, data, header)
        start += part.shape[0] if part.ndim else 0
    properties = TensorProperties(dtype=tensor.dtype)
    metadata.state_dict_metadata[key] = TensorStorageMetadata(properties, tensor.shape, chunks)


def _add(
    metadata: Metadata, files: list[io.BytesIO], index: MetadataIndex, rank: int, data: bytes, header: bytes | None
) -> None:
    info = _StorageInfo(f"__{rank}_0.distcp", files[rank].tell(), len(data))
    files[rank].write(data)
    metadata.storage_data[index] = info
    metadata.all_tensor_metadata[index] = header


def serialize(tensor: Tensor) -> tuple[bytes, bytes]:
    """(pickle of the tensor without its storage, bytes of the storage)."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if not isinstance(obj, torch.storage.TypedStorage):
                return None
            kind = getattr(torch, obj._pickle_storage_type())
            return ("storage", kind, "0", "cpu", obj._size())

    header = io.BytesIO()
    Pickler(header, protocol=2).dump(tensor)
    data = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return header.getvalue(), data.numpy().tobytes()


@contextmanager
def _named() -> Iterator[None]:
    """Let pickle find our classes under the names that ByteCheckpoint has for its own."""
    module: Any = ModuleType(_MODULE)
    module.Metadata, module._StorageInfo = Metadata, _StorageInfo
    before = {kind: kind.__module__ for kind in (Metadata, _StorageInfo)}
    parents = {_MODULE.rsplit(".", n)[0]: ModuleType(_MODULE.rsplit(".", n)[0]) for n in (2, 1)}
    sys.modules.update(parents | {_MODULE: module})
    try:
        for kind in before:
            kind.__module__ = _MODULE
        yield
    finally:
        for kind, name in before.items():
            kind.__module__ = name
        for name in (*parents, _MODULE):
            sys.modules.pop(name, None)
