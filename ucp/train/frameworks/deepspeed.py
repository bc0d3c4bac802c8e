"""DeepSpeed engines: ZeRO 0 to 3, with and without fp32 masters, as named tensors with their states.

The value of a parameter is what the optimizer trains, the fp32 master where there is one; the module's low-precision
weights are made from it once everything is filled. Names are the module's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ucp.catalog import Kind
from ucp.errors import FitError, UsageError
from ucp.format.spreads import LiveMesh
from ucp.train.frameworks.deepspeed_items import items_of
from ucp.train.frameworks.deepspeed_masters import Kept, Masters, base_optimizer, kept_by, partitioned
from ucp.train.frameworks.deepspeed_twin import SchedulerTwin, twin_of
from ucp.train.targets import Targets, take_module

_AXES = {"pipe": "pp", "data": "dp", "model": "tp"}
"""Axes of a pipeline's topology, as the field calls them."""


def take(found: Targets, value: Any) -> bool:
    """Add what a ``deepspeed.DeepSpeedEngine`` holds; FitError for layouts that are not known, by name.

    UsageError for the engine's optimizer without the engine, which alone knows names, and for a module that ZeRO-3 cut.
    What is loaded into the module of another engine becomes its masters, too: else the next step would undo it.
    """
    from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
    from deepspeed.runtime.engine import DeepSpeedEngine

    if isinstance(value, DeepSpeedOptimizer):
        raise UsageError(f"a {type(value).__name__} knows no names", hint="give the DeepSpeed engine itself")
    if not isinstance(value, DeepSpeedEngine):
        if isinstance(value, nn.Module):
            _check_bare(value)
            found.after.append(lambda: _refresh_masters(value))
        return False
    _check(value)
    _take_engine(found, value)
    return True


def _check_bare(module: nn.Module) -> None:
    """UsageError for a module whose parameters are empty but for the time in which they compute."""
    cut = next((name for name, parameter in module.named_parameters() if hasattr(parameter, "ds_id")), None)
    if cut is not None:
        raise UsageError(f"{cut}: ZeRO-3 holds the parameters of this module", hint="give the DeepSpeed engine itself")


def _refresh_masters(module: nn.Module) -> None:
    """As ``update_hp`` of deepspeed/utils/tensor_fragment.py: the rank's part of each weight into its master."""
    with torch.no_grad():
        for parameter in module.parameters():
            mapping: Any = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                at = mapping.lp_fragment_address
                mapping.hp_fragment.copy_(parameter.detach().reshape(-1)[at.start : at.start + at.numel])


def _check(engine: Any) -> None:
    """FitError for what DeepSpeed spreads over ranks in ways that a module does not tell."""
    if engine.has_moe_layers:
        raise FitError(
            "DeepSpeed's mixtures of experts cannot be taken from a live engine",
            hint="use engine.save_checkpoint, whose folders ucp reads, and folders that ucp converts",
        )
    if _tensor_parallel(engine) > 1:
        raise FitError(
            "this engine's weights are tensor-parallel: its ranks hold different parts of one name",
            hint="use engine.save_checkpoint, whose folders ucp reads, and folders that ucp converts",
        )
    if getattr(engine.optimizer, "offloaded_states", None):
        raise FitError("DeepSpeed has moved states of this engine away", hint="call engine.reload_states() first")
    if getattr(engine, "zenflow", False):
        raise FitError("DeepSpeed's ZenFlow updates parts of the optimizer at other times: nothing is whole")


def _tensor_parallel(engine: Any) -> int:
    """Over how many ranks a stage's weights are cut; a pipeline's grid calls stages model-parallel too."""
    if engine.pipeline_parallelism:
        return int(engine.grid.get_slice_parallel_world_size())
    return max(int(engine.mp_world_size), int(engine.autotp_size()))


def _take_engine(found: Targets, engine: Any) -> None:
    kept = kept_by(engine.optimizer)
    masters = {} if kept is None else kept.masters
    take_module(found, engine.module, known=_take_parameters(found, engine.module, masters))
    base = base_optimizer(engine.optimizer)
    if base is not None:
        groups = kept.groups if kept is not None else [group["params"] for group in base.param_groups]
        twin, install = twin_of(base, groups)
        found.optimizers.append(twin)
        found.after.append(install)
        if engine.lr_scheduler is not None:
            found.schedulers.append(SchedulerTwin(engine.lr_scheduler, twin))
    for item in items_of(engine):
        found.add_item(item)
    if engine.pipeline_parallelism:
        found.meshes.append(_mesh(engine.grid.topology()))
    if kept is not None:
        found.after.append(_without_gradients(kept))


def _mesh(topology: Any) -> LiveMesh:
    """The axes of a pipeline's ranks, which count row-major on them (deepspeed/runtime/pipe/topology.py)."""
    axes = tuple((_AXES.get(name, name), topology.get_dim(name)) for name in topology.get_axis_names())
    return LiveMesh(axes, tuple(range(topology.world_size())))


def _without_gradients(kept: Kept) -> Callable[[], None]:
    def refresh() -> None:
        with torch.no_grad():
            kept.refresh()

    return refresh


def _take_parameters(found: Targets, module: nn.Module, masters: Masters) -> set[int]:
    """Add what is not in the module's own memory; ids of the parameters whose contents those are."""
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    known = set()
    for key, parameter in parameters.items():
        # The first stage's copy of a tied layer is the one that counts; this is not it.
        echo = bool(getattr(parameter, "ds_pipe_replicated", False))
        if key in masters:
            master = masters[key]
            found.add(names[key], "value", master.tensor, placed=master.placed, kind="parameter", echo=echo)
        elif hasattr(parameter, "ds_id"):
            part = partitioned(parameter)
            kind: Kind = "parameter" if parameter.requires_grad else "frozen"
            found.add(names[key], "value", part.tensor, placed=part.placed, kind=kind)
        elif echo:
            found.add(names[key], "value", parameter, echo=True)
        else:
            continue
        known.add(key)
    return known
