"""What one rank of a Megatron-Core job does that saves and loads with us, each way that we offer.

`live` gives model, optimizer and schedule themselves, `dict` the dicts that Megatron-LM gives to
``dist_checkpointing``, and `strategy` and `async` have that itself save and load with our strategies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from tests.converters.megatron.write_support import BATCH, Job
from tests.converters.megatron.write_training import Training, go
from ucp.integrations.megatron import SaveStrategy
from ucp.train.load import load
from ucp.train.report import LoadReport
from ucp.train.save import save


def run(rank: int, world: int, job: Job, ways: Sequence[str]) -> None:
    """As `tests.converters.megatron.write_training.run` does, saving in each of `ways`."""
    del world
    go(rank, Saving(job, ways))


class _Pending:
    """Weights of the last step are on their way from other ranks, as under ``overlap_param_gather``."""

    def wait(self) -> None:
        pass


class Saving(Training):
    """Training that saves in Megatron-Core's form and in ours."""

    def __init__(self, job: Job, ways: Sequence[str]) -> None:
        super().__init__(job)
        self.ways = ways

    def save(self, folder: Path) -> None:
        """``<folder>/megatron`` is Megatron-Core's own, beside it are ours by the way they were made."""
        super().save_dist(folder / "megatron")
        if {"live", "pending"} & set(self.ways):
            save(self._live(), str(folder / "live"), step=self.job.first)
        if "dict" in self.ways:
            save(self._dicts(), str(folder / "dict"), step=self.job.first)
        if "lean" in self.ways:
            # One data-parallel rank has the states of all, which others lack.
            lean = {**self._metadata, "distrib_optim_fully_reshardable_mem_efficient": True}
            save(self._dicts(metadata=lean), str(folder / "lean"), step=self.job.first)
        for way in sorted({"strategy", "async"} & set(self.ways)):
            (folder / way).mkdir(exist_ok=True)
            self._save_by_strategy(folder / way, in_background=way == "async")

    def _save_by_strategy(self, folder: Path, *, in_background: bool) -> None:
        request = dist_checkpointing.save(
            self._dicts(),
            str(folder),
            SaveStrategy(),
            async_sharded_save=in_background,
            content_metadata=self._metadata,
        )
        if in_background:
            # What training does meanwhile is no part of the checkpoint.
            live = [
                one for optimizer in self._optimizers for group in optimizer.param_groups for one in group["params"]
            ]
            kept = [one.detach().clone() for one in live]
            with torch.no_grad():
                torch._foreach_zero_(live)
                request.execute_sync()
                torch._foreach_copy_(live, kept)

    def load(self, folder: Path, form: str) -> None:
        """From the checkpoint that was made in this way."""
        if form == "megatron":
            super().load(folder / form, "torch_dist")
        elif form in ("live", "pending"):
            if form == "pending":
                for group in (group for one in self.ddp for group in one.bucket_groups):
                    group.param_gather_handle = _Pending()
            held = self._live()
            load(held, str(folder / "live"))
            self._at(held["iteration"])
        elif form == "stored":
            # Megatron-Core's own checkpoint, its keys as they are.
            self._report(load(self._trained(), str(folder / "megatron"), names="stored"))
        elif form == "program":
            # The same by logical names, as any other family has them.
            model, source = self.job.model, str(folder / "megatron")
            sizes = {
                "groups": model.groups,
                "r": model.heads // model.groups,
                "d": model.hidden // model.heads,
                "divisible": model.divisible * self.job.grid.tp,
            }
            job: dict[str, Any] = {"sizes": sizes, "flags": {"te": False}}
            self._report(load(self._trained(), source, program="megatron_core_stacked", **job))
        elif form in ("dict", "lean"):
            self._load_dicts(folder / form)
        else:
            super().load(folder / form, "torch_dist")

    def _report(self, report: LoadReport) -> None:
        assert report.step is not None
        self._at(report.step)

    def _trained(self) -> dict[str, Any]:
        return {"model": self.ddp, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def _live(self) -> dict[str, Any]:
        return {
            **self._trained(),
            "iteration": self.job.first,
            "consumed_samples": self.job.first * BATCH,
        }

    def _dicts(self, *, is_loading: bool = False, metadata: Any = None) -> dict[str, Any]:
        known = metadata or self._metadata
        state = {**self._common(), **self._model_state(sharded=True)}
        whole = state if len(self.chunks) > 1 else state["model"]
        state["optimizer"] = self.optimizer.sharded_state_dict(whole, is_loading=is_loading, metadata=known)
        state["rng_state"] = self._sharded_rng()
        return state

    def _load_dicts(self, folder: Path) -> None:
        if self.job.distributed:
            # As in `Training._loaded`.
            for one in self._optimizers:
                one._init_optimizer_states_with_dummy_values()
        state = self._dicts(is_loading=True)
        load(state, str(folder))
        self._install(state)

    def _install(self, state: dict[str, Any]) -> None:
        for name, chunk in zip(self._model_state(sharded=False), self.chunks, strict=True):
            chunk.load_state_dict(state[name], strict=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["opt_param_scheduler"])
        self._at(state["iteration"])

    def _at(self, iteration: int) -> None:
        self.job = dataclasses.replace(self.job, at=iteration)
