"""Reads ``torch_dist`` checkpoints of Megatron-Core: torch's DCP files, ``common.pt``, and Megatron's own keys.

Keys: megatron/core/dist_checkpointing (``ShardedTensor.key``), and ``optimizer.state.<state>.<key>`` where optimizer
states are kept as the parameters are (megatron/core/optimizer).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from ucp.catalog import Catalog, Source
from ucp.container.torchfile import TorchFile, read_torch_file
from ucp.errors import CorruptError, FitError
from ucp.layout import Box, Mesh
from ucp.plan import Extent, Fragment, TensorSpec
from ucp.store import Store
from ucp.tree import Tree

from .._dcp.items import Items
from .._dcp.metadata import Chunk, Entry, Metadata, Stored, read_metadata
from .arguments import Arguments
from .around import add_steps, groups_of, iteration_of, rng_of, state_of
from .folder import COMMON, Folder
from .found import Found, tensors_of
from .groups import Optimizer, Parameter, optimizers_of
from .order import is_buffer, is_expert

STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.([^.]+)\.(.+)")
_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\.")
_RNG = re.compile(r"rng_state/shard_([\d.]+)_([\d.]+)")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_STACKED = re.compile(r"decoder\.layers\.(?!\d+\.)")


@dataclass(frozen=True)
class Dist:
    """The files of one ``torch_dist`` checkpoint, looked into but not read; paths are relative to `store`."""

    store: Store
    folder: Folder
    metadata: Metadata
    common_file: TorchFile
    items: Items

    @classmethod
    def open(cls, store: Store, folder: Folder) -> Dist:
        """Read ``.metadata`` and ``common.pt``, and the ends of every item."""
        metadata = _within(read_metadata(store, folder.path + ".metadata"), folder.path)
        wanted = [stored for key, stored in metadata.stored() if "_extra_state" not in key]
        return cls(store, folder, metadata, read_torch_file(store, folder.path + COMMON), Items(store, wanted))

    @cached_property
    def common(self) -> Mapping[str, Tree]:
        """The dict in ``common.pt``."""
        if not isinstance(self.common_file.root, Mapping):
            raise CorruptError(f"{self.where}: is a {type(self.common_file.root).__name__}, not a dict")
        return self.common_file.root

    @property
    def where(self) -> str:
        """``common.pt``, for errors."""
        return f"{self.store.url}/{self.folder.path}{COMMON}"

    @cached_property
    def args(self) -> Arguments:
        """The job's arguments."""
        return Arguments.of(self.common.get("args"), where=self.where)

    @cached_property
    def model(self) -> dict[str, Entry]:
        """The model's tensors by key."""
        return {key: entry for key, entry in self.metadata.tensors.items() if not _OPTIMIZER.match(key)}

    @cached_property
    def sharding(self) -> str | None:
        """How the distributed optimizer was saved; None without one."""
        content = self.common.get("content_metadata")
        told = content.get("distrib_optim_sharding_type") if isinstance(content, Mapping) else None
        if isinstance(told, str):
            return told
        optimizer = self.common.get("optimizer")
        several = list(optimizer.values()) if isinstance(optimizer, Mapping) else optimizer
        for one in [optimizer, *(several if isinstance(several, list) else ())]:
            kind = one.get("param_state_sharding_type") if isinstance(one, Mapping) else None
            if isinstance(kind, str):
                return kind
        return None

    def extent(self, key: str, chunk: Chunk, dtype: str, found: Found) -> Extent:
        """Where a chunk's elements lie."""
        assert chunk.stored is not None
        extent, checksums = self.items.tensor(chunk.stored, chunk.sizes, dtype, key=key)
        found.checksums += checksums
        return extent

    def held(self, key: str, entry: Entry, found: Found) -> tuple[TensorSpec, tuple[Fragment, ...]]:
        """A tensor that is kept as it is."""
        fragments = tuple(
            Fragment(Box(chunk.offsets, chunk.sizes), self.extent(key, chunk, entry.dtype, found))
            for chunk in entry.chunks
            if chunk.stored is not None
        )
        return TensorSpec(entry.shape, entry.dtype), fragments

    def blob(self, key: str) -> Tree:
        """A pickled object by its key."""
        if key not in self.metadata.blobs:
            raise CorruptError(f"{self.store.url}/{self.folder.path}.metadata: there is no {key}")
        held = self.items.blob(self.metadata.blobs[key])
        # torch's writer gets each object in a list: dist_checkpointing/strategies/torch.py, mcore_to_pyt_state_dict.
        return held[0] if isinstance(held, list) and len(held) == 1 else held


def _within(metadata: Metadata, path: str) -> Metadata:
    """The same with paths of objects below `path`."""

    def moved(stored: Stored | None) -> Stored | None:
        return None if stored is None else replace(stored, object=path + stored.object)

    tensors = {
        key: replace(entry, chunks=tuple(chunk._replace(stored=moved(chunk.stored)) for chunk in entry.chunks))
        for key, entry in metadata.tensors.items()
    }
    blobs = {key: replace(stored, object=path + stored.object) for key, stored in metadata.blobs.items()}
    return replace(metadata, tensors=tensors, blobs=blobs)


