"""Experts of native mixture-of-experts layers, which are spread over ranks.

A rank calls its experts by local numbers; of a layer's E experts under expert-parallel degree ep, rank e of the
expert-parallel group holds those from ``e * E / ep`` on (deepspeed/moe/layer.py; deepspeed/runtime/engine.py,
``_save_moe_checkpoint``). Weights are in a file per MoE layer and expert, under names with the global number, which are
those used here; optimizer files keep the local ones.

Who holds what (deepspeed/utils/groups.py, ``_create_expert_and_data_parallel``): consecutive data-parallel ranks are an
expert-parallel group, so the expert-parallel rank is ``dp % ep``; with ``use_data_before_expert_parallelism`` it is
``dp // (dp_world / ep)``. ZeRO partitions a group of experts over the ranks that hold the same ones, in order
(deepspeed/runtime/zero/stage_1_and_2.py, ``_configure_moe_settings``). Parameter groups hold experts of one degree or
none (deepspeed/moe/utils.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ucp.errors import ConflictError, CorruptError, FitError
from ucp.tree import Tree

from . import nodes
from .autoep import STACKED, stacked_of
from .flat import Shapes
from .load import MIXED_HINT, RankFile, Save

LAYER = "deepspeed_moe.experts.deepspeed_experts."
EXPERT = re.compile(rf"((?:.*\.)?{re.escape(LAYER)})(\d+)(\..*)")
"""A name in an expert: what the names in its layer begin with, the expert's number, and the rest."""

_GATE = "experts.deepspeed_experts."


def is_expert(name: str) -> bool:
    """Whether `name` is that of a parameter or buffer of an expert."""
    return EXPERT.fullmatch(name) is not None


def number_of(name: str) -> int | None:
    """The number of the expert that an entry of its file is of."""
    match = EXPERT.fullmatch(_own(name))
    stacked = STACKED.fullmatch(name)
    return int(match[2]) if match else int(stacked[2]) if stacked else None


def layer_of(name: str) -> tuple[str | None, int]:
    """What an expert's name begins with, and its number; None for what is of no expert."""
    match = EXPERT.fullmatch(name)
    return (match[1], int(match[2])) if match else (None, 0)


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of a checkpoint: how many each MoE layer has, by what names begin with before a number.

    `stacked` has the same by parameter, for layers of AutoEP.
    """

    counts: Mapping[str, int]
    data_first: bool = False
    stacked: Mapping[str, int] = field(default_factory=dict)

    def own(self, name: str) -> bool:
        """Whether a parameter is of experts."""
        return is_expert(name) or name in self.stacked

    def lanes(self, dp: int, ep: int) -> list[tuple[int, ...]]:
        """For each expert-parallel rank the data-parallel ranks that hold the same experts; `ep` divides `dp`."""
        width = dp // ep
        if self.data_first:
            return [tuple(range(e * width, (e + 1) * width)) for e in range(ep)]
        return [tuple(range(e, dp, ep)) for e in range(ep)]

    def name(self, name: str, e: int, ep: int, where: str) -> str:
        """What a parameter of expert-parallel rank `e` of `ep`, whose experts it calls by local numbers, is called.

        CorruptError for an expert that the files of weights do not know.
        """
        match = EXPERT.fullmatch(name)
        if match is None:
            if self.stacked.get(name, ep) % ep:
                raise CorruptError(f"{where}: {name} has {self.stacked[name]} experts on {ep} ranks", hint=MIXED_HINT)
            return name
        total, number = self.counts.get(match[1], 0), int(match[2])
        local = total // ep
        if total % ep or number >= local:
            raise CorruptError(
                f"{where}: {name} is of expert {number} on each of {ep} expert-parallel ranks, but the layer has "
                f"{total} experts",
                hint=MIXED_HINT,
            )
        return f"{match[1]}{e * local + number}{match[3]}"

    def names(self, shapes: Shapes, e: int, ep: int, where: str) -> dict[str, str]:
        """The global name of each local one."""
        return {name: self.name(name, e, ep, where) for name in shapes}


def experts_of(save: Save) -> Experts:
    """The experts that the files of all pipeline stages hold."""
    seen: dict[str, int] = {}
    for name in expert_entries(save):
        if match := EXPERT.fullmatch(name):
            seen[match[1]] = max(seen.get(match[1], 0), int(match[2]) + 1)
    return Experts(seen, _data_first(save.model(0)), stacked_of(save))


def _own(name: Tree) -> str:
    """A name in an expert's file; that of a model which is itself the MoE layer begins with a dot."""
    return str(name).removeprefix(".")


def _data_first(model: RankFile) -> bool:
    config = model.root.get("ds_config")
    return bool(config.get("use_data_before_expert_parallelism")) if isinstance(config, Mapping) else False


