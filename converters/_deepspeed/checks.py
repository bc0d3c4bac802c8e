"""Checks that the files of a checkpoint are complete and of one save, before anything is read from them.

Modification times prove nothing: checkpoints are copied. What every file says of itself does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from ucp.errors import ConflictError, CorruptError, NotFoundError
from ucp.store import Store
from ucp.tree import Tree

from . import nodes
from .load import LEFTOVER_HINT, MISSING_HINT, MIXED_HINT, RankFile, Save, spread_experts, zero_stage
from .same import plain_equal

_EVERY_MODEL = ("global_steps", "global_samples", "skipped_steps", "ds_version", "dp_world_size", "mp_world_size")


def check(store: Store, save: Save) -> None:
    """NotFoundError for a missing file, ConflictError for files of different saves, FitError for spread-out experts."""
    base = f"{store.url}/{save.folder.path}"
    _check_present(base, save)
    _check_none_too_many(save)
    _check_layers(base, save)
    _check_no_experts(save)
    _agree(save.models.values(), {name: _model_entry(name) for name in _EVERY_MODEL})
    if save.stage == 3:
        _agree(save.models.values(), {"param_shapes": _model_entry("param_shapes")})
    _check_optims(save)


def _check_present(base: str, save: Save) -> None:
    pp, dp = save.mesh["pp"], save.dp
    grid = [(mp, rank) for mp in range(pp) for rank in range(dp)]
    wanted = grid if save.stage == 3 else [(mp, 0) for mp in range(pp)]
    for rank in wanted:
        if rank not in save.models:
            raise _missing(base, save.models.values(), rank, dp)
    if save.optims:
        for rank in grid:
            if rank not in save.optims:
                raise _missing(base, save.optims.values(), rank, dp)
    elif any(file.root.get("param_shapes") is not None for file in save.models.values()):
        raise NotFoundError(f"{base}zero_pp_rank_0_mp_rank_00_optim_states.pt: missing", hint=MISSING_HINT)


def _missing(base: str, files: Iterable[RankFile], rank: tuple[int, int], dp: int) -> NotFoundError:
    """Names the missing file after one that is there."""
    like = next(iter(files)).path.rpartition("/")[2]
    name = re.sub(r"zero_pp_rank_\d+", f"zero_pp_rank_{rank[1]}", like)
    name = re.sub(r"mp_rank_\d+", f"mp_rank_{rank[0]:02d}", name)
    return NotFoundError(f"{base}{name}: missing; the job had {dp} data-parallel ranks", hint=MISSING_HINT)


def _check_none_too_many(save: Save) -> None:
    for (mp, rank), file in [*save.optims.items(), *save.models.items()]:
        if rank >= save.dp or mp >= save.mesh["pp"]:
            raise ConflictError(
                f"{file.path}: there is no such rank in a job of {save.mesh['pp']} x {save.dp} ranks",
                hint=LEFTOVER_HINT,
            )


def _check_layers(base: str, save: Save) -> None:
    """A pipeline saves its weights by layer, and nothing in ``module`` (deepspeed/runtime/pipe/engine.py)."""
    for file in save.models.values():
        if "module" not in file.root:
            raise CorruptError(f"{file.path}: holds no module: not a model file of DeepSpeed", hint=MISSING_HINT)
    pipeline = any(file.root["module"] is None for file in save.models.values())
    if pipeline and not save.layers:
        raise NotFoundError(f"{base}layer_00-model_states.pt: missing, and all other layers", hint=MISSING_HINT)
    if save.layers and not pipeline:
        raise ConflictError(f"{base}: holds pipeline layers and a whole module", hint=LEFTOVER_HINT)


def _check_no_experts(save: Save) -> None:
    for file in save.models.values():
        if any(_is_set(file.root.get(name)) for name in ("num_experts", "ds_autoep_layers", "autoep_layers")):
            raise spread_experts(file.path)
    for file in save.optims.values():
        inner = file.root["optimizer_state_dict"]
        if inner.get("ds_zero_partition_groups") or any(group.get("moe") for group in base_groups(file)):
            raise spread_experts(file.path)


def _is_set(node: Tree) -> bool:
    return any(n for n in node) if isinstance(node, list | tuple) else bool(node)


def base_groups(file: RankFile) -> list[Mapping[str, Tree]]:
    """``param_groups`` of the torch optimizer; none with elastic_checkpoint, which does not save them."""
    inner = file.root["optimizer_state_dict"]
    base = inner.get("base_optimizer_state", inner.get("optimizer_state_dict"))
    groups = base.get("param_groups", ()) if isinstance(base, Mapping) else ()
    return [nodes.mapping(group, f"{file.path}: param_groups") for group in nodes.sequence(groups, file.path)]


def _check_optims(save: Save) -> None:
    files = list(save.optims.values())
    if not files:
        return
    version = save.models[0, 0].root.get("ds_version")
    for file in files:
        _check_partition_count(file, save.dp)
        if file.root.get("ds_version", version) != version:
            first = save.models[0, 0].path
            raise _mixed("DeepSpeed version", {first: version, file.path: file.root["ds_version"]})
    _agree(files, {"ZeRO stage": zero_stage})
    for mp in range(save.mesh["pp"]):
        _agree(save.ranks(mp), {"hyper-parameters": base_groups})


def _check_partition_count(file: RankFile, dp: int) -> None:
    inner = file.root["optimizer_state_dict"]
    counts = inner.get("partition_count", [])
    for count in counts if isinstance(counts, list | tuple) else [counts]:
        if count != dp:
            raise ConflictError(
                f"{file.path}: partitioned over {count} ranks, but the model was saved by {dp} data-parallel ranks",
                hint=MIXED_HINT,
            )


def _model_entry(name: str) -> Callable[[RankFile], Tree]:
    return lambda file: file.root.get(name)


def _agree(files: Iterable[RankFile], entries: Mapping[str, Callable[[RankFile], Tree]]) -> None:
    """ConflictError naming two files that differ in an entry that one save has everywhere alike."""
    first, *rest = files
    for what, entry in entries.items():
        for file in rest:
            if not plain_equal(entry(first), entry(file)):
                raise _mixed(what, {first.path: entry(first), file.path: entry(file)})


def _mixed(what: str, values: Mapping[str, Tree]) -> ConflictError:
    (one, a), (other, b) = values.items()
    said = f" ({a} and {b})" if all(isinstance(v, int | float | str) for v in (a, b)) else ""
    return ConflictError(f"{one} and {other} differ in {what}{said}", hint=MIXED_HINT)
