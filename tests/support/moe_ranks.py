"""What the ranks of a DeepSpeed MoE job do: train, save, gather the truth, train on. Imports DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.nn import functional

from tests.support import engine as engines
from tests.support import moe_auto
from tests.support.gloo import spawn
from tests.support.moe_auto import AutoLM
from tests.support.moe_case import MoeCase
from tests.support.moe_truth import describe, gather
from tests.support.optimizers import build_optimizer

VOCAB, HIDDEN, INNER, LENGTH, BATCH = 37, 14, 9, 6, 8


class Expert(nn.Module):
    """A feed-forward network, with a buffer if it is asked for."""

    def __init__(self, *, buffer: bool) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN)
        if buffer:
            self.register_buffer("scale", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(functional.gelu(self.up(x)))
        return result


class Block(nn.Module):
    """A linear layer and a mixture of experts, each behind a norm."""

    def __init__(self, case: MoeCase, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.norm = nn.LayerNorm(HIDDEN)
        self.mix = nn.Linear(HIDDEN, HIDDEN)
        self.moe = MoE(
            HIDDEN,
            Expert(buffer=case.buffers),
            num_experts=case.experts[layer],
            ep_size=case.ep[layer],
            use_residual=case.residual,
            capacity_factor=8.0,
            eval_capacity_factor=8.0,
            use_rts=False,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.mix(torch.cumsum(x, dim=1) / LENGTH)
        routed, loss, _ = self.moe(self.norm(x))
        return x + routed, loss


class MoeLM(nn.Module):
    """A language model with one MoE block per entry of ``case.experts``; gives the loss."""

    def __init__(self, case: MoeCase) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleList(Block(case, layer) for layer in range(len(case.experts)))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        if case.tied:
            self.blocks[1].moe.deepspeed_moe.experts = self.blocks[0].moe.deepspeed_moe.experts

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x, extra = self.embed(tokens), torch.zeros(())
        for block in self.blocks:
            x, loss = block(x)
            extra = extra + loss.float()
        logits = self.head(self.norm(x)).float()
        self.calls.add_(1)
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten()) + 0.01 * extra


class Stage(nn.Module):
    """A block as a layer of a pipeline, where experts' own losses have no place."""

    def __init__(self, case: MoeCase, layer: int) -> None:
        super().__init__()
        self.block = Block(case, layer)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.block(x)[0]
        return result


def pipeline(case: MoeCase) -> nn.Module:
    """The model in as many stages as the case says."""
    from deepspeed.pipe import LayerSpec, PipelineModule

    layers = [LayerSpec(nn.Embedding, VOCAB, HIDDEN)]
    layers += [LayerSpec(Stage, case, layer) for layer in range(len(case.experts))]
    layers += [LayerSpec(nn.LayerNorm, HIDDEN), LayerSpec(nn.Linear, HIDDEN, VOCAB, bias=False)]
    module: nn.Module = PipelineModule(
        layers=layers, num_stages=case.stages, partition_method="uniform", loss_fn=_pipeline_loss
    )
    return module


def _pipeline_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def run(case: MoeCase, out: Path, *, timeout: float) -> None:
    """Run the case with forked ranks and write everything into `out`."""
    engines.prepare_process()
    spawn(_train_and_save, case.world, case, str(out), timeout=timeout, method="fork")


def _train_and_save(rank: int, world: int, case: MoeCase, out: str) -> None:
    folder = Path(out)
    engine = build_engine(case, rank)
    before = train(engine, case, rank, 0, case.steps)
    engine.save_checkpoint(str(folder / "ckpt"), tag=case.tag, client_state={"epoch": 2, "note": "moe"})
    truth = gather(engine, case, world)
    record = describe(engine, case)
    after = train(engine, case, rank, case.steps, case.more_steps)
    if rank == 0:
        save_file(truth, folder / "truth.safetensors")
        (folder / "case.json").write_text(json.dumps({**record, "losses_before": before, "losses_after": after}))


def run_resume(
    case: MoeCase, root: str, out: Path, *, tag: str | None, universal: bool, finish: bool, first: int, timeout: float
) -> None:
    """Load `root` as `case` with forked ranks; write ``state.safetensors`` and ``case.json`` into `out`."""
    engines.prepare_process()
    spawn(_resume, case.world, case, root, str(out), tag, universal, finish, first, timeout=timeout, method="fork")


