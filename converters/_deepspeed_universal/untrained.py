"""Frozen parameters and buffers of a folder that keeps them in its model files alone.

DeepSpeed's own converter copies the model files; stage 3 keeps buffers whole and frozen parameters as flat slices, one
per rank (deepspeed/runtime/engine.py, ``_get_zero_frozen_param_attributes``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from ucp.container.torchfile import TorchFile, read_torch_file
from ucp.layout import Box, FlatRange, Shape
from ucp.plan import Extent, Fragment, TensorSpec
from ucp.store import Store
from ucp.tree import TensorLeaf, Tree

from .._deepspeed import nodes

_SHARD = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_model_states\.pt")


def untrained(
    store: Store, prefix: str, model: Mapping[str, Tree], *, known: set[str], files: list[TorchFile]
) -> Iterator[tuple[str, TensorSpec, tuple[Fragment, ...]]]:
    """Name, spec and fragments of every buffer and frozen parameter that is not `known` yet.

    Appends the files that it reads to `files`.
    """
    frozen = nodes.mapping(model.get("frozen_param_shapes") or {}, "frozen_param_shapes")
    buffers = nodes.sequence(model.get("buffer_names") or (), "buffer_names")
    module = nodes.mapping(model.get("module") or {}, "module")
    left: dict[str, Shape] = {}
    for name in (str(name) for name in (*buffers, *frozen) if name not in known):
        leaf = module.get(name)
        shape = nodes.shape(frozen[name], name) if name in frozen else None
        if nodes.is_tensor(leaf) and shape in (None, leaf.extent.shape):
            yield name, TensorSpec(leaf.extent.shape, leaf.extent.dtype), (_whole(leaf),)
        elif shape is not None:
            left[name] = shape
    if left and model.get("frozen_param_fragments"):
        yield from _sliced(store, prefix, left, files)


def _whole(leaf: TensorLeaf) -> Fragment:
    return Fragment(Box.whole(leaf.extent.shape), leaf.extent)


def _sliced(
    store: Store, prefix: str, shapes: Mapping[str, Shape], files: list[TorchFile]
) -> Iterator[tuple[str, TensorSpec, tuple[Fragment, ...]]]:
    """Rank r of n holds elements [r·p, (r+1)·p) of the flat tensor, p = ceil(size / n), and padding after its end."""
    ranks = {int(match[1]): name for name in store.children(prefix.rstrip("/")) if (match := _SHARD.fullmatch(name))}
    slices: dict[str, list[tuple[int, TensorLeaf]]] = {name: [] for name in shapes}
    for rank, file_name in sorted(ranks.items()):
        file = read_torch_file(store, prefix + file_name)
        files.append(file)
        held = nodes.mapping(nodes.mapping(file.root, file_name).get("frozen_param_fragments") or {}, file_name)
        for name in shapes:
            slices[name].append((rank, nodes.tensor(held.get(name), f"{file_name}: frozen_param_fragments.{name}")))
    for name, shape in shapes.items():
        parts = slices[name]
        yield name, TensorSpec(shape, parts[0][1].extent.dtype), tuple(_slices(parts, shape))


def _slices(parts: list[tuple[int, TensorLeaf]], shape: Shape) -> Iterator[Fragment]:
    size = math.prod(shape)
    width = -(-size // len(parts))
    for rank, leaf in parts:
        length = max(0, min(width, size - rank * width))
        extent = leaf.extent
        if length:
            flat = Extent(extent.object, extent.offset, (length,), (1,), extent.dtype)
            yield Fragment(FlatRange(rank * width, length), flat)
