"""Reads ``mp_rank_*`` folders: one file for each model-parallel rank, as Megatron-LM saved before ``torch_dist``.

megatron/training/checkpointing.py (``get_checkpoint_name``, ``generate_state_dict``): ``mp_rank_TT``,
``mp_rank_TT_PPP``, ``mp_rank_TT_EEE`` or ``mp_rank_TT_PPP_EEE`` hold ``model_optim_rng.pt``, and with a distributed
optimizer ``distrib_optim.pt``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ucp.container.torchfile import TorchFile, TorchFiles
from ucp.errors import ConflictError, CorruptError, NotFoundError
from ucp.store import Store
from ucp.tree import TensorLeaf, Tree

from .arguments import Arguments
from .around import iteration_of
from .folder import MODEL, PARAMETERS, Folder, ranks

MISSING = "every model-parallel rank has a folder of its own: copy the whole iteration again"
_NO_PARAMETERS = ("_extra_state", "expert_bias", "inv_freq", "local_tokens_per_expert")
_BUFFERS = ("expert_bias",)
_CHUNK = re.compile(r"model(\d*)")


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A model-parallel rank."""

    pp: int
    tp: int
    ep: int = 0


@dataclass(frozen=True, slots=True)
class Rank:
    """What one model-parallel rank saved: its chunks' tensors by name, in the order of registration."""

    place: Place
    path: str
    root: Mapping[str, Tree]
    chunks: Sequence[Mapping[str, TensorLeaf]]
    parameters: Mapping[str, Tree] | Sequence[Tree] | None
    """What ``distrib_optim.pt`` holds."""

    @property
    def optimizer(self) -> Tree:
        """The optimizer's state dict, None without one."""
        return self.root.get("optimizer")


@dataclass(frozen=True)
class Legacy:
    """All ranks of a checkpoint. Every file is looked into, none is read."""

    store: Store
    folder: Folder
    args: Arguments
    ranks: Mapping[Place, Rank]
    files: Sequence[TorchFile]

    @property
    def first(self) -> Rank:
        """The rank whose training state counts where it is the same on all."""
        return self.ranks[Place(0, 0)]

    @property
    def where(self) -> str:
        """The file of the first rank, for errors."""
        return f"{self.store.url}/{self.first.path}"

    def is_expert(self, name: str) -> bool:
        """Whether a parameter is of experts that are spread over ranks, whose optimizer is their own."""
        return self.args.ep > 1 and ".experts." in name

    def named(self, rank: Rank, *, experts: bool | None = None) -> Iterator[tuple[int, str, TensorLeaf]]:
        """(chunk, name, tensor) of the parameters of a rank, all or only of experts or of the rest."""
        for number, chunk in enumerate(rank.chunks):
            for name, leaf in chunk.items():
                if not name.endswith(_NO_PARAMETERS) and experts in (None, self.is_expert(name)):
                    yield number, name, leaf


def load(store: Store, folder: Folder) -> Legacy:
    """Look into every rank's files.

    NotFoundError for missing ones, CorruptError for folders or chunks that the arguments contradict, ConflictError for
    files of different iterations.
    """
    folders = ranks(folder, store)
    files = TorchFiles(store)
    models = {numbers: files.read(_file(store, path, MODEL)) for numbers, path in sorted(folders.items())}
    first = next(iter(models.values()))
    args = Arguments.of(_dict(first).get("args"), where=f"{store.url}/{first.entry.path}")
    places = {numbers: _place(numbers, args, first.entry.path) for numbers in folders}
    _require_all(store, folder, args, set(places.values()))
    held: dict[Place, Rank] = {}
    others = []
    for numbers, path in sorted(folders.items()):
        parameters = None
        if store.exists(path + PARAMETERS):
            others.append(files.read(path + PARAMETERS))
            parameters = others[-1].root
        file, place = models[numbers], places[numbers]
        held[place] = Rank(place, file.entry.path, _dict(file), _chunks(file), parameters)
    legacy = Legacy(store, folder, args, dict(sorted(held.items())), [*models.values(), *others])
    _check_saves(legacy)
    return legacy


