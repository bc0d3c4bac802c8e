"""Accounts for every byte of every storage and every entry of every file of a checkpoint.

A byte is mapped (a fragment or a witness holds it), carried (a tensor in the carried state), a scalar of a parameter,
the same as one of these in another rank's file, or padding at a position where this module's own arithmetic puts it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.converters.deepspeed.oracle import read_extent
from ucp.catalog import Catalog, Checksum
from ucp.container.torchfile import TorchFile, leaf_scalar, read_torch_file
from ucp.converters._deepspeed.same import plain_equal
from ucp.plan import Extent
from ucp.store import open_store
from ucp.tree import TensorLeaf, walk

LAYOUT = {
    "module",
    "optimizer",
    "param_shapes",
    "frozen_param_shapes",
    "frozen_param_fragments",
    "shared_params",
    "buffer_names",
}
INNER_LAYOUT = {
    "base_optimizer_state",
    "optimizer_state_dict",
    "single_partition_of_fp32_groups",
    "fp32_flat_groups",
    "group_paddings",
    "param_alignment_paddings",
    "partition_count",
    "param_slice_mappings",
    "zero_stage",
    "ds_zero_partition_groups",
}
ENGINE = {
    "lr_scheduler",
    "data_sampler",
    "random_ltd",
    "skipped_steps",
    "global_steps",
    "global_samples",
    "dp_world_size",
    "mp_world_size",
    "checkpoint_parallel_dimensions",
    "num_experts",
    "ds_autoep_layers",
    "ds_config",
    "ds_version",
}


class Ledger:
    """What each byte of each object is: 0 is not accounted for."""

    def __init__(self, root: Path, catalog: Catalog) -> None:
        self.root = root
        self.catalog = catalog
        store = open_store(str(root))
        torch_files = (path for path in catalog.objects if not path.endswith((".json", ".safetensors")))
        self.files = {path: read_torch_file(store, path) for path in torch_files}
        self.store = store
        self.marks = {path: np.zeros(size, bool) for path, (size, _) in catalog.objects.items()}

    def mark(self, extent: Extent) -> None:
        index = extent.offset + np.zeros(extent.shape, np.int64)
        for dim, (n, stride) in enumerate(zip(extent.shape, extent.strides, strict=True)):
            steps = np.arange(n) * stride * extent.itemsize
            index += steps.reshape([-1 if d == dim else 1 for d in range(len(extent.shape))])
        for byte in range(extent.itemsize):
            self.marks[extent.object][index + byte] = True

    def done(self, extent: Extent) -> bool:
        first, stop = extent.span
        return bool(self.marks[extent.object][first:stop].all())

    def missing(self) -> list[str]:
        """Storages with bytes that nothing accounts for."""
        found = []
        for path, file in self.files.items():
            for storage in file.checksums:
                left = np.flatnonzero(~self.marks[path][storage.offset : storage.offset + storage.length])
                if left.size:
                    found.append(f"{path}: {left.size} of {storage.length} bytes at {storage.offset}, from {left[0]}")
        return found


def audit_bytes(root: Path, catalog: Catalog) -> list[str]:
    """Every storage with bytes that are not accounted for."""
    ledger = Ledger(root, catalog)
    held = [*catalog.fragments.values(), *(fragments for _, fragments in catalog.witnesses.values())]
    for fragments in held:
        for fragment in fragments:
            ledger.mark(fragment.extent)
    carried = [catalog.state, *(group.options for group in catalog.param_groups)]
    for leaf in (leaf for tree in carried for leaf in leaves(tree)):
        if leaf.inline is None:
            ledger.mark(leaf.extent)
    _mark_scalars(ledger)
    _mark_padding(ledger)
    _mark_duplicates(ledger)
    return ledger.missing()


def leaves(tree: Any) -> Iterator[TensorLeaf]:
    return (node for _, node in walk(tree) if isinstance(node, TensorLeaf))


def _optims(ledger: Ledger) -> dict[str, Any]:
    return {
        path: f.root["optimizer_state_dict"]
        for path, f in ledger.files.items()
        if "zero_pp_rank" in path and "optim_states" in path
    }


def _base_states(inner: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    base = inner.get("base_optimizer_state", inner.get("optimizer_state_dict", inner))
    return base if isinstance(base, list) else base.get("state", {}).values()


def _mark_scalars(ledger: Ledger) -> None:
    """Tensors of no dims in the optimizer are scalars of parameters, of the same value."""
    known = {(k, s.value) for t in ledger.catalog.tensors.values() for k, s in t.scalars.items()}
    inners = [*_optims(ledger).values(), *_model_optimizers(ledger)]
    for key, leaf in ((k, v) for inner in inners for state in _base_states(inner) for k, v in state.items()):
        if isinstance(leaf, TensorLeaf) and leaf.extent.shape == ():
            assert (key, leaf_scalar(ledger.store, leaf)) in known
            ledger.mark(leaf.extent)


def _model_optimizers(ledger: Ledger) -> list[Any]:
    plain = [path for path in ledger.files if "layer_" not in path and ("model_states" in path or "expp_rank" in path)]
    roots = [ledger.files[path].root for path in plain]
    return [root["optimizer"] for root in roots if isinstance(root.get("optimizer"), dict)]


def _mark_padding(ledger: Ledger) -> None:
    """Padding by arithmetic of our own: owners of all positions of a group, -1 where there is none."""
    dp = ledger.catalog.source.mesh["dp"]
    for path, inner in _optims(ledger).items():
        rank = int(path.partition("zero_pp_rank_")[2].partition("_")[0])
        model = _model_of(ledger, path)
        states = list(_base_states(inner))
        masters = inner.get("single_partition_of_fp32_groups") or inner["fp32_flat_groups"]
        for g, master in enumerate(masters):
            named = model["param_shapes"] or inner["param_slice_mappings"]
            whole = ledger.catalog.tensors
            shapes = [
                tuple(told) if isinstance(told, tuple | list) else whole[name].states["value"].shape
                for name, told in named[g].items()
            ]
            held, part = _partition(ledger, inner, g, rank)
            if "fp32_flat_groups" in inner:
                owners = _owners_3(shapes, held)[part]
            else:
                gaps = (inner.get("param_alignment_paddings") or [[0] * len(shapes)] * len(masters))[g]
                owners = _owners_12(shapes, gaps, held)[part]
            for leaf in (master, *(v for v in states[g].values() if isinstance(v, TensorLeaf) and v.extent.shape)):
                _mark_positions(ledger, leaf, owners < 0)
    for path, file in ledger.files.items():
        for name, shape in (_frozen_shapes(file) if "zero_pp_rank" in path else {}).items():
            rank = int(path.partition("zero_pp_rank_")[2].partition("_")[0])
            _mark_positions(ledger, file.root["frozen_param_fragments"][name], _owners_3([shape], dp)[rank] < 0)
    _mark_module_padding(ledger, dp)


def _partition(ledger: Ledger, inner: Mapping[str, Any], g: int, rank: int) -> tuple[int, int]:
    """Over how many ranks a group is partitioned, and which part is the rank's; experts over some of the ranks."""
    if "ds_zero_partition_groups" in inner:
        told = inner["ds_zero_partition_groups"][g]
        return told["partition_count"], told["partition_rank"]
    dp = ledger.catalog.source.mesh["dp"]
    counts = inner.get("partition_count", dp)
    count = counts[g] if isinstance(counts, list) else counts
    first = ledger.catalog.state["ds_config"].get("use_data_before_expert_parallelism")
    return count, rank % count if first else rank // (dp // count)


