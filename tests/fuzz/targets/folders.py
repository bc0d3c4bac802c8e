"""Whole folders as frameworks write them, one file of which is the input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from tests.fuzz.target import BASES, Style, Target, store_of, use_catalog
from tests.fuzz.zips import pickle_of, with_pickle
from ucp.converter import converter


@dataclass(frozen=True, slots=True)
class Slot:
    """File `path` of the checkpoint `base`, which a converter of `family` reads."""

    name: str
    family: str
    base: str
    path: str
    style: Style = "bytes"

    def target(self) -> Target:
        return Target(self.name, self.read, style=self.style, size=sum(map(len, base(self.base).values())))

    def read(self, data: bytes) -> None:
        files = dict(base(self.base))
        files[self.path] = with_pickle(files[self.path], data) if self.path.endswith((".pt", ".bin")) else data
        found, store = converter(self.family), store_of(files)
        assert found.detect(store) in (True, False)
        use_catalog(store, found.read(store))
        if hasattr(found, "sharded"):
            for _, part in found.sharded(store).parts:
                use_catalog(store, part)

    @property
    def seed(self) -> bytes:
        """What the framework wrote there."""
        data = base(self.base)[self.path]
        return pickle_of(data) if self.path.endswith((".pt", ".bin")) else data


@cache
def base(name: str) -> Mapping[str, bytes]:
    """The files of a checkpoint, by path."""
    root = BASES / name
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


SLOTS = (
    Slot("dcp-metadata", "dcp", "dcp", ".metadata", "pickle"),
    Slot("dcp-items", "dcp", "dcp", "__0_0.distcp"),
    Slot("hf-index", "hf", "hf", "model.safetensors.index.json", "json"),
    Slot("hf-config", "hf", "hf", "config.json", "json"),
    Slot("bytecheckpoint-metadata", "bytecheckpoint", "bytecheckpoint", "global_step_5/model/.metadata", "pickle"),
    Slot(
        "bytecheckpoint-extra",
        "bytecheckpoint",
        "bytecheckpoint",
        "global_step_5/extra_state/extra_state_rank_0.pt",
        "pickle",
    ),
    Slot("torch-folder", "torch", "torch", "checkpoint.pt", "pickle"),
    Slot("megatron-metadata", "megatron", "megatron-fully", ".metadata", "pickle"),
    Slot("megatron-common", "megatron", "megatron-fully", "common.pt", "pickle"),
    Slot("megatron-buckets", "megatron", "megatron-dp", ".metadata", "pickle"),
    Slot("megatron-told", "megatron", "megatron-fully", "metadata.json", "json"),
    Slot("megatron-legacy", "megatron", "megatron-legacy", "mp_rank_00/model_optim_rng.pt", "pickle"),
    Slot("megatron-legacy-optimizer", "megatron", "megatron-legacy", "mp_rank_00/distrib_optim.pt", "pickle"),
    Slot("deepspeed-0", "deepspeed", "deepspeed-0", "global_step1/mp_rank_00_model_states.pt", "pickle"),
    Slot("deepspeed-1", "deepspeed", "deepspeed-1", "global_step1/mp_rank_00_model_states.pt", "pickle"),
    Slot(
        "deepspeed-1-optimizer",
        "deepspeed",
        "deepspeed-1",
        "global_step1/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "pickle",
    ),
    Slot("deepspeed-3", "deepspeed", "deepspeed-3", "global_step1/zero_pp_rank_0_mp_rank_00_model_states.pt", "pickle"),
    Slot(
        "deepspeed-3-optimizer",
        "deepspeed",
        "deepspeed-3",
        "global_step1/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "pickle",
    ),
)

_DS = "deepspeed-universal"
_BELOW = "global_step1_universal"
SLOTS += (
    Slot(_DS, _DS, _DS, f"{_BELOW}/mp_rank_00_model_states.pt", "pickle"),
    Slot(f"{_DS}-optimizer", _DS, _DS, f"{_BELOW}/zero/optimizer_state.pt", "pickle"),
    Slot(f"{_DS}-state", _DS, _DS, f"{_BELOW}/zero/up.bias/fp32.pt", "pickle"),
)


def targets() -> list[Target]:
    return [slot.target() for slot in SLOTS]
