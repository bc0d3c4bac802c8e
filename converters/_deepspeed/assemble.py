"""Puts the pieces of a DeepSpeed checkpoint together into a catalog."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from ucp.catalog import Catalog, Source, Tensor
from ucp.converter import Sharded
from ucp.errors import FitError
from ucp.layout import Mesh, Shape
from ucp.plan import Fragment, Key, TensorSpec
from ucp.store import Store
from ucp.tree import Tree

from .._programs import Known, from_config
from . import nodes
from .around import Around, read_around
from .carried import Part, carried_state
from .checks import check
from .experts import expert_entries, with_experts
from .files import locate
from .found import Found
from .info import INFO, PIPELINE_REPLICATED
from .load import Save, load
from .naming import candidates_of
from .patterns import Patterns
from .pipeline import layer_entries, local_entries, merge_stages
from .same import Comparison
from .stage0 import read_plain_optimizers
from .stage0_experts import read_expert_optimizers
from .steps import step_notes
from .weights import Weights, buffer_names, read_weights
from .zero import read_optimizer

_WRAPPERS = {1: "DeepSpeedZeroOptimizer", 2: "DeepSpeedZeroOptimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}


def read_catalog(store: Store, *, tag: str | None, frozen: Sequence[str], strict: bool = True) -> Catalog:
    """The catalog of the checkpoint at `store`; see `ucp.converters.deepspeed.DeepSpeed.read`."""
    sharded = read_sharded(store, tag=tag, frozen=frozen)
    if len(sharded.parts) == 1:
        return sharded.parts[0][1]
    # Most checkpoints need neither the language nor what it brings along.
    from .tensor_parallel import join

    catalog = join(store, sharded, strict=strict)
    return catalog if strict else replace(catalog, options={**catalog.options, "strict": False})


def read_sharded(store: Store, *, tag: str | None, frozen: Sequence[str]) -> Sharded:
    """The catalog of each tensor-parallel rank; see `ucp.converters.deepspeed.DeepSpeed.sharded`."""
    saves = load(store, locate(store, tag))
    check(store, saves)
    comparison = Comparison(store, [checksum for save in saves for checksum in save.checksums])
    parts = [_read_part(store, save, comparison, frozen) for save in saves]
    around = read_around(store, saves[0].folder, _gathered(parts))
    parts[0].weights.copies.update(around.copies)
    state = carried_state(parts, comparison)
    if around.state:
        state["around"] = around.state
    options = {name: value for name, value in (("tag", tag), ("frozen", tuple(frozen))) if value}
    catalogs = [_catalog(store, part, around if not part.save.tp else Around(), state, options) for part in parts]
    mesh = Mesh({**dict(saves[0].mesh.axes), "tp": len(saves)})
    known = _configured(around)
    return Sharded(
        [({"tp": part.save.tp}, catalog) for part, catalog in zip(parts, catalogs, strict=True)],
        mesh,
        config=known.sizes,
        flags=known.flags,
        program=known.program or None,
    )


def _configured(around: Around) -> Known:
    """Sizes and flags that a ``config.json`` of Hugging Face gives, where Trainer put one beside the checkpoint."""
    text = around.state.get("config.json")
    with suppress(ValueError, RecursionError, FitError):
        config = json.loads(text) if isinstance(text, str | bytes) else None
        if isinstance(config, dict):
            known = from_config(config)
            # How a module names its tensors is a matter of the transformers version, and names show it.
            return replace(known, flags={name: value for name, value in known.flags.items() if name != "in_memory"})
    return Known("")


def _read_part(store: Store, save: Save, comparison: Comparison, frozen: Sequence[str]) -> Part:
    stages = _optimizers(store, save, comparison, frozen)
    found, copies = merge_stages(store, list(stages.values()), replicated=_replicated(save))
    return Part(save, stages, found, read_weights(save, _module(save, found), found.shapes, comparison), copies)


def _replicated(save: Save) -> Callable[[str], bool]:
    """Which parameters several pipeline stages hold, as the checkpoint says of itself; asked where several do."""

    def is_listed(name: str) -> bool:
        told = save.model(0).root.get(INFO)
        listed = told.get(PIPELINE_REPLICATED) if isinstance(told, Mapping) else None
        return isinstance(listed, list | tuple) and bool(Patterns.of(map(str, listed)).matching(name))

    return is_listed


def _gathered(parts: Sequence[Part]) -> dict[str, Shape]:
    """Shapes of parameters whose low-precision copies may lie in a file of the whole model."""
    part = parts[0]
    if len(parts) > 1 or part.save.stage != 3:
        return {}
    return {name: shape for name, shape in part.found.shapes.items() if name not in part.weights.copies}


def _catalog(
    store: Store, part: Part, around: Around, state: Mapping[str, Tree], options: Mapping[str, object]
) -> Catalog:
    save, found, weights = part.save, part.found, part.weights
    tensors, fragments = _tensors(found, weights)
    files = (*save.files, *around.files)
    entries = [*(file.entry for file in files), *around.entries]
    return Catalog(
        url=store.url,
        source=_source(save, found, weights),
        tensors=tensors,
        fragments=fragments,
        step=_step(save),
        witnesses=_witnesses(weights, fragments),
        ties=weights.ties,
        param_groups=tuple(found.groups),
        state=state,
        checksums=tuple(checksum for file in files for checksum in file.checksums),
        objects={entry.path: (entry.size, entry.fingerprint) for entry in entries},
        notes=(*found.notes, *weights.notes, *around.notes, *step_notes(save, found)),
        options=options,
    )


def _optimizers(store: Store, save: Save, comparison: Comparison, frozen: Sequence[str]) -> dict[int, Found]:
    entries = local_entries(save) if save.layers else _whole_module(save)
    if not save.optims and save.expert_optims:
        return {0: read_expert_optimizers(store, save, comparison, entries, frozen)}
    if not save.optims:
        return read_plain_optimizers(store, save, comparison, candidates_of(entries, buffer_names(save), frozen))
    shapes = {name: node.extent.shape for name, node in entries.items() if nodes.is_tensor(node)}
    return {mp: read_optimizer(save, mp, comparison, shapes) for mp in range(save.mesh["pp"])}


def _module(save: Save, found: Found) -> dict[str, Tree]:
    return layer_entries(save, found.shapes) if save.layers else _whole_module(save)


def _whole_module(save: Save) -> dict[str, Tree]:
    """The module's entries; a pipeline with experts saves each stage's in its own model file."""
    entries: dict[str, Tree] = {}
    for pp in range(save.mesh["pp"]):
        model = save.model(pp)
        for name, node in nodes.mapping(model.root.get("module"), f"{model.path}: module").items():
            entries.setdefault(str(name), node)
    return with_experts(entries, expert_entries(save))


def _tensors(found: Found, weights: Weights) -> tuple[dict[str, Tensor], dict[Key, tuple[Fragment, ...]]]:
    """All tensors in the module's order; optimized parameters that the module does not list come last."""
    tensors: dict[str, Tensor] = {}
    fragments: dict[Key, tuple[Fragment, ...]] = {}
    for name in dict.fromkeys([*weights.order, *found.shapes]):
        if name in found.shapes:
            states = found.states[name]
            fragments.update({Key(name, state): stored.fragments for state, stored in states.items()})
            specs = {state: stored.spec for state, stored in states.items()}
            scalars, undecided = found.scalars.get(name, {}), found.undecided.get(name)
            tensors[name] = Tensor(name, "parameter", specs, scalars, undecided=undecided)
        else:
            held = weights.values[name]
            fragments[Key(name, "value")] = held.fragments
            tensors[name] = Tensor(name, weights.kinds[name], {"value": held.spec})
    return tensors, fragments


