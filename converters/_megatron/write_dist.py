"""A catalog as a ``torch_dist`` checkpoint, which Megatron-Core loads at any number of ranks.

Keys are those of ``sharded_state_dict`` (megatron/core/transformer/transformer_block.py and what is below it); those of
optimizers: megatron/core/dist_checkpointing/optimizer.py and, for the distributed one, ``fully_reshardable``
(megatron/core/optimizer/distrib_optimizer.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ucp.catalog import Catalog, ParamGroup
from ucp.layout import FlatRange, Shape, numel
from ucp.plan import Cover, Digests, Task, Witness
from ucp.tree import Tree

from .._dcp.folder import METADATA, Blob, Chunk, Entry, Run, lay_out
from .._deepspeed_universal.carry import CLASSES, inlined
from .folder import COMMON, METADATA_JSON
from .write_around import Around, group_trees, split, step_leaf
from .write_choice import FAMILY, MOMENTS, Choice, is_trained

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_LINEAR = re.compile(r"((?:.+\.)?linear_\w+)\.weight")
_EXPERTS = ".experts.experts."
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_EXACT = "float32"


@dataclass(frozen=True)
class DistTarget:
    """A torch_dist checkpoint in a root of its own, to be written."""

    around: Around
    tasks: tuple[Task, ...]
    metadata: bytes
    losses: tuple[str, ...]
    notes: tuple[str, ...]
    family: str = FAMILY

    @property
    def root(self) -> str:
        """The tracker file."""
        return self.around.tracker[0]

    def finish(self, digests: Mapping[str, Digests]) -> Iterator[tuple[str, bytes]]:
        """``.metadata``, what is common to all ranks, the format, the tracker file."""
        del digests
        folder = self.around.folder
        yield f"{folder}{METADATA}", self.metadata
        yield f"{folder}{COMMON}", self.around.dumps(_common(self.around), archive="common")
        yield f"{folder}{METADATA_JSON}", json.dumps(_BACKEND).encode()
        yield self.around.tracker


def make_dist(around: Around, whole: Catalog, *, losses: tuple[str, ...]) -> DistTarget:
    """Lay out `whole`, the tensors of the model under their keys."""
    choice = around.choice
    cutting = _Cutting.of(choice, whole)
    entries = [entry for name in whole.tensors for entry in _entries(whole, name, choice, cutting)]
    blobs = [*_extra_states(whole, choice, cutting), *_rng(around)]
    folder = lay_out(entries, blobs, folder=around.folder)
    return DistTarget(around, folder.tasks, folder.metadata, (*around.losses, *losses), around.notes)


def _entries(whole: Catalog, name: str, choice: Choice, cutting: _Cutting) -> Iterator[Entry]:
    tensor, cover = whole.tensors[name], whole.cover(name, "value")
    weights = choice.weight_dtype(name, cover.spec.dtype)
    yield _entry(name, name, cover, weights, cutting, whole.witness(name))
    if choice.optimizer == "none" or not is_trained(tensor):
        return
    master = {"distributed": "param", "float16": "fp32_param"}.get(choice.optimizer)
    if master:
        yield _entry(f"optimizer.state.{master}.{name}", name, cover, _EXACT, cutting)
    for state in MOMENTS:
        yield _entry(f"optimizer.state.{state}.{name}", name, whole.cover(name, state), _EXACT, cutting)


def _entry(key: str, name: str, cover: Cover, dtype: str, cutting: _Cutting, witness: Witness | None = None) -> Entry:
    chunks = tuple(
        Chunk(offsets, sizes, (Run(cover, region, witness, dtype),), file)
        for offsets, sizes, region, file in cutting.chunks(name, cover.spec.shape)
    )
    return Entry(key, cover.spec.shape, dtype, chunks)


@dataclass(frozen=True, slots=True)
class _Cutting:
    """Which part of a tensor is a chunk of its own, and in which file: that of a rank which will read it.

    Chunks are whole layers, and inside them experts or, where they divide, equal runs of rows.
    """

    pp: int
    tp: int
    ep: int
    layers: int
    stacked: bool

    @classmethod
    def of(cls, choice: Choice, whole: Catalog) -> _Cutting:
        degrees = choice.degrees
        if choice.each:
            numbers = [int(match[1]) for name in whole.tensors if (match := _LAYER.match(name))]
            layers = 1 + max(numbers, default=0)
        else:
            found = (
                t.states["value"].shape[0] for name, t in whole.tensors.items() if name.startswith("decoder.layers.")
            )
            layers = next(found, 1)
        return cls(degrees["pp"], degrees["tp"], degrees["ep"], layers, not choice.each)

    def chunks(self, name: str, shape: Shape) -> Iterator[tuple[Shape, Shape, FlatRange, int]]:
        """(offsets, sizes, elements, file) of each chunk of a tensor of `shape`."""
        if self.stacked and name.startswith("decoder.layers."):
            for layer in range(shape[0]):
                yield from self._inside(name, shape, (layer,), self._stage(layer))
            return
        match = _LAYER.match(name)
        at = self.pp - 1 if name.startswith(("output_layer.", "decoder.final")) else 0
        yield from self._inside(name, shape, (), self._stage(int(match[1])) if match else at)

    def _stage(self, layer: int) -> int:
        return layer * self.pp // self.layers

    def _inside(
        self, name: str, shape: Shape, before: Shape, stage: int
    ) -> Iterator[tuple[Shape, Shape, FlatRange, int]]:
        """Chunks of what is below the indices `before`."""
        rest, width = shape[len(before) :], max(self.tp, self.ep)
        rows = rest[0] if rest else 1
        experts = _EXPERTS in name
        parts = rows if experts else self.tp if len(rest) > 1 and rows % self.tp == 0 else 1
        step, below = rows // parts, numel(rest[1:])
        first = (before[0] if before else 0) * rows
        for part in range(parts):
            offsets = (*before, part * step, *(0 for _ in rest[1:])) if rest else before
            sizes = (*(1 for _ in before), step, *rest[1:]) if rest else (*(1 for _ in before),)
            region = FlatRange((first + part * step) * below, step * below)
            place = part * self.ep // parts if experts else part
            yield offsets, sizes, region, stage * width + place


def _extra_states(whole: Catalog, choice: Choice, cutting: _Cutting) -> Iterator[Blob]:
    """State that modules without tensors of their own ask for: nothing, as Megatron-Core's own layers have it."""
    for name in whole.tensors:
        match = _LINEAR.fullmatch(name)
        if match and name.startswith("decoder.layers."):
            shape = whole.tensors[name].states["value"].shape
            grid = shape[: int(cutting.stacked) + (_EXPERTS in name)]
            yield from _nothing(match[1], grid)
    if choice.te:
        yield from _engine_states(whole, cutting)


