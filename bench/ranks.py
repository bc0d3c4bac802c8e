"""What each rank of a DeepSpeed run does: build the engine, train a step and save, or load what was saved."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import nn

from bench.model import batch, param_groups


def train_and_save(rank: int, _: int, model: nn.Module, stage: int, root: str) -> None:
    """Train one step and save under `root`. The client state has what `ds_to_universal.py` asks for."""
    engine = build_engine(model, stage=stage)
    loss = engine(*batch(rank))
    engine.backward(loss)
    engine.step()
    state = {"iteration": 1, "universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
    engine.save_checkpoint(root, client_state=state)


def build_engine(model: nn.Module, *, stage: int) -> Any:
    """A DeepSpeed engine in bfloat16 with float32 masters under torch's AdamW."""
    deepspeed.init_distributed("gloo", verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "bf16": {"enabled": True},
        # Small buckets and no overlap keep four ranks within the memory of a small machine.
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 20_000_000,
            "allgather_bucket_size": 20_000_000,
            "stage3_prefetch_bucket_size": 10_000_000,
            "overlap_comm": False,
        },
    }
    optimizer = torch.optim.AdamW(param_groups(model), foreach=False)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine
