"""Checks that the files of a mixture of experts are complete, and no others are there.

deepspeed/runtime/engine.py, ``_save_moe_checkpoint``: one file of weights for each MoE layer and expert; without ZeRO
one optimizer file for each rank of the largest expert-parallel group. ``num_experts`` in the model file has the number
of experts of each layer, in old versions one for all layers, whose experts of a number then share a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ucp.errors import ConflictError, CorruptError, FitError, NotFoundError

from . import nodes
from .autoep import auto_layers
from .experts import named_degree, number_of
from .load import LEFTOVER_HINT, MISSING_HINT, RankFile, Save


def check_experts(base: str, save: Save) -> None:
    """NotFoundError for a missing file, ConflictError for one too many, CorruptError for one of another expert.

    FitError under tensor parallelism.
    """
    wanted: set[tuple[int, int, int]] = set()
    for pp in range(save.mesh["pp"]):
        without = {layer.number for layer in auto_layers(save.model(pp)) if not layer.has_files}
        wanted |= {(pp, *key) for key in _numbers(save.model(pp)) if key[0] not in without}
    if save.degree > 1 and wanted:
        raise FitError(
            f"{base}: a mixture of experts under tensor parallelism cannot be read",
            hint="its experts are spread over tensor-parallel ranks or cut by them, which nothing in the files tells",
        )
    for pp, layer, expert in sorted(wanted - save.experts.keys()):
        name = f"expert_{expert}_mp_rank_{save.number(pp):02d}_model_states.pt"
        prefix = f"layer_{layer}_" if layer >= 0 else ""
        raise NotFoundError(f"{base}{prefix}{name}: missing; every expert has a file of its own", hint=MISSING_HINT)
    for key in sorted(save.experts.keys() - wanted):
        raise ConflictError(f"{save.experts[key].path}: the model has no such expert", hint=LEFTOVER_HINT)
    for (_, _, expert), file in save.experts.items():
        for name in file.root:
            if number_of(str(name)) != expert:
                raise CorruptError(f"{file.path}: holds {name}, which is of another expert", hint=MISSING_HINT)
    _check_optimizers(base, save)


def _numbers(model: RankFile) -> Iterator[tuple[int, int]]:
    """Layer and number of every expert, as files are called."""
    told = model.root.get("num_experts") or []
    where = f"{model.path}: num_experts"
    if isinstance(told, list | tuple):
        for layer, count in enumerate(told):
            yield from ((layer, expert) for expert in range(nodes.count(count, where)))
    else:
        yield from ((-1, expert) for expert in range(nodes.count(told, where)))


def _check_optimizers(base: str, save: Save) -> None:
    wanted: set[tuple[int, int]] = set()
    for pp in range(save.mesh["pp"]):
        optimizer = save.model(pp).root.get("optimizer")
        if any(key[0] == pp for key in save.experts) and isinstance(optimizer, Mapping):
            wanted |= {(pp, e) for e in range(_largest_degree(optimizer, save.model(pp).path))}
    for pp, e in sorted(wanted - save.expert_optims.keys()):
        name = f"expp_rank_{e}_mp_rank_{save.number(pp):02d}_optim_states.pt"
        raise NotFoundError(f"{base}{name}: missing; it has the optimizer states of experts", hint=MISSING_HINT)
    for rank in sorted(save.expert_optims.keys() - wanted):
        raise ConflictError(f"{save.expert_optims[rank].path}: there is no such rank", hint=LEFTOVER_HINT)


def _largest_degree(optimizer: Mapping[str, object], path: str) -> int:
    """The largest expert-parallel degree that the optimizer's groups are called after."""
    base = next((optimizer[k] for k in ("optimizer_state_dict", "base_optimizer_state") if k in optimizer), optimizer)
    groups = nodes.mapping(base, path).get("param_groups", ())
    named = (named_degree(nodes.mapping(g, path)) or 1 for g in nodes.sequence(groups, path))
    return nodes.count(max(named, default=1), path)
