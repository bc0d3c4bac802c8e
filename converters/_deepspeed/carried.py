"""The rest of the training state: everything in the files that is neither a tensor of the model nor its layout.

Keys of the model file: deepspeed/runtime/engine.py, ``_common_checkpoint_state``; whatever else is at its top level is
the client state that the training script gave to ``save_checkpoint``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def carried_state(save: Save, stages: Mapping[int, Found], weights: Weights, comparison: Comparison) -> dict[str, Tree]:
    """`Catalog.state`: the engine's entries under their own names, and four of ours.

    ``client_state``: what the training script saved; ``optimizer``: entries of the optimizer files beside states and
    groups; ``module``: entries of the module that are no tensors; ``per_rank``: {rank: the same keys} for what differs
    between ranks, which count with dp innermost.
    """
    models = {save.mesh.rank({"pp": mp, "dp": dp}): _model_rest(file.root) for (mp, dp), file in save.models.items()}
    optims = {
        save.mesh.rank({"pp": mp, "dp": dp}): {"optimizer": rest}
        for mp, found in stages.items()
        for dp, rest in found.rest.items()
        if rest
    }
    state: dict[str, Tree] = {}
    per_rank: dict[int, dict[str, Tree]] = {}
    for trees in (models, optims):
        common, own = comparison.split(trees)
        state.update(common)
        for rank, tree in own.items():
            per_rank.setdefault(rank, {}).update(tree)
    if weights.extra:
        state["module"] = dict(weights.extra)
    for rank, buffers in weights.own.items():
        per_rank.setdefault(rank, {})["module"] = buffers
    if per_rank:
        state["per_rank"] = {rank: per_rank[rank] for rank in sorted(per_rank)}
    return state


def _model_rest(root: Mapping[str, Tree]) -> dict[str, Any]:
    """A model file's entries: the engine's own, and the client state apart."""
    rest = {str(key): value for key, value in root.items() if key in ENGINE_KEYS}
    client = {str(key): value for key, value in root.items() if key not in ENGINE_KEYS and key not in _CONSUMED}
    return {**rest, "client_state": client} if client else rest
