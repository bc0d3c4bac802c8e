"""Optimizer states in ``mp_rank_*`` folders: by position in the order of parameters, or in one flat tensor per buffer.

megatron/core/optimizer/optimizer.py (``state_dict`` of ``Float16OptimizerWithFloat16Params`` and ``FP32Optimizer``) and
distrib_optimizer.py (``get_parameter_state_dp_zero``, whose buckets are joined without the padding between them).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ucp.container.values import Reference
from ucp.errors import CorruptError, FitError, NotFoundError
from ucp.layout import Box
from ucp.plan import Extent, Fragment, TensorSpec
from ucp.tree import TensorLeaf, Tree

from .around import add_steps
from .experts import single
from .flatten import starts_of
from .folder import PARAMETERS
from .found import Found
from .groups import Optimizer, Parameter, inner_of, members, optimizers_of, scalar
from .ranks import MISSING, Legacy, Rank

_MASTERS = ("fp32_from_fp16_params", "fp32_from_fp16")
_EDGES = ("word_embeddings.weight", "output_layer.weight", "word_embeddings_for_head.weight")


class Item(NamedTuple):
    """A parameter of a rank: the model chunk it is in, its name there, and its weight."""

    chunk: int
    name: str
    leaf: TensorLeaf

    @property
    def parameter(self) -> Parameter:
        """What tells its param group; names of several chunks are alike, so the chunk is part of it."""
        return Parameter(f"{self.chunk}:{self.name}", len(self.leaf.extent.shape), False)


def read_optimizers(
    legacy: Legacy, rank: Rank, chunks: Sequence[Found]
) -> list[tuple[Optimizer, list[tuple[int, Parameter]]]]:
    """Put the states of the rank's parameters in the `chunks` they are of.

    Gives each of its optimizers, with its parameters and the number of the chunk that each is in.

    NotFoundError for a missing ``distrib_optim.pt``, CorruptError for states that are not of these parameters, FitError
    for formats that are not known.
    """
    optimizers = optimizers_of(rank.optimizer, where=rank.path)
    held = _parameters(legacy, rank, len(optimizers))
    for one in chunks:
        one.trained = bool(optimizers)
    states = _states(rank.optimizer)
    for number, (optimizer, items) in enumerate(zip(optimizers, held, strict=True)):
        if rank.parameters is not None or legacy.args.truth("use_distributed_optimizer"):
            _read_flat(legacy, rank, number, len(optimizers), items, chunks)
        else:
            _read_numbered(legacy, rank, states[number], optimizer, items, chunks)
        for chunk, part in enumerate(chunks):
            named = [one for i in items if i.chunk == chunk for one in _named(legacy, i)]
            add_steps(legacy.store, part, [optimizer], [named], where=rank.path)
    return [
        (optimizer, [(i.chunk, one) for i in items for one in _named(legacy, i)])
        for optimizer, items in zip(optimizers, held, strict=True)
    ]


def _named(legacy: Legacy, item: Item) -> Iterator[Parameter]:
    """The tensors that a parameter is."""
    for name, extent in single(item.name, item.leaf.extent, experts=legacy.args.local_experts):
        yield Parameter(name, len(extent.shape), legacy.is_expert(name))


def _parameters(legacy: Legacy, rank: Rank, optimizers: int) -> list[list[Item]]:
    every = [Item(*one) for one in legacy.named(rank)]
    if optimizers < 2:
        return [every] * optimizers
    if optimizers > 2:
        raise FitError(f"{rank.path}: {optimizers} chained optimizers are not supported")
    return [[i for i in every if not legacy.is_expert(i.name)], [i for i in every if legacy.is_expert(i.name)]]


def _states(tree: Tree) -> list[Mapping[str, Tree]]:
    if isinstance(tree, Mapping) and tree and all(isinstance(key, int) for key in tree):
        tree = [tree[number] for number in sorted(tree)]
    return tree if isinstance(tree, list) else [tree]


def _read_numbered(
    legacy: Legacy,
    rank: Rank,
    tree: Mapping[str, Tree],
    optimizer: Optimizer,
    items: Sequence[Item],
    chunks: Sequence[Found],
) -> None:
    """States by number: numbers count through the groups, and each group has its parameters in the module's order."""
    decay = bool(legacy.args.truth("apply_wd_to_qk_layernorm"))
    by_key = {item.parameter: item for item in items}
    spread = {one._replace(expert=legacy.is_expert(by_key[one].name)): item for one, item in by_key.items()}
    grouped = members(optimizer.groups, list(spread), decay_qk=decay)
    listed = [group.get("params") for group in optimizer.groups]
    if grouped is None or [len(held) for held in grouped] != [len(ids or ()) for ids in listed]:
        raise FitError(
            f"{rank.path}: it cannot be told which parameters the optimizer's {len(listed)} param groups have",
            hint="load and save it as torch_dist with Megatron-Core, which names the states",
        )
    state = inner_of(tree).get("state")
    masters = next((tree[key] for key in _MASTERS if key in tree), None)
    if not isinstance(state, Mapping):
        raise CorruptError(f"{rank.path}: the optimizer has no state")
    for number, (ids, held) in enumerate(zip(listed, grouped, strict=True)):
        given = _masters(masters, number, [spread[one] for one in held], rank.path)
        for index, one, master in zip(ids or (), held, given, strict=True):
            item = spread[one]
            if master is not None:
                _add(rank, chunks[item.chunk], item, "param", master, legacy.args.local_experts)
            values = state.get(index)
            for name, value in (values if isinstance(values, Mapping) else {}).items():
                if isinstance(value, TensorLeaf) and value.extent.shape:
                    _add(rank, chunks[item.chunk], item, str(name), value, legacy.args.local_experts)
                elif (number_of := scalar(legacy.store, value)) is not None:
                    for one_of in _named(legacy, item):
                        chunks[item.chunk].scalars.setdefault(one_of.name, {})[str(name)] = number_of