def _model_of(ledger: Ledger, optim: str) -> Any:
    folder, _, name = optim.rpartition("/")
    stem = name.removeprefix("bf16_").replace("optim", "model")
    names = [f"{folder}/{n}" if folder else n for n in (stem, stem[stem.index("mp_rank") :])]
    return next(ledger.files[n] for n in names if n in ledger.files).root


def _frozen_shapes(file: TorchFile) -> Mapping[str, tuple[int, ...]]:
    root = file.root
    return root.get("frozen_param_shapes") or {} if isinstance(root, dict) else {}


def _owners_12(shapes: list[tuple[int, ...]], gaps: list[int], dp: int) -> np.ndarray:
    owners = [np.repeat((i, -1), (int(np.prod(s)), gap)) for i, (s, gap) in enumerate(zip(shapes, gaps, strict=True))]
    flat = np.concatenate(owners)
    return np.append(flat, np.full(-flat.size % (2 * dp), -1)).reshape(dp, -1)


def _owners_3(shapes: list[tuple[int, ...]], dp: int) -> np.ndarray:
    rows = []
    for i, shape in enumerate(shapes):
        flat = np.full(int(np.prod(shape)), i)
        rows.append(np.append(flat, np.full(-flat.size % dp, -1)).reshape(dp, -1))
    return np.concatenate(rows, axis=1)


