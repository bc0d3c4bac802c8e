"""The coordinator's part of a save: the manifest, from what the ranks wrote."""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from crc32c import crc32c
from torch.distributed.checkpoint.storage import WriteResult

from ucp.catalog import Kind, Scalar, Source, Tensor
from ucp.container.leaves import leaf_scalar
from ucp.errors import FitError
from ucp.format.native_manifest import ROOT, NativeManifest, Part, blobs_path, dumps
from ucp.format.records import File
from ucp.format.state import Encoder
from ucp.integrations._dcp_keys import Path, nested
from ucp.integrations._dcp_sort import OptionRole, StateRole, TensorRole
from ucp.integrations._dcp_write import Written
from ucp.layout import Mesh
from ucp.plan import Cover, Key, TensorSpec
from ucp.store import Store
from ucp.tree import TensorLeaf, Tree


def commit(store: Store, results: Sequence[Sequence[WriteResult]], *, step: int | None) -> None:
    """Put the manifest of what all ranks wrote; FitError unless the parts hold every element of every tensor once."""
    written = [result.storage_data for rank in results for result in rank]
    groups = list(_groups(store, written))
    tensors, parts = _tensors(store, written, {name for names, _ in groups for name in names})
    encoder = Encoder(_no_leaf)
    state = nested({one.role.path: one.value for one in written if isinstance(one.role, StateRole)})
    encoded = {str(name): encoder.encode(tree, where=str(name)) for name, tree in state.items()}
    rows = [{"params": names, "options": encoder.encode(options, where="param_groups")} for names, options in groups]
    blobs, table = encoder.blobs()
    path = blobs_path(uuid.uuid4().hex[:8])
    if blobs:
        store.put(path, blobs)
    manifest = NativeManifest(
        id=str(uuid.uuid4()),
        created_by=f"ucp {version('universal-checkpoint')}",
        step=_step(tensors) if step is None else step,
        source=Source("dcp", torch.__version__, Mesh({"rank": len(results)})),
        shards=tuple({one.shard.path: one.shard for one in written if one.shard is not None}.values()),
        tensors=tensors,
        parts=parts,
        groups=rows,
        state=encoded,
        blobs=table,
        files={path: File(path, len(blobs), crc32c(blobs))} if blobs else {},
    )
    store.put(ROOT, dumps(manifest), if_absent=True)


def _tensors(
    store: Store, written: Sequence[Written], trained: set[str]
) -> tuple[tuple[Tensor, ...], dict[Key, tuple[Part, ...]]]:
    """The tensors, and the parts of each state in order; `trained` are the names in an optimizer's groups."""
    specs: dict[str, dict[str, TensorSpec]] = defaultdict(dict)
    scalars: dict[str, dict[str, Scalar]] = defaultdict(dict)
    parts: dict[Key, list[Part]] = defaultdict(list)
    for one in written:
        if not isinstance(one.role, TensorRole):
            continue
        name, state = one.role.name, one.role.state
        if one.role.number:
            if one.value is not None:
                scalars[name][state] = _scalar(store, one.value, f"{name}[{state}]")
            continue
        spec = TensorSpec(one.shape, one.dtype)
        if specs[name].setdefault(state, spec) != spec:
            raise FitError(f"{name}[{state}]: rank {one.rank} saves {spec}, a rank before it {specs[name][state]}")
        held = parts[Key(name, state)]
        if one.part is not None:
            held.append(one.part)
    ordered = {key: tuple(sorted(held, key=lambda part: part.box.start)) for key, held in parts.items()}
    names = dict.fromkeys([*specs, *scalars])
    stateful = {name for name in names if len(specs[name]) > 1 or scalars[name]}
    tensors = tuple(
        Tensor(name, _kind(name, specs[name], trained | stateful), specs[name], scalars[name]) for name in names
    )
    for key, found in ordered.items():
        spec = specs[key.name][key.state]
        Cover.of(key, spec, [part.fragment(spec.dtype) for part in found])
    return tensors, ordered


def _kind(name: str, states: Mapping[str, TensorSpec], trained: set[str]) -> Kind:
    """DCP does not tell: what an optimizer has is a parameter, whole numbers are a buffer, the rest is frozen."""
    if name in trained:
        return "parameter"
    dtype: torch.dtype | None = getattr(torch, states["value"].dtype) if "value" in states else None
    if dtype is not None and not dtype.is_floating_point:
        return "buffer"
    return "frozen" if trained else "parameter"


def _scalar(store: Store, value: Tree, label: str) -> Scalar:
    if isinstance(value, TensorLeaf) and value.extent.size == 1:
        return Scalar(leaf_scalar(store, value), value.extent.dtype)
    if isinstance(value, bool | int | float):
        return Scalar(value, type(value).__name__)
    raise FitError(f"{label}: a {type(value).__name__} in an optimizer's state cannot be saved")


def _step(tensors: Sequence[Tensor]) -> int | None:
    """The optimizer's step, where all its states have the same."""
    steps = {tensor.scalars["step"].value for tensor in tensors if "step" in tensor.scalars}
    return int(steps.pop()) if len(steps) == 1 else None


def _groups(store: Store, written: Sequence[Written]) -> Iterator[tuple[list[str], dict[str, Tree]]]:
    """(parameters, options) of every group; of a flattened optimizer, parameters with the same options are one."""
    held: dict[tuple[str, int | str], dict[Path, Tree]] = defaultdict(dict)
    for one in written:
        if isinstance(one.role, OptionRole):
            held[one.role.optimizer, one.role.group][(one.role.option,)] = _plain(store, one.value)
    flat: dict[str, list[tuple[list[str], dict[str, Tree]]]] = defaultdict(list)
    for (optimizer, group), options in sorted(held.items(), key=lambda entry: _order(*entry[0])):
        own = {str(key): value for key, value in nested(options).items() if key != "param_names"}
        if isinstance(group, int):
            yield _names(own.pop("params", []), optimizer), own
            continue
        same = next((names for names, shared in flat[optimizer] if shared == own), None)
        if same is None:
            flat[optimizer].append(([group], own))
        else:
            same.append(group)
    for groups in flat.values():
        yield from groups


def _plain(store: Store, option: Tree) -> Tree:
    """An option that is a tensor of one number, as ``lr`` may be, as that number."""
    return leaf_scalar(store, option) if isinstance(option, TensorLeaf) and option.extent.size == 1 else option


def _order(optimizer: str, group: int | str) -> tuple[str, int]:
    return (optimizer, group if isinstance(group, int) else 0)


def _names(params: Any, optimizer: str) -> list[str]:
    if not all(isinstance(name, str) for name in params):
        raise FitError(
            f"{optimizer}param_groups has parameters by number instead of by name",
            hint="make the state dict with torch.distributed.checkpoint.state_dict.get_optimizer_state_dict",
        )
    return list(params)


def _no_leaf(_: object) -> bytes:
    raise FitError("a tensor that is not in memory cannot be saved")