def _masters(masters: Tree, group: int, items: Sequence[Item], where: str) -> list[TensorLeaf | None]:
    """The fp32 masters of a group's parameters; none for those that are fp32 themselves."""
    if masters is None:
        return [None] * len(items)
    listed = masters[group] if isinstance(masters, list) and group < len(masters) else None
    low = [item for item in items if item.leaf.extent.dtype in ("bfloat16", "float16")]
    if not isinstance(listed, list) or len(listed) != len(low):
        raise CorruptError(f"{where}: the optimizer's masters are not those of the model's parameters")
    left = iter(listed)
    return [next(left) if item.leaf.extent.dtype in ("bfloat16", "float16") else None for item in items]


def _add(rank: Rank, found: Found, item: Item, state: str, value: Tree, experts: int) -> None:
    if not isinstance(value, TensorLeaf) or value.extent.shape != item.leaf.extent.shape:
        shape = list(value.extent.shape) if isinstance(value, TensorLeaf) else type(value).__name__
        own = list(item.leaf.extent.shape)
        raise CorruptError(
            f"{rank.path}: {item.name} has shape {own}, but the optimizer's {state} has {shape}",
            hint="parameters are in another order than the optimizer's: the file is of a model that is not known",
        )
    _add_extent(found, item, state, value.extent, experts)


def _add_extent(found: Found, item: Item, state: str, extent: Extent, experts: int) -> None:
    for name, one in single(item.name, extent, experts=experts):
        found.add(name, state, TensorSpec(one.shape, one.dtype), [Fragment(Box.whole(one.shape), one)])


