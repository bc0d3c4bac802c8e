"""The model file, of the first rank or, under ZeRO 3, of each (deepspeed/runtime/engine.py, ``_save_checkpoint``)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ucp.catalog import Catalog, Tensor
from ucp.container.values import Size
from ucp.plan import Extent
from ucp.training import first_rank, progress
from ucp.tree import TensorLeaf, Tree

from .._deepspeed.carried import ENGINE_KEYS
from .._deepspeed.info import INFO
from .._deepspeed_universal.carry import Drop, carry
from .flat import Flat, joined, whole
from .groups import Group
from .optim import Flattened
from .partition import sliced
from .wanted import DTYPES, Wanted

_ASIDE = frozenset({"client_state", "module", "optimizer", "per_rank", "around", "pipeline_copies", "loss_scale"})
_OF_THE_LAYOUT = ENGINE_KEYS & {
    "dp_world_size",
    "mp_world_size",
    "checkpoint_parallel_dimensions",
    "ds_config",
    "ds_version",
}


@dataclass(frozen=True, slots=True)
class ModelFile:
    """What the model files of all ranks have in common."""

    catalog: Catalog
    wanted: Wanted
    groups: tuple[Group, ...]
    flats: tuple[Flattened, ...]
    config: Mapping[str, Tree]
    version: str

    def tree(self, rank: int, drop: Drop) -> dict[str, Tree]:
        """The file of data-parallel `rank`; what cannot be pickled again is reported to `drop`."""
        state = first_rank(self.catalog)
        weights = self._weights()
        client = _client(state.get("client_state"), same_cuts=self.wanted.tp == self.catalog.source.mesh["tp"])
        own = {key: value for key, value in state.items() if key not in ENGINE_KEYS and key not in _ASIDE}
        engine = {key: state[key] for key in sorted(ENGINE_KEYS & state.keys() - _OF_THE_LAYOUT)}
        return {
            **carry(own, "state", drop),
            **carry(client, "client_state", drop),
            "module": self._module(weights, state.get("module"), drop),
            **self._names(rank),
            "frozen_param_fragments": self._fragments(rank, weights),
            **_counters(self.catalog),
            **carry(engine, "state", drop),
            "dp_world_size": self.wanted.dp,
            "mp_world_size": self.wanted.tp,
            "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": self.wanted.tp},
            "ds_config": dict(self.config),
            "ds_version": self.version,
        }

    @property
    def trained(self) -> frozenset[str]:
        """Names of the parameters in the optimizer's groups."""
        return frozenset(name for group in self.groups for name in group.params)

    @property
    def frozen(self) -> list[str]:
        """Parameters that no group has: not trained, or without elements."""
        known, tensors = self.trained, self.catalog.tensors.values()
        return [tensor.name for tensor in tensors if tensor.kind != "buffer" and tensor.name not in known]

    def _weights(self) -> dict[str, Tree]:
        """Each tensor of the module; under ZeRO 3 an empty one for parameters, which lie in the optimizer files."""
        trained = self.trained
        return {name: self._weight(tensor, name in trained) for name, tensor in self.catalog.tensors.items()}

    def _weight(self, tensor: Tensor, trained: bool) -> Tree:
        dtype = self.wanted.dtype if trained else tensor.states["value"].dtype
        if self.wanted.stage == 3 and tensor.kind != "buffer":
            return TensorLeaf(Extent.contiguous("", 0, (0,), dtype), inline=b"")
        copy = self.catalog.witness(tensor.name) if trained else None
        if copy is not None and copy.cover.spec.dtype == dtype:
            return whole(copy.cover)
        return whole(self.catalog.cover(tensor.name, "value"), dtype=dtype)

    def _module(self, weights: Mapping[str, Tree], extra: Tree, drop: Drop) -> OrderedDict[str, Tree]:
        tied = {alias: weights[self.catalog.resolve(name)] for alias, name in self.catalog.ties.items()}
        others = carry(extra, "module", drop) if isinstance(extra, dict) else {}
        return OrderedDict({**weights, **tied, **others})

    def _names(self, rank: int) -> dict[str, Tree]:
        tensors, stage = self.catalog.tensors.values(), self.wanted.stage
        return {
            "buffer_names": [tensor.name for tensor in tensors if tensor.kind == "buffer"],
            "optimizer": None,
            "param_shapes": [self._shapes(flat.sizes) for flat in self.flats],
            "frozen_param_shapes": self._shapes(self.frozen) if stage > 1 else None,
            "shared_params": dict(self.catalog.ties) if stage < 3 or rank == 0 else {},
        }

    def _shapes(self, names: Iterable[str]) -> OrderedDict[str, Size]:
        return OrderedDict((name, Size(self.catalog.tensors[name].states["value"].shape)) for name in names)

    def _fragments(self, rank: int, weights: Mapping[str, Tree]) -> OrderedDict[str, Tree] | None:
        """Frozen parameters: whole under ZeRO 2, sliced like trained ones under ZeRO 3."""
        if self.wanted.stage == 1:
            return None
        if self.wanted.stage == 2:
            return OrderedDict((name, weights[name]) for name in self.frozen)
        return OrderedDict((name, self._slice(name, rank)) for name in self.frozen)

    def _slice(self, name: str, rank: int) -> Flat:
        spec = self.catalog.tensors[name].states["value"]
        pieces = list(sliced(name, spec.size, dp=self.wanted.dp, rank=rank))
        return joined(self.catalog, pieces, "value", dtype=spec.dtype)


def _client(client: Tree, *, same_cuts: bool) -> dict[str, Tree]:
    """What the training script saved, without what DeepSpeed says there of the cuts of other tensor-parallel ranks."""
    held = dict(client) if isinstance(client, dict) else {}
    told = held.get(INFO)
    if not same_cuts and isinstance(told, dict) and told.keys() & _OF_RANKS:
        del held[INFO]
    return held


def _counters(catalog: Catalog) -> dict[str, Tree]:
    """What an engine reads back; the source's own entries go over it."""
    samples = progress(catalog).consumed_samples
    told = {"global_samples": samples} if samples is not None else {}
    return {"lr_scheduler": None, "skipped_steps": 0, "global_steps": catalog.step or 0, **told}


def configuration(config: Tree, wanted: Wanted, drop: Drop) -> dict[str, Tree]:
    """``ds_config``: the source's, with what this layout changes. DeepSpeed saves it and does not load it."""
    held = carry(config, "ds_config", drop) if isinstance(config, dict) else {}
    held = {key: value for key, value in held.items() if key not in _PER_RANK}
    zero = held.get("zero_optimization")
    zero = {**(zero if isinstance(zero, dict) else {}), "stage": wanted.stage}
    if wanted.round_robin or "round_robin_gradients" in zero:
        zero["round_robin_gradients"] = wanted.round_robin
    zero.pop("elastic_checkpoint", None)
    zero.pop("parameter_alignment", None)
    for name, dtype in DTYPES.items():
        if name != "fp32" and (name in held or dtype == wanted.dtype):
            told = held.get(name)
            held[name] = {**(told if isinstance(told, dict) else {}), "enabled": dtype == wanted.dtype}
    if wanted.bf16_optimizer:
        held["data_types"] = {"grad_accum_dtype": "fp32"}
    return {**held, "zero_optimization": zero}


_OF_RANKS = frozenset({"affine_map", "sub_param_shard_widths"})
"""Entries of ``universal_checkpoint_info`` that hold for the source's tensor-parallel ranks alone."""

_PER_RANK = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "data_types")


__all__ = ["ModelFile", "configuration"]