def degree_of(
    tree: Mapping[str, Tree],
    index: int,
    options: Mapping[str, Tree],
    names: Iterable[str],
    experts: Experts,
    dp: int,
    where: str,
) -> int:
    """The expert-parallel degree of flat group `index`: from its partition count, or its name without that.

    ConflictError if it is partitioned over too few ranks for `names`, or over a number that does not divide `dp`;
    FitError for experts that are no layers of DeepSpeed's, so that names do not tell their numbers.
    """
    named = named_degree(options)
    count = _partition_count(tree, index, where)
    count = dp // (named or 1) if count is None else count
    foreign = [name for name in names if not experts.own(name)]
    if named is not None and named > 1 and named * count == dp and foreign:
        raise FitError(
            f"{where}: {foreign[0]} is of experts spread over {named} ranks, and its name does not tell of which",
            hint="experts of deepspeed.moe.layer.MoE and of AutoEP can be read",
        )
    if count != dp and (count < 1 or dp % count or foreign):
        raise ConflictError(
            f"{where}: partitioned over {count} ranks, but the model was saved by {dp} data-parallel ranks",
            hint=MIXED_HINT,
        )
    if named is not None and named * count != dp:
        raise ConflictError(
            f"{where}: partitioned over {count} of {dp} ranks, but called {options['name']}", hint=MIXED_HINT
        )
    return dp // count


def _partition_count(tree: Mapping[str, Tree], index: int, where: str) -> int | None:
    """Ranks that a flat group is partitioned over; ZeRO 3 tells by sub-group where it has experts."""
    grouped = tree.get("ds_zero_partition_groups")
    counts = tree.get("partition_count")
    if grouped is not None:
        counts = [nodes.mapping(g, where).get("partition_count") for g in nodes.sequence(grouped, where)]
    if isinstance(counts, list | tuple):
        counts = counts[index] if index < len(counts) else None
    return None if counts is None else nodes.count(counts, where)


def check_ranks(tree: Mapping[str, Tree], index: int, ranks: Sequence[int], where: str) -> None:
    """ConflictError if ZeRO 3 says that a rank's sub-group is partitioned over other ranks than `ranks`."""
    grouped = tree.get("ds_zero_partition_groups")
    if grouped is None:
        return
    told = nodes.mapping(nodes.sequence(grouped, where)[index], where).get("partition_ranks")
    if told is not None and list(nodes.sequence(told, where)) != list(ranks):
        raise ConflictError(f"{where}: partitioned over ranks {told}, not {list(ranks)}", hint=MIXED_HINT)


def named_degree(options: Mapping[str, Tree]) -> int | None:
    """Expert-parallel degree in the name of a group of experts (``ep_size_2``, deepspeed/moe/layer.py)."""
    match = re.fullmatch(r"ep_size_(\d+)", str(options.get("name"))) if options.get("moe") else None
    return int(match[1]) if match else None


def expert_entries(save: Save) -> dict[str, Tree]:
    """Weights of all native experts by name, in the order of layers and experts."""
    return {
        own: node
        for _, file in sorted(save.experts.items())
        for name, node in file.root.items()
        if is_expert(own := _own(name))
    }


def with_experts(entries: Mapping[str, Tree], experts: Mapping[str, Tree]) -> dict[str, Tree]:
    """The module's entries in the module's order: a layer's experts follow its gate (deepspeed/moe/sharded_moe.py)."""
    layers: dict[str, dict[str, Tree]] = {}
    for name, node in experts.items():
        layers.setdefault(name.partition(_GATE)[0], {})[name] = node
    last = {layer: name for name in entries for layer in layers if name.startswith(f"{layer}gate.")}
    found: dict[str, Tree] = {}
    for name, node in entries.items():
        found[name] = node
        for layer in [layer for layer, gate in last.items() if gate == name]:
            found.update(layers.pop(layer))
    return {**found, **{name: node for held in layers.values() for name, node in held.items()}}


def of_all_experts(names: Iterable[str], experts: Experts) -> set[str]:
    """`names` as one rank has them, and those of the other experts of the same layers."""
    found = set()
    for name in names:
        match = EXPERT.fullmatch(name)
        found |= {f"{match[1]}{n}{match[3]}" for n in range(experts.counts.get(match[1], 0))} if match else {name}
    return found


def shared_by_all(shared: Mapping[str, str], experts: Experts) -> dict[str, str]:
    """Aliases as one rank has them, and where two layers share their experts, those of the others too."""
    found = dict(shared)
    for alias, name in shared.items():
        one, other = EXPERT.fullmatch(alias), EXPERT.fullmatch(name)
        if one and other and one[2] == other[2]:
            for n in range(experts.counts.get(one[1], 0)):
                found[f"{one[1]}{n}{one[3]}"] = f"{other[1]}{n}{other[3]}"
    return found