def _engine_states(whole: Catalog, cutting: _Cutting) -> Iterator[Blob]:
    """Modules of Transformer Engine that have such state too; a job takes what it asks for."""
    for name in whole.tensors:
        grid = whole.tensors[name].states["value"].shape[: int(cutting.stacked and name.startswith("decoder.layers."))]
        if name.endswith("self_attention.linear_proj.weight"):
            yield from _nothing(name.replace("linear_proj.weight", "core_attention"), grid)
        if name.endswith(("layernorm.weight", "output_layer.weight")):
            yield from _nothing(name.removesuffix(".weight"), grid)


def _nothing(module: str, grid: Shape) -> Iterator[Blob]:
    """``ShardedObject.unique_key`` (megatron/core/dist_checkpointing/mapping.py); data as a list of one object."""
    places: list[Shape] = [()]
    for n in grid:
        places = [(*place, i) for place in places for i in range(n)]
    for place in places:
        at, of = ".".join(map(str, place or (0,))), ".".join(map(str, grid or (1,)))
        yield Blob.of(f"{module}._extra_state/shard_{at}_{of}", [None])


def _rng(around: Around) -> Iterator[Blob]:
    """``rng_state``, an object for each stage and tensor-parallel rank."""
    pp, tp = around.choice.degrees["pp"], around.choice.degrees["tp"]
    for (stage, rank), tree in around.rng.items():
        data = inlined([tree], around.store)
        yield Blob.of(f"rng_state/shard_{stage}.{rank}_{pp}.{tp}", data, classes=CLASSES)


def _common(around: Around) -> dict[str, Tree]:
    """``common.pt``: what is not cut among ranks."""
    choice = around.choice
    content: dict[str, Tree] = {"chained_optim_avoid_prefix": True}
    if choice.each:
        content["non_homogeneous_layers"] = True
    if choice.optimizer == "distributed":
        content["distrib_optim_sharding_type"] = "fully_reshardable"
    tree = dict(around.common)
    if choice.optimizer != "none":
        chained = choice.moe and choice.degrees["ep"] > 1
        each = [_optimizer(around, groups) for groups in split(around.groups, chained=chained)]
        tree["optimizer"] = dict(enumerate(each)) if chained else each[0]
    return {**tree, "content_metadata": content}


def _optimizer(around: Around, groups: Sequence[ParamGroup]) -> dict[str, Tree]:
    kind = around.choice.optimizer
    if kind == "distributed":
        inner = {"param_groups": group_trees(groups, step=True)}
        return {"optimizer": inner, **around.scaler(), "param_state_sharding_type": "fully_reshardable"}
    assert around.step is not None
    plain = {"state": {"common_step": step_leaf(around.step)}, "param_groups": group_trees(groups, step=False)}
    return plain if kind == "fp32" else {"optimizer": plain, **around.scaler()}
