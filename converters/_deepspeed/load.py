"""Reads the pickles of every file of a checkpoint, one `Save` per tensor-parallel rank.

Which files there must be: deepspeed/runtime/engine.py, ``_common_checkpoint_state`` (``dp_world_size``,
``checkpoint_parallel_dimensions``) and ``_configure_checkpointing`` (which rank writes what).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ucp.catalog import Checksum
from ucp.container.torchfile import TorchFile, TorchFiles
from ucp.errors import ConflictError, CorruptError, NotFoundError
from ucp.layout import Mesh
from ucp.store import Store
from ucp.tree import Tree

from . import nodes
from .files import Folder

MISSING_HINT = "every rank writes its own file; copy the whole tag folder, or use an earlier checkpoint"
MIXED_HINT = "these files are of different saves; copy the whole tag folder again, or use another checkpoint"
LEFTOVER_HINT = "two saves wrote into one folder; remove the files of the older one"


@dataclass(frozen=True, slots=True)
class RankFile:
    """One file of one rank, as an inert tree."""

    path: str
    root: Mapping[str, Tree]


@dataclass(frozen=True, slots=True)
class Save:
    """The files of one tensor-parallel rank, out of `degree`: what a job without tensor parallelism would have saved.

    `models` is keyed by (pp, dp), with dp 0 alone for ZeRO 0 to 2; `optims` by (pp, dp) and empty where the optimizer
    is inside the model files; `layers` by pipeline layer. `shared` maps aliases to names, which the file of global rank
    0 alone tells.
    """

    folder: Folder
    mesh: Mesh
    stage: int
    models: Mapping[tuple[int, int], RankFile]
    optims: Mapping[tuple[int, int], RankFile]
    layers: Mapping[int, RankFile]
    files: tuple[TorchFile, ...]
    shared: Mapping[str, str]
    tp: int = 0
    degree: int = 1
    experts: Mapping[tuple[int, int, int], RankFile] = field(default_factory=dict)
    expert_optims: Mapping[tuple[int, int], RankFile] = field(default_factory=dict)

    @property
    def dp(self) -> int:
        """Data-parallel degree, over which ZeRO partitions."""
        return self.mesh["dp"]

    def number(self, pp: int) -> int:
        """What file names call the model-parallel rank of a stage: stages outermost, tensor-parallel ranks inside."""
        return pp * self.degree + self.tp

    @property
    def checksums(self) -> tuple[Checksum, ...]:
        """Everything the files let us verify."""
        return tuple(checksum for file in self.files for checksum in file.checksums)

    def ranks(self, mp: int) -> list[RankFile]:
        """Optimizer files of one model-parallel rank, in order of dp."""
        return [self.optims[mp, dp] for dp in range(self.dp)]

    def model(self, mp: int) -> RankFile:
        """The first model file of one model-parallel rank."""
        return self.models[mp, 0]

    def shards(self, mp: int) -> list[RankFile]:
        """Model files of one model-parallel rank, in order of dp; one file for ZeRO 0 to 2."""
        return [self.models[rank] for rank in sorted(self.models) if rank[0] == mp]


def load(store: Store, folder: Folder) -> tuple[Save, ...]:
    """Read every file of `folder`: the save of each tensor-parallel rank, in order.

    NotFoundError if there is no model file at all; whatever the file reader raises for a damaged or unsafe file.
    """
    base = f"{store.url}/{folder.path}"
    read = _Read(TorchFiles(store).read)
    optims = {rank: read(path) for rank, path in sorted(folder.optim.items())}
    stage = max((zero_stage(file) for file in optims.values()), default=0)
    models = {rank: read(path) for rank, path in sorted(_model_paths(base, folder, stage).items())}
    layers = {layer: read(path) for layer, path in sorted(folder.layers.items())}
    experts = {key: read(path) for key, path in sorted(folder.experts.items())}
    expert_optims = {rank: read(path) for rank, path in sorted(folder.expert_optims.items())}
    mesh, shared = _mesh(base, folder, models), _shared(models.values())
    degree, axes = mesh["tp"], Mesh({"pp": mesh["pp"], "tp": 1, "dp": mesh["dp"]})

    def save(tp: int) -> Save:
        held, states, plain = (_of_rank(files, tp, degree) for files in (models, optims, expert_optims))
        weights = {layer: file for (layer, rank), file in layers.items() if rank == tp}
        own = {(mp // degree, layer, e): file for (mp, layer, e), file in experts.items() if mp % degree == tp}
        every = [file for files in (states, held, weights, own, plain) for file in files.values()]
        return Save(folder, axes, stage, held, states, weights, read.files(every), shared, tp, degree, own, plain)

    return tuple(map(save, range(degree)))


def _of_rank(files: Mapping[tuple[int, int], RankFile], tp: int, degree: int) -> dict[tuple[int, int], RankFile]:
    """Files of one tensor-parallel rank by (pp, dp)."""
    return {(mp // degree, dp): file for (mp, dp), file in files.items() if mp % degree == tp}


class _Read:
    """Reads files and remembers them."""

    def __init__(self, read: Callable[[str], TorchFile]) -> None:
        self._read = read
        self._files: dict[str, TorchFile] = {}

    def __call__(self, path: str) -> RankFile:
        file = self._files[path] = self._read(path)
        return RankFile(path, nodes.mapping(file.root, path))

    def files(self, chosen: Iterable[RankFile]) -> tuple[TorchFile, ...]:
        """The files behind `chosen`."""
        return tuple(self._files[file.path] for file in chosen)


def zero_stage(file: RankFile) -> int:
    """ZeRO stage of an optimizer file.

    BF16_Optimizer (deepspeed/runtime/bf16_optimizer.py) writes none and partitions as stage 1 does.
    """
    inner = nodes.mapping(file.root.get("optimizer_state_dict"), f"{file.path}: optimizer_state_dict")
    return nodes.integer(inner.get("zero_stage", 1), f"{file.path}: zero_stage")


def _model_paths(base: str, folder: Folder, stage: int) -> dict[tuple[int, int], str]:
    """Paths of the model files: one per rank under ZeRO 3, else one per model-parallel rank."""
    if folder.model and folder.shards:
        raise ConflictError(
            f"{base}: {next(iter(folder.model.values()))} is of ZeRO 0 to 2, but "
            f"{next(iter(folder.shards.values()))} is of ZeRO 3",
            hint=LEFTOVER_HINT,
        )
    found = dict(folder.shards) if stage == 3 else {(mp, 0): path for mp, path in folder.model.items()}
    if folder.shards and not folder.optim:
        raise NotFoundError(f"{base}zero_pp_rank_0_mp_rank_00_optim_states.pt: missing", hint=MISSING_HINT)
    if not found:
        name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        raise NotFoundError(f"{base}{name}: missing", hint=MISSING_HINT)
    return found


def _mesh(base: str, folder: Folder, models: Mapping[tuple[int, int], RankFile]) -> Mesh:
    """Degrees of pipeline, tensor and data parallelism; NotFoundError for files of fewer ranks than that."""
    first = next(iter(models.values()))
    found = nodes.count(1 + max(mp for mp, _ in [*models, *folder.optim]), first.path)
    pp, tp = _degrees(first, folder, found)
    if pp < 1 or tp < 1:
        raise CorruptError(f"{first.path}: {pp} pipeline stages and {tp} tensor-parallel ranks")
    if tp > found:
        name = first.path.rpartition("/")[2]
        missing = base + re.sub(r"mp_rank_\d+", f"mp_rank_{found:02d}", name)
        raise NotFoundError(f"{missing}: missing; the job had {tp} tensor-parallel ranks", hint=MISSING_HINT)
    width = nodes.count(1 + max((dp for _, dp in folder.optim), default=0), first.path)
    dp = nodes.count(first.root.get("dp_world_size", width), f"{first.path}: dp_world_size")
    return Mesh({"pp": pp, "tp": tp, "dp": max(dp, 1)})


def _shared(models: Iterable[RankFile]) -> dict[str, str]:
    found: dict[str, str] = {}
    for file in models:
        for alias, name in nodes.mapping(file.root.get("shared_params") or {}, f"{file.path}: shared_params").items():
            found.setdefault(str(alias), str(name))
    return found


def _degrees(first: RankFile, folder: Folder, found: int) -> tuple[int, int]:
    """Degrees of pipeline and tensor parallelism.

    Before ``checkpoint_parallel_dimensions`` was saved (2026), tp is the number of files per pipeline layer, or all
    model-parallel ranks where there are no such files (deepspeed/checkpoint/reshape_3d_utils.py).
    """
    degrees = first.root.get("checkpoint_parallel_dimensions")
    if degrees is not None:
        where = f"{first.path}: checkpoint_parallel_dimensions"
        degrees = nodes.mapping(degrees, where)
        pp, tp = (nodes.count(degrees.get(name, 1), where) for name in ("pp_degree", "tp_degree"))
        # Megatron's own grid may not tell DeepSpeed about its tensor-parallel ranks.
        return (pp, tp) if pp * tp >= found or folder.layers else (pp, max(tp, found // max(pp, 1)))
    saved = nodes.count(first.root.get("mp_world_size", found), f"{first.path}: mp_world_size")
    if not folder.layers:
        return 1, max(found, saved)
    tp = 1 + max(tp for _, tp in folder.layers)
    return max(found, saved) // tp, tp
