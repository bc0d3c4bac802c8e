"""Which shipped program fits the names in a ``model_optim_rng.pt``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ucp.errors import FitError

if TYPE_CHECKING:
    from .ranks import Legacy

_CORE = ("pp", "vpp", "tp", "dp")
_MOE = (*_CORE, "ep", "etp", "edp")
_OLD = ("pp", "tp", "dp")


@dataclass(frozen=True, slots=True)
class Fitting:
    """A program's name, its mesh axes, and flags that the checkpoint's version settles."""

    name: str
    axes: tuple[str, ...]
    flags: Mapping[str, bool]


def program_of(legacy: Legacy) -> Fitting:
    """The program for the names that the ranks hold; FitError if none is known.

    ``checkpoint_version`` says in which order rows of queries, keys and values lie: ``fix_query_key_value_ordering`` in
    megatron/checkpointing.py.
    """
    names = [name for rank in legacy.ranks.values() for chunk in rank.chunks for name in chunk]
    if any(name.startswith("language_model.transformer.") for name in names):
        version = _version(legacy)
        return Fitting("megatron_legacy_2021", _OLD, {"v0": version < 1, "v1": 1 <= version < 2})
    if any(name.startswith("language_model.encoder.") for name in names):
        if _version(legacy) < 2:
            raise FitError(
                f"{legacy.where}: checkpoint_version {_version(legacy)} with a stack called `encoder` is not known"
            )
        return Fitting("megatron_legacy", _CORE, {"split_qkv": False})
    if any(name.startswith("decoder.layers.") for name in names):
        experts = any(".experts." in name for name in names)
        flags = {"te": any(".linear_qkv.layer_norm_weight" in name for name in names)}
        if experts:
            return Fitting(
                "megatron_core_moe", _MOE, {**flags, "grouped": any(".experts.linear_fc1." in n for n in names)}
            )
        return Fitting("megatron_core_gpt", _CORE, flags)
    raise FitError(
        f"{legacy.where}: no program is shipped for tensors such as {' '.join(names[:3])}",
        hint="write one (docs/cookbook.md) and give it with --spec",
    )


def _version(legacy: Legacy) -> float:
    version = legacy.first.root.get("checkpoint_version", 0)
    return float(version) if isinstance(version, int | float) else 0.0