def _file(store: Store, path: str, name: str) -> str:
    if not store.exists(path + name):
        raise NotFoundError(f"{store.url}/{path}{name}: no such file", hint=MISSING)
    return path + name


def _dict(file: TorchFile) -> Mapping[str, Tree]:
    if not isinstance(file.root, Mapping):
        raise CorruptError(f"{file.entry.path}: is a {type(file.root).__name__}, not a dict")
    return file.root


def _place(numbers: tuple[int, ...], args: Arguments, path: str) -> Place:
    tp, *rest = numbers
    wanted = (args.pp > 1) + (args.ep > 1)
    # Megatron-LM of 2019 to 2021 named the stage even if there was one.
    if len(rest) < wanted or (len(rest) > wanted and any(rest)):
        raise CorruptError(
            f"{path}: args say {args.pp} stages and {args.ep} expert-parallel ranks, but folders are named otherwise",
            hint="args and folders are of different jobs",
        )
    if args.pp > 1:
        return Place(rest[0], tp, rest[1] if len(rest) > 1 else 0)
    return Place(0, tp, rest[-1] if args.ep > 1 else 0)


def _require_all(store: Store, folder: Folder, args: Arguments, found: set[Place]) -> None:
    """NotFoundError for a rank without a folder, CorruptError for one too many.

    Which (tp, ep) there are: ranks count tp fastest, and within experts etp before ep (parallel_state.py).
    """
    period = math.lcm(args.tp, args.etp * args.ep)
    pairs = {(rank % args.tp, rank // args.etp % args.ep) for rank in range(period)}
    wanted = {Place(stage, tp, ep) for stage in range(args.pp) for tp, ep in pairs}
    base = f"{store.url}/{folder.path}"
    if wanted - found:
        missing = min(wanted - found)
        raise NotFoundError(
            f"{base}: no folder of {told(missing, args)}; the job had {len(wanted)} model-parallel ranks", hint=MISSING
        )
    if found - wanted:
        raise CorruptError(
            f"{base}: a folder of {told(max(found - wanted), args)}, but args say there were {len(wanted)} ranks",
            hint="two saves wrote into one folder; remove the folders of the older one",
        )


def told(place: Place, args: Arguments) -> str:
    """``tp 1 pp 0``: the axes that the job had."""
    axes = {"tp": place.tp, **({"pp": place.pp} if args.pp > 1 else {}), **({"ep": place.ep} if args.ep > 1 else {})}
    return " ".join(f"{axis} {index}" for axis, index in axes.items())


def _chunks(file: TorchFile) -> list[dict[str, TensorLeaf]]:
    """Tensors of ``model``, or of ``model0``, ``model1`` …, nested dicts joined by dots."""
    root = _dict(file)
    numbers = {int(match[1] or 0): key for key in root if (match := _CHUNK.fullmatch(str(key)))}
    if not numbers or sorted(numbers) != list(range(len(numbers))):
        raise CorruptError(f"{file.entry.path}: there is no model in it, or a chunk of it is missing")
    return [dict(_leaves(root[numbers[number]], "")) for number in sorted(numbers)]


def _leaves(node: Tree, prefix: str) -> Iterator[tuple[str, TensorLeaf]]:
    if isinstance(node, TensorLeaf):
        yield prefix, node
    elif isinstance(node, Mapping):
        for name, value in node.items():
            yield from _leaves(value, f"{prefix}.{name}" if prefix else str(name))


def _check_saves(legacy: Legacy) -> None:
    """ConflictError if ranks are of different iterations or of different jobs."""
    told = {place: iteration_of(rank.root, None, where=rank.path) for place, rank in legacy.ranks.items()}
    first = legacy.first
    for place, iteration in told.items():
        if iteration != told[first.place]:
            raise ConflictError(
                f"{legacy.store.url}/{legacy.ranks[place].path}: is of iteration {iteration}, "
                f"but {first.path} is of {told[first.place]}",
                hint="files of two saves are mixed: copy the whole iteration again",
            )
        if len(legacy.ranks[place].chunks) != legacy.args.vpp:
            raise CorruptError(
                f"{legacy.ranks[place].path}: {len(legacy.ranks[place].chunks)} model chunks, "
                f"but args say {legacy.args.vpp}"
            )
