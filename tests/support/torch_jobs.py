"""Real jobs of Lightning, Accelerate and the HF Trainer without DeepSpeed, each with the truth beside what it saved.

``python -m tests.support.torch_jobs KIND FOLDER`` trains a few steps in a process of its own and writes
``FOLDER/ckpt`` (a folder, or a file for Lightning) and ``FOLDER/truth.pt``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

STEPS = 3


class Net(nn.Module):
    """Odd sizes, no two weights alike, a frozen layer, batch norm with its buffers, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)
        self.frozen = nn.Linear(7, 11).requires_grad_(False)
        self.second = nn.Linear(11, 7)
        self.tied = nn.Linear(5, 7, bias=False)
        self.tied.weight = self.first.weight
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 11))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.frozen(torch.relu(self.norm(self.first(x)))) * self.scale
        return self.second(hidden) + self.tied(x)


def truth_of(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Values, states, steps, kinds and groups by name, through torch's own interfaces."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    truth: dict[str, Any] = {"values": {}, "kinds": {}, "states": {}, "steps": {}, "groups": []}
    for name, parameter in model.named_parameters():
        truth["values"][name] = parameter.detach().clone()
        truth["kinds"][name] = "parameter" if parameter.requires_grad else "frozen"
    kept = set(model.state_dict())
    for name, buffer in model.named_buffers():
        if name in kept:
            truth["values"][name] = buffer.clone()
            truth["kinds"][name] = "buffer"
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            name = names[id(parameter)]
            truth["steps"][name] = float(state["step"])
            truth["states"][name] = {key: value.clone() for key, value in state.items() if key != "step"}
        for group in optimizer.param_groups:
            options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            truth["groups"].append(([names[id(p)] for p in group["params"]], options))
    return truth


def inputs(count: int) -> torch.Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(7))


def trained(net: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def lightning(out: Path) -> None:
    """A Trainer of Lightning with a scheduler; the optimizer gets parameters without names, as is usual."""
    import lightning as pl

    class Module(pl.LightningModule):
        def __init__(self, width: int = 4) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = Net()

        def training_step(self, batch: Sequence[torch.Tensor], index: int) -> torch.Tensor:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(trained(self), lr=1e-2, weight_decay=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]

    pl.seed_everything(3, verbose=False)
    trainer = pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=1,
        default_root_dir=str(out),
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    module = Module()
    trainer.fit(module, DataLoader(TensorDataset(inputs(32)), batch_size=4))
    trainer.save_checkpoint(str(out / "ckpt"))
    torch.save({**truth_of(module, trainer.optimizers), "step": STEPS}, out / "truth.pt")


def accelerate(out: Path, *, named: bool, safe: bool) -> None:
    """Accelerate on one process; parameters with names or without, weights as safetensors or as a pickle."""
    from accelerate import Accelerator

    torch.manual_seed(3)
    net, accelerator = Net(), Accelerator(cpu=True)
    parameters: Any = trained(net)
    if named:
        parameters = [(name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    model, optimizer, scheduler = accelerator.prepare(net, optimizer, scheduler)
    for step in range(STEPS):
        accelerator.backward(model(inputs(32)[4 * step : 4 * step + 4]).square().mean())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    accelerator.save_state(str(out / "ckpt"), safe_serialization=safe)
    torch.save({**truth_of(net, [optimizer.optimizer]), "step": STEPS}, out / "truth.pt")


class _Samples(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.arange(9) * (index + 1) % 61
        return {"input_ids": tokens, "labels": tokens}


def trainer(out: Path) -> None:
    """The HF Trainer on one process with a small Llama: two groups, safetensors, and no names in the optimizer."""
    import transformers

    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=53,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    arguments = transformers.TrainingArguments(
        output_dir=str(out / "runs"),
        use_cpu=True,
        per_device_train_batch_size=2,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=STEPS,
        learning_rate=1e-2,
        weight_decay=0.1,
        report_to=[],
        disable_tqdm=True,
        seed=3,
    )
    job = transformers.Trainer(model=model, args=arguments, train_dataset=_Samples())
    job.train()
    (out / "runs" / f"checkpoint-{STEPS}").rename(out / "ckpt")
    optimizer: Any = job.optimizer
    torch.save({**truth_of(model, [getattr(optimizer, "optimizer", optimizer)]), "step": STEPS}, out / "truth.pt")


KINDS: dict[str, Callable[[Path], None]] = {
    "lightning": lightning,
    "accelerate": lambda out: accelerate(out, named=True, safe=True),
    "accelerate-bin": lambda out: accelerate(out, named=False, safe=False),
    "accelerate-unnamed": lambda out: accelerate(out, named=False, safe=True),
    "trainer": trainer,
}


def make(kind: str, out: Path) -> Path:
    """Run the job of `kind` in a process of its own; gives its folder."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.support.torch_jobs", kind, str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


if __name__ == "__main__":
    KINDS[sys.argv[1]](Path(sys.argv[2]))