def _resume(
    rank: int,
    world: int,
    case: MoeCase,
    root: str,
    out: str,
    tag: str | None,
    universal: bool,
    finish: bool,
    first: int,
) -> None:
    engine = build_engine(case, rank, universal=universal)
    path, _ = engine.load_checkpoint(root, tag=tag)
    if path is None:
        raise FileNotFoundError(root)
    if finish:
        from ucp.converters.deepspeed_universal import finish_load

        finish_load(engine, root)
    state, record = gather(engine, case, world), describe(engine, case)
    losses = train(engine, case, rank, first, case.more_steps)
    if rank == 0:
        save_file(state, Path(out) / "state.safetensors")
        (Path(out) / "case.json").write_text(json.dumps({**record, "losses": losses}))


def build_engine(case: MoeCase, rank: int, *, universal: bool = False) -> Any:
    """The case's model inside a DeepSpeed engine; experts start from values of their global number."""
    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(case.seed)
    model = AutoLM(case) if case.auto else pipeline(case) if case.stages > 1 else MoeLM(case)
    if not case.auto:
        _start_experts(model, case, rank)
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        # AutoEP replaces parameters before it makes an optimizer of those there are then.
        optimizer=None if case.auto else build_optimizer(case.optimizer, _param_groups(model, case)),
        model_parameters=list(model.parameters()) if case.auto else None,
        lr_scheduler=engines.scheduler_factory,
        config=_config(case, universal=universal),
    )
    return engine


def _start_experts(model: nn.Module, case: MoeCase, rank: int) -> None:
    order = _ep_ranks(case, rank % case.data_parallel)
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        layer = block.layer
        local = case.experts[layer] // case.ep[layer]
        for index, expert in enumerate(block.moe.deepspeed_moe.experts.deepspeed_experts):
            _start_expert(expert, case, layer, order[layer] * local + index)


def _ep_ranks(case: MoeCase, dp: int) -> list[int]:
    return [dp // (case.data_parallel // ep) if case.data_first else dp % ep for ep in case.ep]


def _start_expert(expert: nn.Module, case: MoeCase, layer: int, number: int) -> None:
    generator = torch.Generator().manual_seed(100 * case.seed + 10 * layer + number)
    for name, parameter in expert.named_parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        parameter.requires_grad_(not (case.frozen_expert and name == "up.bias"))
    for buffer in expert.buffers():
        buffer.copy_(torch.randn(buffer.shape, generator=generator))


def _param_groups(model: nn.Module, case: MoeCase) -> list[dict[str, Any]]:
    """Matrices and the rest in groups of their own, each split by DeepSpeed into dense and expert parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    plain: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1], "name": "matrices", "lr": 5e-3, "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "name": "vectors", "lr": 2e-3, "weight_decay": 0.0},
    ]
    return split_params_into_different_moe_groups_for_optimizer(
        plain, **({"max_group_size": case.split} if case.split else {})
    )


def _config(case: MoeCase, *, universal: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": case.stage, "stage3_param_persistence_threshold": 0}
    if case.round_robin:
        zero["round_robin_gradients"] = True
    if case.elastic:
        zero["elastic_checkpoint"] = True
    config: dict[str, Any] = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // case.data_parallel,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
        "use_data_before_expert_parallelism": case.data_first,
    }
    if case.auto:
        config["expert_parallel"] = {"enabled": True, "autoep_size": case.ep[0], **moe_auto.CONFIG}
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 5e-3, "weight_decay": 0.1, "torch_adam": True}}
    if case.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if case.dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8}
    if case.grad_accum_fp32:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if universal:
        config["checkpoint"] = {"load_universal": True}
    return config


def train(engine: Any, case: MoeCase, rank: int, first: int, count: int) -> list[float]:
    """Train `count` steps; the losses averaged over ranks."""
    losses = []
    for step in range(first, first + count):
        if case.stages > 1:
            losses.append(
                float(engine.train_batch(iter([_batch(step, rank % case.data_parallel, case.data_parallel)])))
            )
            continue
        loss = engine(*_batch(step, rank, case.world))
        engine.backward(loss)
        engine.step()
        mean = loss.detach().double().clone()
        distributed.all_reduce(mean)
        losses.append(mean.item() / case.world)
    return losses


def _batch(step: int, part: int, parts: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels of one of equal parts of a step's batch."""
    generator = torch.Generator().manual_seed(500 + step)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=generator)
    mine = tokens[part * BATCH // parts : (part + 1) * BATCH // parts]
    return mine[:, :-1].contiguous(), mine[:, 1:].contiguous()
