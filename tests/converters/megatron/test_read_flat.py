"""Flat optimizer states: where parameters lie, orders of modules that cannot be run here, and formats of the past.

Layers of Transformer Engine and `fully_sharded_model_space` are EMULATED: real states of a real job, laid out as the
sources of the framework say, in files that torch writes.
"""

from __future__ import annotations

import json
import shutil
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from tests.converters.megatron.read_jobs import DENSE, HALF, array_of, assert_holds, catalog_of, truth
from tests.support.megatron_trained import ITERATION, Trained
from ucp.converters._megatron.flatten import coalesced, in_buckets
from ucp.errors import CorruptError, FitError

FOLDER = f"iter_{ITERATION:07d}"
PADDED = 112
STATES = {"param": "value", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def test_parameters_start_at_multiples_of_64_from_the_last_to_the_first():
    assert in_buckets([10, 64, 5], [64 + 64 + 10]) == [(0, 128), (0, 64), (0, 0)]
    assert in_buckets([10, 64, 5], [64 + 64 + 11]) is None
    assert in_buckets([10, 64, 5], [64 + 64]) is None


def test_buckets_are_filled_one_after_the_other():
    """The third line: padding up to 64 is part of a bucket before a shared embedding."""
    assert in_buckets([10, 64, 5], [64 + 64, 10]) == [(1, 0), (0, 64), (0, 0)]
    assert in_buckets([10, 64, 5], [5, 64, 10]) == [(2, 0), (1, 0), (0, 0)]
    assert in_buckets([10, 64, 5], [64, 64, 10]) == [(2, 0), (1, 0), (0, 0)], (
        "padding before a shared embedding is kept"
    )
    assert in_buckets([10, 64, 5], [5, 64]) is None
    assert in_buckets([10, 64, 5], [5, 64, 10, 3]) is None


def test_joined_buckets_have_no_padding_between_them():
    assert coalesced([10, 64, 5], shared=(), limit=None) == ([128, 64, 0], 138)
    assert coalesced([10, 64, 5], shared=(), limit=1) == ([69, 5, 0], 79)
    assert coalesced([10, 64, 5], shared=(0,), limit=None) == ([128, 64, 0], 138)
    assert coalesced([10, 64, 5], shared=(2,), limit=None) == ([69, 5, 0], 79)


@pytest.fixture(scope="module")
def stored(trained: dict[str, Trained]) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """States and bf16 weights of a job of two tensor-parallel ranks, by the keys of torch_dist."""
    catalog, store = catalog_of(trained[DENSE.name].checkpoint("fully_reshardable"), names="stored")
    states = {
        state: {name: torch.from_numpy(array_of(catalog, store, name, state).copy()) for name in catalog.tensors}
        for state in STATES.values()
    }
    return states, {name: tensor.to(torch.bfloat16) for name, tensor in states["value"].items()}


def saved(trained: Trained, root: Path, tensors: dict[str, Any], *, kind: str, **arguments: Any) -> Path:
    """A torch_dist checkpoint of `tensors`, with what a real one has around them."""
    place = root / FOLDER
    place.mkdir(parents=True)
    # Otherwise torch turns the keys of dicts in objects into text; Megatron-Core has a planner of its own.
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(tensors, checkpoint_id=place, planner=planner, no_dist=True)
    common = torch.load(trained.checkpoint("fully_reshardable") / FOLDER / "common.pt", weights_only=False)
    common["content_metadata"] = {"distrib_optim_sharding_type": kind}
    common["args"] = Namespace(**{**vars(common["args"]), **arguments})
    if kind == "dp_zero_gather_scatter":
        common["optimizer"] = {"param_state_sharding_type": kind}
    torch.save(common, place / "common.pt")
    (place / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    (root / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    return root


def buffer(names: list[tuple[str, tuple[int, ...]]], tensors: dict[str, torch.Tensor], padding: float) -> torch.Tensor:
    """Parameters from the last to the first, each at a multiple of 64 elements."""
    parts: list[torch.Tensor] = []
    length = 0
    for name, index in reversed(names):
        flat = tensors[name][index].flatten() if index else tensors[name].flatten()
        parts += [torch.full((-length % 64,), padding), flat]
        length += -length % 64 + flat.numel()
    return torch.cat(parts)


# As ``TELayerNormColumnParallelLinear`` and ``TERowParallelLinear`` register them: a norm with the layer behind it.
ENGINE = ["self_attention.linear_proj.weight", "self_attention.linear_qkv.layer_norm_weight"]
ENGINE += ["self_attention.linear_qkv.weight", "mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight"]
ENGINE += ["mlp.linear_fc2.weight"]


def gathered(trained: Trained, root: Path, stored: Any, layer: list[str], *, padding: float = 0.0) -> Path:
    """One rank whose layers register their parameters in the order `layer`."""
    states, weights = stored
    names: list[tuple[str, tuple[int, ...]]] = [("embedding.word_embeddings.weight", ())]
    names += [(f"decoder.layers.{name}", (number,)) for number in range(DENSE.model.layers) for name in layer]
    names += [("decoder.final_layernorm.weight", ()), ("output_layer.weight", ())]
    held = {key: buffer(names, states[state], padding) for key, state in STATES.items()}
    groups = [{"wd_mult": 1.0, "step": 3}, {"wd_mult": 0.0, "step": 3}]
    tree = {"buckets_coalesced": True, 0: {(torch.bfloat16, torch.float32): held}}
    prefix = "optimizer.distributed.dp_group_idx_0"
    objects = {f"{prefix}.param_state/shard_0_1": [tree], f"{prefix}.optimizer/shard_0_1": [{"param_groups": groups}]}
    tensors = {**weights, **objects}
    return saved(trained, root, tensors, kind="dp_zero_gather_scatter", tensor_model_parallel_size=1)


def test_layers_of_transformer_engine(trained, stored, tmp_path):
    root = gathered(trained[DENSE.name], tmp_path / "root", stored, ENGINE)
    catalog, store = catalog_of(root)
    assert_holds(catalog, store, truth(trained[DENSE.name]))
    assert {tensor.scalars["step"].value for tensor in catalog.tensors.values()} == {3}


def test_an_order_that_the_weights_contradict(trained, stored, tmp_path):
    root = gathered(trained[DENSE.name], tmp_path / "root", stored, ENGINE[::-1])
    with pytest.raises(CorruptError, match="buckets at tp 0, pp 0"):
        catalog_of(root)


def test_an_order_that_nothing_tells(trained, stored, tmp_path):
    """With weights that are all alike, and padding as well, two orders are possible."""
    states, weights = stored
    alike = {state: {name: torch.ones_like(t) for name, t in held.items()} for state, held in states.items()}
    ones = {name: torch.ones_like(tensor) for name, tensor in weights.items()}
    root = gathered(trained[DENSE.name], tmp_path / "root", (alike, ones), ENGINE, padding=1.0)
    with pytest.raises(FitError, match="not certain"):
        catalog_of(root)


def test_flat_ranges_of_the_past(trained, stored, tmp_path):
    """`fully_sharded_model_space`: a grid of the blocks that ranks have, each flat."""
    states, weights = stored
    tensors: dict[str, Any] = dict(weights)
    for state, held in states.items():
        spoken = "fp32_param" if state == "value" else state
        for name, tensor in held.items():
            tensors[f"optimizer.state.{spoken}.{name}"] = in_blocks(name, tensor)
    root = saved(trained[DENSE.name], tmp_path / "root", tensors, kind="fully_sharded_model_space")
    assert_holds(*catalog_of(root), truth(trained[DENSE.name]))


def in_blocks(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """What two tensor-parallel ranks have of a stacked tensor, side by side and flat; one dim stays as it is."""
    if tensor.dim() == 1:
        return tensor
    grid = [tensor.shape[0] if name.startswith("decoder.layers.") else 2, *[1] * (tensor.dim() - 1)]
    if tensor.dim() == 3:
        grid[2 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 1] = 4 if "fc1" in name else 2
    block = [size // n for size, n in zip(tensor.shape, grid, strict=True)]
    split = tensor.reshape([n for pair in zip(grid, block, strict=True) for n in pair])
    dims = range(tensor.dim())
    return split.permute([*(2 * d for d in dims), *(2 * d + 1 for d in dims)]).reshape(*grid, -1).contiguous()


def test_flat_ranges_that_are_no_grid(trained, stored, tmp_path):
    states, weights = stored
    name = "decoder.layers.mlp.linear_fc2.weight"
    tensors = {**weights, f"optimizer.state.exp_avg.{name}": states["exp_avg"][name].reshape(3, -1)}
    root = saved(trained[DENSE.name], tmp_path / "root", tensors, kind="fully_sharded_model_space")
    with pytest.raises(FitError, match="no grid of flat blocks"):
        catalog_of(root)


def test_a_checkpoint_without_an_optimizer(trained, stored, tmp_path):
    """--no-save-optim: weights are parameters all the same."""
    root = saved(trained[DENSE.name], tmp_path / "root", dict(stored[1]), kind="none")
    path = root / FOLDER / "common.pt"
    common = torch.load(path, weights_only=False)
    del common["optimizer"]
    torch.save(common, path)
    catalog, store = catalog_of(root)
    assert {tensor.kind for tensor in catalog.tensors.values()} == {"parameter"}
    assert not catalog.witnesses
    assert not catalog.param_groups
    assert array_of(catalog, store, "norm.weight", "value").dtype == np.uint16


@pytest.mark.parametrize("form", ["plain", "legacy"])
def test_rank_files_alone(trained, tmp_path, form):
    """The folder of one iteration, moved elsewhere, is a checkpoint by itself."""
    moved = shutil.copytree(trained[HALF.name].checkpoint(form) / FOLDER, tmp_path / "moved")
    assert_holds(*catalog_of(Path(moved)), truth(trained[HALF.name]))
