"""Jobs of the real HF Trainer over DeepSpeed: the folder it puts around a DeepSpeed checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, distributed
from torch.utils.data import Dataset

from tests.support import truth as truths
from tests.support.case import Case
from tests.support.engine import Job, Result, engine_config
from tests.support.model import GLOBAL_BATCH, VOCAB, batch


class Samples(Dataset[dict[str, Tensor]]):
    """The samples of the first `steps` batches."""

    def __init__(self, steps: int) -> None:
        batches = [batch(step) for step in range(steps)]
        self.inputs = torch.cat([inputs for inputs, _ in batches])

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.inputs[index], "labels": self.inputs[index]}


def small_llama(seed: int) -> Any:
    """A Llama of odd sizes with tied embeddings, grouped-query attention and frozen norms in its first layer."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=36,
        intermediate_size=53,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    model.model.layers[0].input_layernorm.requires_grad_(False)
    return model


class RecordingTrainer(transformers.Trainer):
    """The Trainer, keeping every step's loss unrounded."""

    losses: list[float]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        mean = loss.detach().double().clone()
        distributed.all_reduce(mean)
        self.losses.append(mean.item() / distributed.get_world_size())
        return loss


class TruthAtSave(transformers.TrainerCallback):
    """Gathers the engine's state when the Trainer has saved at the case's step."""

    def __init__(self, case: Case, describe: Any) -> None:
        self.case, self.describe = case, describe
        self.trainer: RecordingTrainer | None = None
        self.found: tuple[dict[str, Tensor], dict[str, Any]] | None = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.case.steps and self.trainer is not None:
            job = Job(self.case, self.trainer.model_wrapped, self._groups(), args.process_index, args.world_size)
            self.found = truths.gather(job), self.describe(job)

    def _groups(self) -> list[list[str]]:
        assert self.trainer is not None
        model: Any = self.trainer.model
        decayed = set(self.trainer.get_decay_parameter_names(model))
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        return [[name for name in trained if name in decayed], [name for name in trained if name not in decayed]]


def run(case: Case, rank: int, world: int, out: Path, describe: Any) -> Result:
    """Train with the Trainer, which saves ``ckpt/checkpoint-N/global_stepN`` on the way."""
    recorder = TruthAtSave(case, describe)
    trainer = RecordingTrainer(
        model=small_llama(case.seed),
        args=_training_arguments(case, out, world),
        train_dataset=Samples(case.steps + case.more_steps),
        callbacks=[recorder],
    )
    trainer.losses = []
    recorder.trainer = trainer
    trainer.train()
    assert recorder.found is not None, "the Trainer did not save at the expected step"
    truth, record = recorder.found
    return truth, record, trainer.losses[: case.steps], trainer.losses[case.steps :]


def _training_arguments(case: Case, out: Path, world: int) -> transformers.TrainingArguments:
    config = engine_config(case)
    config["gradient_clipping"] = "auto"
    return transformers.TrainingArguments(
        output_dir=str(out / "ckpt"),
        deepspeed=config,
        use_cpu=True,
        bf16=case.dtype == "bf16",
        per_device_train_batch_size=GLOBAL_BATCH // world,
        max_steps=case.steps + case.more_steps,
        save_strategy="steps",
        save_steps=case.steps,
        save_total_limit=3,
        learning_rate=1e-2,
        weight_decay=0.1,
        lr_scheduler_type="linear",
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=0,
        seed=case.seed,
    )
