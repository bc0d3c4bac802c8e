"""The rest of the training state: everything in the files that is neither a tensor of the model nor its layout.

Keys of the model file: deepspeed/runtime/engine.py, ``_common_checkpoint_state``; whatever else is at its top level is
the client state that the training script gave to ``save_checkpoint``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ucp.layout import Mesh
from ucp.tree import Tree

from .found import Found
from .load import Save
from .same import Comparison
from .weights import Weights

# What the catalog itself says; the rest of a model file is carried.
_CONSUMED = frozenset(
    {
        "module",
        "optimizer",
        "param_shapes",
        "frozen_param_shapes",
        "frozen_param_fragments",
        "shared_params",
        "buffer_names",
    }
)
ENGINE_KEYS = frozenset(
    {
        "lr_scheduler",
        "data_sampler",
        "random_ltd",
        "sparse_tensor_module_names",
        "csr_tensor_module_names",
        "skipped_steps",
        "global_steps",
        "global_samples",
        "dp_world_size",
        "mp_world_size",
        "checkpoint_parallel_dimensions",
        "ds_config",
        "ds_version",
        "num_experts",
        "ds_autoep_layers",
        "autoep_layers",
        "folding",
    }
)


@dataclass(frozen=True, slots=True)
class Part:
    """What was read of one tensor-parallel rank: its files, the optimizer of each stage and of all, its weights.

    `copies` are what later stages trained apart of tied parameters.
    """

    save: Save
    stages: Mapping[int, Found]
    found: Found
    weights: Weights
    copies: Mapping[int, Mapping[str, Mapping[str, Tree]]]


def carried_state(parts: Sequence[Part], comparison: Comparison) -> dict[str, Tree]:
    """`Catalog.state`: the engine's entries under their own names, and five of ours.

    ``client_state``: what the training script saved; ``optimizer``: entries of the optimizer files beside states and
    groups; ``module``: entries of the module that are no tensors; ``pipeline_copies``: tied parameters that stages
    trained apart; ``per_rank``: {rank: the same keys} for what differs between ranks, which count with dp innermost,
    then tp, then pp.
    """
    mesh = Mesh({**dict(parts[0].save.mesh.axes), "tp": len(parts)})
    state: dict[str, Tree] = {}
    per_rank: dict[int, dict[str, Tree]] = {}
    for trees in (_models(parts, mesh), _optimizers(parts, mesh)):
        common, own = comparison.split(dict(sorted(trees.items())))
        state.update(common)
        for rank, tree in own.items():
            per_rank.setdefault(rank, {}).update(tree)
    extra = dict(parts[0].weights.extra)
    if extra:
        state["module"] = extra
    for part in parts:
        for dp, buffers in part.weights.own.items():
            per_rank.setdefault(_rank(mesh, part, dp=dp), {})["module"] = buffers
        if not comparison.equal(dict(part.weights.extra), extra):
            module = per_rank.setdefault(_rank(mesh, part), {}).get("module")
            per_rank[_rank(mesh, part)]["module"] = {**part.weights.extra, **(module or {})}
    if per_rank:
        state["per_rank"] = {rank: per_rank[rank] for rank in sorted(per_rank)}
    copies = {part.save.tp: dict(part.copies) for part in parts if part.copies}
    if copies:
        state["pipeline_copies"] = copies[0] if len(parts) == 1 else copies
    return state


def _rank(mesh: Mesh, part: Part, *, pp: int = 0, dp: int = 0) -> int:
    return mesh.rank({"pp": pp, "tp": part.save.tp, "dp": dp})


def _models(parts: Sequence[Part], mesh: Mesh) -> dict[int, dict[str, Any]]:
    return {
        _rank(mesh, part, pp=pp, dp=dp): _model_rest(file.root)
        for part in parts
        for (pp, dp), file in part.save.models.items()
    }


def _optimizers(parts: Sequence[Part], mesh: Mesh) -> dict[int, dict[str, Any]]:
    return {
        _rank(mesh, part, pp=pp, dp=dp): {"optimizer": rest}
        for part in parts
        for pp, found in part.stages.items()
        for dp, rest in found.rest.items()
        if rest
    }


def _model_rest(root: Mapping[str, Tree]) -> dict[str, Any]:
    """A model file's entries: the engine's own, and the client state apart."""
    rest = {str(key): value for key, value in root.items() if key in ENGINE_KEYS}
    client = {str(key): value for key, value in root.items() if key not in ENGINE_KEYS and key not in _CONSUMED}
    return {**rest, "client_state": client} if client else rest
