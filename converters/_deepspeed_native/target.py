"""A catalog laid out as a native DeepSpeed checkpoint: a file per rank, as the job that resumes would have saved it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ucp.catalog import Catalog
from ucp.converter import Layout
from ucp.plan import Digests, Task
from ucp.store import Store
from ucp.training import first_rank
from ucp.tree import Tree

from .._deepspeed_universal.carry import CLASSES, carry
from .around import carried, files
from .flat import Leaves, task
from .groups import Group, Remarks, arrange
from .model import ModelFile, configuration
from .optim import OptimizerFile, flattened
from .parts import parts
from .scaler import scaler_entries
from .wanted import Wanted, wanted

FAMILY = "deepspeed"
LATEST = "latest"
_VERSION = "0.16.0"
"""Of a source that no DeepSpeed wrote; loaders ask for at least 0.3.17 (``_load_global_state``)."""
_CLASSES = CLASSES | {"deepspeed.utils.tensor_fragment.fragment_address"}


@dataclass(frozen=True)
class NativeFolder:
    """A DeepSpeed save root with one tag folder. The root object is ``latest``, which names the tag.

    `around` are the trees of the files of Trainer and Accelerate beside it; their tensors lie in `store`.
    """

    store: Store
    tag: str
    tasks: tuple[Task, ...]
    notes: tuple[str, ...]
    losses: tuple[str, ...]
    around: Mapping[str, Tree]
    family: str = FAMILY
    root: str = LATEST

    def finish(self, digests: Mapping[str, Digests]) -> Iterator[tuple[str, bytes]]:
        """What lies around the tag folder, then ``latest``."""
        del digests
        yield from files(self.around, self.store)
        yield LATEST, self.tag.encode()


def make_target(catalog: Catalog, store: Store, *, layout: Layout | None = None, **options: Any) -> NativeFolder:
    """Lay `catalog`, which lies in `store`, out as a save root for a job of ZeRO over ``layout.mesh["dp"]`` ranks.

    With a program, tensors get the names and the cuts of its left side; tensor-parallel ranks take the source's own.
    `options` are those of `wanted.Wanted`. FitError for what ZeRO's flat tensors cannot hold, UsageError for options.
    """
    plan, remarks = wanted(catalog, layout, options), Remarks()
    tasks: list[Task] = []
    leaves = Leaves(store)
    for number, part in enumerate(parts(catalog, layout or Layout(), tp=plan.tp)):
        folder = _Folder.of(part, plan, remarks if number == 0 else Remarks())
        tasks += folder.tasks(leaves, number)
        if number == 0:
            remarks.notes += _notes(part, plan, folder.optimizer.groups, folder.model)
    around, left = carried(catalog.state.get("around"), tag=plan.tag)
    if left:
        remarks.notes.append(f"left out of what lies around the tag folder: {' '.join(sorted(left))}")
    notes, losses = tuple(dict.fromkeys(remarks.notes)), tuple(remarks.losses)
    return NativeFolder(store, plan.tag, tuple(tasks), notes, losses, around)


@dataclass(frozen=True, slots=True)
class _Folder:
    """The files of one tensor-parallel rank."""

    plan: Wanted
    optimizer: OptimizerFile
    model: ModelFile
    remarks: Remarks

    @classmethod
    def of(cls, catalog: Catalog, plan: Wanted, remarks: Remarks) -> _Folder:
        groups = arrange(catalog, keep_empty=plan.stage == 3, remarks=remarks)
        flats = flattened(groups, plan)
        state = first_rank(catalog)
        version = state.get("ds_version")
        version = version if isinstance(version, str) and version else _VERSION
        config = configuration(state.get("ds_config"), plan, remarks.drop)
        hyper = tuple(carry(dict(group.options), f"param_groups.{i}", remarks.drop) for i, group in enumerate(groups))
        scaler = scaler_entries(catalog, plan, remarks)
        optimizer = OptimizerFile(catalog, plan, groups, flats, hyper, scaler, version)
        return cls(plan, optimizer, ModelFile(catalog, plan, groups, flats, config, version), remarks)

    def tasks(self, leaves: Leaves, mp: int) -> Iterator[Task]:
        """A task per file, for model-parallel rank `mp`."""
        plan, model = self.plan, self.model
        for rank in range(plan.dp):
            state = {"optimizer_state_dict": self.optimizer.tree(rank)}
            tree = {**state, "ds_config": dict(model.config), "ds_version": model.version}
            yield task(f"{plan.tag}/{_optimizer_file(plan, rank, mp)}", tree, leaves, classes=_CLASSES)
        for rank in range(plan.dp if plan.stage == 3 else 1):
            tree = model.tree(rank, self.remarks.drop if rank == 0 else _ignore)
            yield task(f"{plan.tag}/{_model_file(plan, rank, mp)}", tree, leaves, classes=_CLASSES)


def _ignore(path: str, reason: str) -> None:
    """What is left behind was reported for the first rank."""


def _optimizer_file(plan: Wanted, rank: int, mp: int) -> str:
    """deepspeed/runtime/engine.py, ``_get_rank_zero_ckpt_name``."""
    prefix = "bf16_" if plan.dtype == "bfloat16" else ""
    return f"{prefix}zero_pp_rank_{rank}_mp_rank_{mp:02d}_optim_states.pt"


def _model_file(plan: Wanted, rank: int, mp: int) -> str:
    """deepspeed/runtime/engine.py, ``_get_ckpt_name``."""
    name = f"mp_rank_{mp:02d}_model_states.pt"
    return f"zero_pp_rank_{rank}_{name}" if plan.stage == 3 else name


def _notes(catalog: Catalog, plan: Wanted, groups: tuple[Group, ...], model: ModelFile) -> Iterator[str]:
    job = f"ZeRO {plan.stage} over {plan.dp} ranks in {plan.dtype}"
    job += f" and {plan.tp} tensor-parallel ones" if plan.tp > 1 else ""
    setting = " with round_robin_gradients" if plan.round_robin else ""
    setting += " with data_types.grad_accum_dtype fp32" if plan.bf16_optimizer else ""
    counts = ", ".join(str(len(group.params)) for group in groups)
    yield (
        f"for a job of {job}{setting}. DeepSpeed matches parameters by position and does not compare names: the job's "
        f"optimizer must have {len(groups)} groups of {counts} parameters, in the order of the source's"
    )
    if not any(group.states for group in groups):
        yield "the source has no optimizer states: load with load_checkpoint(…, load_optimizer_states=False)"
    kept = sorted({catalog.tensors[name].states["value"].dtype for name in model.frozen} - {plan.dtype})
    if kept:
        yield f"frozen parameters keep {' '.join(kept)}; the job casts them to its own dtype as it loads"
    if "per_rank" in catalog.state:
        yield "of the training state that differs between ranks, that of rank 0 is carried"
    if catalog.state.get("pipeline_copies"):
        yield "left out: copies of tied parameters that pipeline stages trained apart"