def read_dist(store: Store, folder: Folder) -> tuple[Catalog, Dist]:
    """The catalog of a ``torch_dist`` checkpoint with its keys as they are, and the files behind it."""
    dist = Dist.open(store, folder)
    _check_layers(dist)
    found = Found()
    for key, entry in dist.model.items():
        found.weights[key] = dist.held(key, entry, found)
    found.buffers.update(key for key in dist.model if is_buffer(key))
    optimizers = _optimizers(dist, found)
    found.trained = bool(optimizers)
    if found.states and not optimizers:
        found.notes.append(
            f"{dist.where}: holds no optimizer, but there are states of one: its step and hyper-parameters are missing"
        )
    if dist.args.values.get("fp8"):
        found.notes.append(f"{dist.where}: scales of FP8 layers, in _extra_state, are left out")
    parameters = _parameters(dist, len(optimizers))
    add_steps(store, found, optimizers, parameters, where=dist.where)
    groups, left = groups_of(found, dist.args, optimizers, parameters, where=dist.where)
    made = tensors_of(found)
    entries = [dist.common_file.entry, store.entry(folder.path + ".metadata"), *dist.items.entries.values()]
    catalog = Catalog(
        url=store.url,
        source=Source("megatron", "", _mesh(dist.args), _detail(dist)),
        tensors=made.tensors,
        fragments=made.fragments,
        witnesses=made.witnesses,
        step=iteration_of(dist.common, folder.iteration, where=dist.where),
        param_groups=groups,
        state=state_of(store, {**dist.common, **left, **_objects(dist)}, dist.args, optimizers, _rng(dist)),
        checksums=(*dist.common_file.checksums, *found.checksums),
        objects={entry.path: (entry.size, entry.fingerprint) for entry in entries},
        notes=tuple(found.notes),
    )
    return catalog, dist


def _check_layers(dist: Dist) -> None:
    """CorruptError if the tensors are not those of as many layers as the arguments say."""
    total = dist.args.layers
    if total is None:
        return
    numbers = {int(match[1]) for key in dist.model if (match := _LAYER.match(key))}
    for key, entry in dist.model.items():
        if _STACKED.match(key) and entry.shape[:1] != (total,):
            raise CorruptError(f"{dist.where}: args say num_layers = {total}, but {key} has shape {list(entry.shape)}")
    if numbers and numbers != set(range(total)):
        raise CorruptError(
            f"{dist.where}: args say num_layers = {total}, but there are tensors of layers {sorted(numbers)}"
        )


def _optimizers(dist: Dist, found: Found) -> list[Optimizer]:
    """Put the optimizer states in `found`, and give what is known of each optimizer."""
    if any("optimizer.distributed." in key for key in (*dist.metadata.tensors, *dist.metadata.blobs)):
        from .buckets import read_buckets

        return read_buckets(dist, found)
    if dist.sharding == "fully_sharded_model_space":
        from .flattened import read_flattened

        read_flattened(dist, found)
    else:
        for key, entry in dist.metadata.tensors.items():
            if match := STATE.fullmatch(key):
                spec, fragments = dist.held(key, entry, found)
                _require_shape(dist, match[2], key, entry)
                found.add(match[2], match[1], spec, fragments)
            elif _OPTIMIZER.match(key):
                raise FitError(f"{dist.where}: the optimizer keeps {key}, which this reader does not know")
    return optimizers_of(dist.common.get("optimizer"), where=dist.where)


def _require_shape(dist: Dist, name: str, key: str, entry: Entry) -> None:
    if name in dist.model and dist.model[name].shape != entry.shape:
        raise CorruptError(
            f"{dist.where}: {name} has shape {list(dist.model[name].shape)}, but {key} has {list(entry.shape)}"
        )


def _parameters(dist: Dist, optimizers: int) -> list[list[Parameter]]:
    """The parameters of each optimizer: with experts spread over ranks the second has these."""
    spread = dist.args.ep > 1
    every = [
        Parameter(key, len(entry.shape) - _stacked_dims(key), spread and is_expert(key))
        for key, entry in dist.model.items()
        if not is_buffer(key)
    ]
    if optimizers < 2:
        return [every] * optimizers
    if optimizers > 2:
        raise FitError(f"{dist.where}: {optimizers} chained optimizers are not supported")
    return [[one for one in every if not one.expert], [one for one in every if one.expert]]


def _stacked_dims(key: str) -> int:
    """Leading dims that count layers or experts."""
    return bool(_STACKED.match(key)) + (".experts.experts." in key)


def _rng(dist: Dist) -> Tree:
    """Random states of ranks: ``get_rng_state`` in megatron/training/checkpointing.py, one for each (pp, tp)."""
    found = {}
    for key in dist.metadata.blobs:
        if match := _RNG.fullmatch(key):
            index = match[1].split(".")
            axes = ("pp", "tp", "dp")
            found[",".join(f"{axis}={i}" for axis, i in zip(axes, index, strict=False))] = dist.blob(key)
    return rng_of(found)


def _objects(dist: Dist) -> dict[str, Tree]:
    """Other objects that ranks saved, under their own keys."""
    return {
        key: dist.blob(key)
        for key in dist.metadata.blobs
        if not _RNG.fullmatch(key) and "_extra_state" not in key and not _OPTIMIZER.match(key)
    }


def _mesh(args: Arguments) -> Mesh:
    axes = {"tp": args.tp, "pp": args.pp, "vpp": args.vpp, "ep": args.ep, "dp": args.dp}
    return Mesh({axis: size for axis, size in axes.items() if size > 1 or axis in ("tp", "pp", "dp")})


def _detail(dist: Dist) -> dict[str, str | int | float | bool | None]:
    dtypes = sorted({entry.dtype for entry in dist.model.values()})
    return {"format": "torch_dist", "optimizer_format": dist.sharding, "model_dtype": " ".join(dtypes) or None}
