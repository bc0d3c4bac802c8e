"""Checks that the files of a checkpoint are complete and of one save, before anything is read from them.

Modification times prove nothing: checkpoints are copied. What every file says of itself does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product

from ucp.errors import ConflictError, CorruptError, NotFoundError
from ucp.store import Store
from ucp.tree import Tree

from . import nodes
from .expert_files import check_experts
from .load import LEFTOVER_HINT, MISSING_HINT, MIXED_HINT, RankFile, Save, zero_stage
from .same import plain_equal

_EVERY_MODEL = ("global_steps", "global_samples", "skipped_steps", "ds_version", "dp_world_size", "mp_world_size")


def check(store: Store, saves: Sequence[Save]) -> None:
    """NotFoundError for a missing file, ConflictError for files of different saves, FitError for AutoEP."""
    base = f"{store.url}/{saves[0].folder.path}"
    models = [file for save in saves for file in save.models.values()]
    optims = [file for save in saves for file in save.optims.values()]
    for save in saves:
        _check_present(base, save, models, optims)
        _check_none_too_many(save)
        _check_layers(base, save)
        check_experts(base, save)
    _check_every_layer(base, saves)
    _agree(models, {name: _model_entry(name) for name in _EVERY_MODEL})
    for save in saves:
        if save.stage == 3:
            _agree(save.models.values(), {"param_shapes": _model_entry("param_shapes")})
    if optims:
        _check_optims(saves, optims)


def _check_present(base: str, save: Save, models: Sequence[RankFile], optims: Sequence[RankFile]) -> None:
    pp, dp = save.mesh["pp"], save.dp
    # Never a list: the file may tell of far more ranks than there are files, and the first that is missing ends it.
    for stage, rank in product(range(pp), range(dp if save.stage == 3 else 1)):
        if (stage, rank) not in save.models:
            raise _missing(base, models, (save.number(stage), rank), dp)
    if optims:
        for stage, rank in product(range(pp), range(dp)):
            if (stage, rank) not in save.optims:
                raise _missing(base, optims, (save.number(stage), rank), dp)
    elif any(file.root.get("param_shapes") is not None for file in save.models.values()):
        raise NotFoundError(f"{base}zero_pp_rank_0_mp_rank_00_optim_states.pt: missing", hint=MISSING_HINT)


def _missing(base: str, files: Iterable[RankFile], rank: tuple[int, int], dp: int) -> NotFoundError:
    """Names the missing file after one that is there."""
    like = next(iter(files)).path.rpartition("/")[2]
    name = re.sub(r"zero_pp_rank_\d+", f"zero_pp_rank_{rank[1]}", like)
    name = re.sub(r"mp_rank_\d+", f"mp_rank_{rank[0]:02d}", name)
    return NotFoundError(f"{base}{name}: missing; the job had {dp} data-parallel ranks", hint=MISSING_HINT)


def _check_none_too_many(save: Save) -> None:
    degrees = (save.mesh["pp"], save.dp) if save.degree == 1 else (save.mesh["pp"], save.degree, save.dp)
    ranks = " x ".join(map(str, degrees))
    for (stage, rank), file in [*save.optims.items(), *save.models.items()]:
        if rank >= save.dp or stage >= save.mesh["pp"]:
            raise ConflictError(f"{file.path}: there is no such rank in a job of {ranks} ranks", hint=LEFTOVER_HINT)


def _check_every_layer(base: str, saves: Sequence[Save]) -> None:
    """Every tensor-parallel rank saves its part of every layer, and there are no more such ranks."""
    folder, degree = saves[0].folder, len(saves)
    for (layer, tp), path in folder.layers.items():
        if tp >= degree:
            raise ConflictError(f"{base}{path}: the job had {degree} tensor-parallel ranks", hint=LEFTOVER_HINT)
        for save in saves:
            if layer not in save.layers:
                name = f"layer_{layer:02d}-model_{save.tp:02d}-model_states.pt"
                raise NotFoundError(f"{base}{name}: missing, and {path} is there", hint=MISSING_HINT)


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


def base_groups(file: RankFile) -> list[Mapping[str, Tree]]:
    """``param_groups`` of the torch optimizer; none with elastic_checkpoint, which does not save them."""
    inner = file.root["optimizer_state_dict"]
    base = inner.get("base_optimizer_state", inner.get("optimizer_state_dict"))
    groups = base.get("param_groups", ()) if isinstance(base, Mapping) else ()
    return [nodes.mapping(group, f"{file.path}: param_groups") for group in nodes.sequence(groups, file.path)]


def _check_optims(saves: Sequence[Save], files: Sequence[RankFile]) -> None:
    first = saves[0].models[0, 0]
    version = first.root.get("ds_version")
    for file in files:
        _check_partition_count(file, saves[0].dp)
        if file.root.get("ds_version", version) != version:
            raise _mixed("DeepSpeed version", {first.path: version, file.path: file.root["ds_version"]})
    _agree(files, {"ZeRO stage": zero_stage, "partition counts": _partition_count})
    for stage in range(saves[0].mesh["pp"]):
        _agree([file for save in saves for file in save.ranks(stage)], {"hyper-parameters": base_groups})


def _check_partition_count(file: RankFile, dp: int) -> None:
    """ConflictError for a number that cannot be; experts are partitioned over a divisor of the ranks."""
    counts = _partition_count(file) or []
    for count in counts if isinstance(counts, list | tuple) else [counts]:
        if nodes.integer(count, f"{file.path}: partition_count") < 1 or dp % nodes.integer(count, file.path):
            raise ConflictError(
                f"{file.path}: partitioned over {count} ranks, but the model was saved by {dp} data-parallel ranks",
                hint=MIXED_HINT,
            )


def _partition_count(file: RankFile) -> Tree:
    return nodes.mapping(file.root["optimizer_state_dict"], file.path).get("partition_count")


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