def _witnesses(
    weights: Weights, fragments: dict[Key, tuple[Fragment, ...]]
) -> dict[str, tuple[TensorSpec, tuple[Fragment, ...]]]:
    """The module's copies, unless the copy is the value itself; then further copies of it are replicas."""
    found: dict[str, tuple[TensorSpec, tuple[Fragment, ...]]] = {}
    for name, held in weights.copies.items():
        key = Key(name, "value")
        if any(fragment.extent == held.fragments[0].extent for fragment in fragments[key]):
            fragments[key] += held.fragments[1:]
        else:
            found[name] = (held.spec, held.fragments)
    return found


def _source(save: Save, found: Found, weights: Weights) -> Source:
    version = str(save.model(0).root.get("ds_version", ""))
    config = save.model(0).root.get("ds_config")
    named = config.get("optimizer") if isinstance(config, Mapping) else None
    decided = (states for name, states in found.states.items() if name not in found.undecided)
    masters = sorted({states["value"].spec.dtype for states in decided if "value" in states})
    return Source(
        "deepspeed",
        version,
        save.mesh,
        {
            "zero_stage": save.stage if _partitioned(save) else 0,
            "ds_version": version,
            "tag": save.folder.tag or None,
            "value_dtype": " ".join(masters) or None,
            "model_dtype": " ".join(sorted(weights.dtypes)) or None,
            "wrapper": _wrapper(save),
            "optimizer": str(named.get("type")) if isinstance(named, Mapping) else None,
            **_expert_parallel(found),
        },
    )


def _expert_parallel(found: Found) -> dict[str, int | str]:
    """The degree over which native mixtures of experts are spread, or where layers differ all degrees."""
    degrees = sorted(found.degrees)
    if not degrees:
        return {}
    return {"expert_parallel": degrees[0] if len(degrees) == 1 else " ".join(map(str, degrees))}


def _partitioned(save: Save) -> bool:
    """Whether ZeRO was on: BF16_Optimizer partitions like stage 1 without it, and then there are no param_shapes."""
    return save.model(0).root.get("param_shapes") is not None


def _wrapper(save: Save) -> str | None:
    """DeepSpeed's class around the optimizer, told by the keys it saves."""
    if save.optims:
        inner = save.optims[0, 0].root["optimizer_state_dict"]
        return _WRAPPERS[save.stage] if "zero_stage" in inner else "BF16_Optimizer"
    optimizer = save.model(0).root.get("optimizer")
    if not isinstance(optimizer, Mapping):
        return None
    if "fp32_groups_flat" in optimizer:
        return "FP16_Optimizer"
    return "FP16_UnfusedOptimizer" if "fp32_groups" in optimizer else None


def _step(save: Save) -> int | None:
    steps = save.model(0).root.get("global_steps")
    return None if steps is None else nodes.integer(steps, f"{save.model(0).path}: global_steps")