def _read_flat(
    legacy: Legacy, rank: Rank, number: int, optimizers: int, items: Sequence[Item], chunks: Sequence[Found]
) -> None:
    """States in ``distrib_optim.pt``. Only the first expert-parallel rank keeps those of what is no expert."""
    home = rank
    if number == 0 and optimizers > 1:
        home = next((r for r in _alike(legacy, rank) if _kept(r, 0, optimizers) is not None), rank)
    tree = _kept(home, number, optimizers)
    if tree is None:
        if not items:
            return
        raise NotFoundError(
            f"{legacy.store.url}/{home.path.rpartition('/')[0]}/{PARAMETERS}: no such file, or nothing of optimizer "
            f"{number} in it",
            hint=MISSING,
        )
    where = f"{home.path.rpartition('/')[0]}/{PARAMETERS}"
    if not tree.get("buckets_coalesced"):
        raise FitError(
            f"{where}: flat tensors in the layout of before February 2024 are not supported",
            hint="convert it with Megatron-LM's --ckpt-convert-update-legacy-dist-opt-format",
        )
    buffers = [
        buffer for index in sorted(k for k in tree if isinstance(k, int)) for buffer in by_dtype(tree[index], where)
    ]
    wanted = list(_buffers(items))
    if len(wanted) != len(buffers):
        raise CorruptError(f"{where}: {len(buffers)} buffers, but the model's parameters make {len(wanted)}")
    for held, (dtypes, tensors) in zip(wanted, buffers, strict=True):
        _place(legacy, rank, held, dtypes, tensors, chunks, where)


def by_dtype(tree: Tree, where: str) -> list[tuple[Tree, Mapping[str, Tree]]]:
    """What is saved for each pair of dtypes of one buffer; CorruptError if that is no dict of dicts."""
    if not isinstance(tree, Mapping) or not all(isinstance(held, Mapping) for held in tree.values()):
        raise CorruptError(f"{where}: a buffer that is no dict of flat tensors", hint="copy the folder again")
    return list(tree.items())


def _alike(legacy: Legacy, rank: Rank) -> Iterator[Rank]:
    """Ranks with the same tensors but experts."""
    for place, other in legacy.ranks.items():
        if (place.pp, place.tp) == (rank.place.pp, rank.place.tp):
            yield other


def _kept(rank: Rank, number: int, optimizers: int) -> Mapping[Tree, Tree] | None:
    kept = rank.parameters
    if isinstance(kept, list):
        kept = kept[number] if number < len(kept) else None
    elif optimizers > 1:
        kept = None
    return kept if isinstance(kept, Mapping) else None


def _buffers(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Parameters of each buffer: one for each dtype of each model chunk."""
    found: dict[tuple[int, str], list[Item]] = {}
    for chunk, item in sorted(((item.chunk, item) for item in items), key=lambda pair: pair[0]):
        found.setdefault((chunk, item.leaf.extent.dtype), []).append(item)
    yield from found.values()


def _place(
    legacy: Legacy,
    rank: Rank,
    items: Sequence[Item],
    dtypes: Tree,
    tensors: Mapping[str, Tree],
    chunks: Sequence[Found],
    where: str,
) -> None:
    dtype = items[0].leaf.extent.dtype
    told = dtypes[0] if isinstance(dtypes, tuple) and dtypes else None
    if not isinstance(told, Reference) or told.name != dtype:
        raise CorruptError(f"{where}: a buffer of {dtypes!r:.80} where the model's parameters are {dtype}")
    leaves = {str(state): value for state, value in tensors.items() if isinstance(value, TensorLeaf)}
    if "param" not in leaves:
        raise CorruptError(f"{where}: a buffer without masters")
    total = leaves["param"].extent.size
    starts = starts_of(
        legacy.args,
        [item.leaf.extent.size for item in items],
        edges=[number for number, item in enumerate(items) if item.name.endswith(_EDGES)],
        first=rank.place.pp == 0 and items[0].chunk == 0,
        total=total,
    )
    if starts is None:
        raise CorruptError(
            f"{where}: a buffer of {total} elements is not that of the {len(items)} parameters in {rank.path}",
            hint="files of two jobs are mixed, or buckets were filled in a way that is not known",
        )
    for state, leaf in leaves.items():
        if leaf.extent.shape != (total,) or not leaf.extent.is_contiguous:
            raise CorruptError(f"{where}: {state} has shape {list(leaf.extent.shape)}, but masters have [{total}]")
        for item, start in zip(items, starts, strict=True):
            at = leaf.extent.offset + start * leaf.extent.itemsize
            one = Extent.contiguous(leaf.extent.object, at, item.leaf.extent.shape, leaf.extent.dtype)
            _add_extent(chunks[item.chunk], item, state, one, legacy.args.local_experts)