def _mark_positions(ledger: Ledger, leaf: TensorLeaf, padding: np.ndarray) -> None:
    """Mark padding positions of a flat tensor, also those that its view leaves out and its storage still has."""
    storage = _storage(ledger, leaf)
    length = min((storage.offset + storage.length - leaf.extent.offset) // leaf.extent.itemsize, padding.size)
    for position in np.flatnonzero(padding[:length]):
        offset = leaf.extent.offset + int(position) * leaf.extent.itemsize
        ledger.mark(Extent.contiguous(leaf.extent.object, offset, (1,), leaf.extent.dtype))


def _storage(ledger: Ledger, leaf: TensorLeaf) -> Checksum:
    fitting = (
        c
        for c in ledger.files[leaf.extent.object].checksums
        if c.offset <= leaf.extent.offset < c.offset + max(c.length, 1)
    )
    return next(fitting, Checksum(leaf.extent.object, leaf.extent.offset, 0, "crc32", 0))


def _mark_module_padding(ledger: Ledger, dp: int) -> None:
    """Under ZeRO 1 and 2 the module's tensors are views of the groups' flat low-precision buffers, padding included."""
    for path, file in ledger.files.items():
        if not isinstance(file.root, dict) or not file.root.get("param_shapes") or not file.root["module"]:
            continue
        mp = path[path.rindex("mp_rank_") :][:10]
        inner = next(held for name, held in _optims(ledger).items() if mp in name)
        gaps = inner.get("param_alignment_paddings")
        sizes = {}
        for g, group in enumerate(file.root["param_shapes"]):
            owners = _owners_12([tuple(s) for s in group.values()], gaps[g] if gaps else [0] * len(group), dp)
            sizes[owners.size] = owners.reshape(-1)
        for leaf in (node for node in file.root["module"].values() if isinstance(node, TensorLeaf)):
            storage = _storage(ledger, leaf)
            owners = sizes.get(storage.length // leaf.extent.itemsize)
            if owners is not None:
                start = Extent.contiguous(path, storage.offset, (owners.size,), leaf.extent.dtype)
                _mark_positions(ledger, TensorLeaf(start), owners < 0)


def _mark_duplicates(ledger: Ledger) -> None:
    """A tensor with the same place in another rank's file and the same bytes, of which one is accounted for."""
    places: dict[str, list[TensorLeaf]] = {}
    for file in ledger.files.values():
        for place, node in walk(file.root):
            if isinstance(node, TensorLeaf) and node.inline is None:
                # A bf16 pipeline without ZeRO saves its optimizer in the model file too.
                places.setdefault(place.removeprefix("optimizer_state_dict.").removeprefix("optimizer."), []).append(
                    node
                )
    for copies in places.values():
        for leaf in [leaf for leaf in copies if not ledger.done(leaf.extent)]:
            bits = read_extent(ledger.root, leaf.extent)
            same = (c for c in copies if c.extent.shape == leaf.extent.shape and ledger.done(c.extent))
            if any(np.array_equal(bits, read_extent(ledger.root, c.extent)) for c in same):
                ledger.mark(leaf.extent)


def audit_entries(root: Path, catalog: Catalog) -> list[str]:
    """Every entry of every file that is neither the layout's, nor in the carried state with its value."""
    ledger = Ledger(root, catalog)
    missing: list[str] = []
    for path, file in ledger.files.items():
        name = path.rpartition("/")[2]
        if "layer_" in name or not name.endswith("_states.pt"):
            if "layer_" not in name and not plain_equal(catalog.state["around"][name], file.root):
                missing.append(f"{path}: other content")
            continue
        rank = _rank(catalog, name)
        for place, value in _entries(file.root):
            if not any(plain_equal(value, held) for held in _held(catalog, rank, place)):
                missing.append(f"{path}: {'.'.join(map(str, place))}")
    return missing


def _rank(catalog: Catalog, name: str) -> int:
    mp = int(name.partition("mp_rank_")[2][:2])
    dp = int(name.partition("zero_pp_rank_")[2].partition("_")[0] or 0)
    return catalog.source.mesh.rank({"pp": mp, "dp": dp})


def _entries(root: Mapping[str, Any]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Entries that must be carried, with the place they must have in the state."""
    if "optimizer_state_dict" in root:
        for key, value in root["optimizer_state_dict"].items():
            if key not in INNER_LAYOUT:
                yield ("optimizer", key), value
        yield ("ds_config",), root["ds_config"]
        yield ("ds_version",), root["ds_version"]
        return
    for key, value in root.items():
        if key not in LAYOUT:
            yield ((key,) if key in ENGINE else ("client_state", key)), value


def _held(catalog: Catalog, rank: int, place: tuple[Any, ...]) -> Iterator[Any]:
    """The value at a place of the state: common, of this rank, or put together from both."""
    found = []
    for tree in (catalog.state, catalog.state.get("per_rank", {}).get(rank, {})):
        node = tree
        for key in place:
            node = node.get(key, KeyError) if isinstance(node, dict) else KeyError
        if node is not KeyError:
            found.append(node)
    yield from found
    if len(found) == 2 and all(isinstance(node, dict) for node in found):
        yield found[0] | found[1]
