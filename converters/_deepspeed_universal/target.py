"""A catalog laid out as a DeepSpeed universal folder: a task per state of each tensor, then the small files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from ucp.catalog import Catalog, Kind
from ucp.container.torchwrite import Slot, TorchFrame, dumps
from ucp.errors import FitError, UsageError
from ucp.layout import FlatRange, Shape
from ucp.plan import Digests, Extent, Section, Task, TensorSpec
from ucp.store import Store
from ucp.training import first_rank, other_states, progress
from ucp.tree import TensorLeaf, Tree

from .carry import CLASSES, inlined
from .experts import COUNT, GROUP_NAMES, IS_EXPERT, of_autoep, stacked
from .folders import Content, Folder, content
from .marks import Marks
from .names import LATEST, OPTIMIZER_STATE, check_paths, model_files, state_file, step_file
from .scaler import loss_scale
from .small import disagreeing, model_tree, optimizer_tree, scalar_tree

FAMILY = "deepspeed-universal"
_MOST_ZERO_BYTES = 256 << 20


@dataclass(frozen=True)
class UniversalFolder:
    """A DeepSpeed save root with one universal folder, `folder`, to be written.

    The root object is ``latest_universal``, which ``engine.load_checkpoint(url)`` needs; a job that is told the tag
    needs the model file, which is put after everything it stands for.
    """

    catalog: Catalog
    store: Store
    folder: str
    content: Content
    tasks: tuple[Task, ...]
    marks: Marks
    mp: int = 1
    stacks: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    group_names: tuple[Tree, ...] = ()
    family: str = FAMILY
    root: str = LATEST
    losses: tuple[str, ...] = ()

    @cached_property
    def _small(self) -> tuple[dict[str, Tree], dict[str, Tree], tuple[str, ...]]:
        """Optimizer state, model state, and what of the training state they leave out."""
        left: list[str] = []

        def drop(path: str, reason: str) -> None:
            left.append(f"not carried, it would run code when DeepSpeed loads it: {path} ({reason})")

        optimizer = optimizer_tree(self.catalog, self.content, drop)
        if self.group_names:
            optimizer[GROUP_NAMES] = list(self.group_names)
        model = model_tree(self.catalog, self.content, drop, mp=self.mp)
        return optimizer, model, tuple(left)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know: what this form of checkpoint cannot hold, and what DeepSpeed will not load of it."""
        loader = _loader_notes(self.catalog, self.content)
        experts = _expert_notes(self.stacks)
        return (*self.content.notes, *self._small[2], *loader, *experts, *self.marks.notes(self.catalog))

    def finish(self, digests: Mapping[str, Digests]) -> Iterator[tuple[str, bytes]]:
        """Steps and made-up zeros, optimizer state, model files, ``latest_universal``."""
        del digests
        optimizer, model, _ = self._small
        for folder in self.content.folders:
            yield from self._beside(folder)
        yield self._file(OPTIMIZER_STATE, optimizer)
        for path in model_files(self.mp, zero3=self.content.zero3):
            yield self._file(path, model)
        yield LATEST, self.folder.encode()

    def _beside(self, folder: Folder) -> Iterator[tuple[str, bytes]]:
        """The files of a tensor's folder that are no task."""
        for state, spec in folder.zeros.items():
            zeros = TensorLeaf(Extent.contiguous("", 0, _loadable(spec).shape, spec.dtype), inline=bytes(spec.nbytes))
            tree = {"param": zeros, **self.marks.of(folder.name, spec.shape), **_stack_of(self.counts, folder.name)}
            yield self._file(state_file(folder.name, state), tree)
        if folder.step is not None:
            yield self._file(step_file(folder.name), scalar_tree(folder.step))

    def _file(self, path: str, tree: Tree) -> tuple[str, bytes]:
        return f"{self.folder}/{path}", dumps(inlined(tree, self.store), archive=_stem(path), classes=CLASSES)


def make_target(
    catalog: Catalog, store: Store, *, tag: str | None = None, mp: int = 1, ep: int | None = None
) -> UniversalFolder:
    """Lay `catalog`, which lies in `store`, out as ``<tag>_universal`` in a save root of its own.

    `mp` is the number of model files, one for each model-parallel rank; `ep` the expert-parallel degree that native
    mixtures of experts are laid out for, that of the source where it is not given. FitError for names and states that
    such a folder cannot hold.
    """
    names = tuple(group.options.get("name") for group in catalog.param_groups)
    catalog, stacks = stacked(catalog, ep or _source_degree(catalog))
    renamed = names != tuple(group.options.get("name") for group in catalog.param_groups)
    tag = tag or f"global_step{catalog.step or 0}"
    if "/" in tag or tag in (".", "..") or not tag.isprintable():
        raise UsageError(f"{tag!r} is not a tag", hint="a tag is the name of a folder inside the save root")
    counts = {**stacks, **of_autoep(catalog)}
    arranged, name = content(catalog), f"{tag}_universal"
    marks = Marks(catalog)
    tasks = tuple(
        _task(catalog, name, folder, state, {**marks.of(folder.name, _shape(catalog, folder, state)), **beside})
        for folder in arranged.folders
        for beside in [_stack_of(counts, folder.name)]
        for state in folder.states
    )
    _check_zeros(arranged)
    known = names if renamed else ()
    losses = tuple(_losses(catalog))
    made = UniversalFolder(catalog, store, name, arranged, tasks, marks, mp, stacks, counts, known, losses=losses)
    others = [state_file(folder.name, state) for folder in arranged.folders for state in folder.zeros]
    others += [step_file(folder.name) for folder in arranged.folders if folder.step is not None]
    check_paths([*(task.object for task in tasks), *(f"{name}/{path}" for path in (*others, OPTIMIZER_STATE))])
    return made


def _losses(catalog: Catalog) -> Iterator[str]:
    names = sorted({str(key) for states in other_states(catalog).values() for key in states})
    if names:
        yield f"optimizer states that are no tensors of parameters are left out: {' '.join(names)}"


def _shape(catalog: Catalog, folder: Folder, state: str) -> Shape:
    return catalog.tensors[folder.name].states[state].shape


def _stack_of(stacks: Mapping[str, int], name: str) -> dict[str, Tree]:
    """What says of a file that it holds several experts."""
    return {IS_EXPERT: True, COUNT: stacks[name]} if name in stacks else {}


def _source_degree(catalog: Catalog) -> int:
    """The expert-parallel degree of the source, if it had one."""
    degree = catalog.source.detail.get("expert_parallel")
    return degree if isinstance(degree, int) else 1


def _task(catalog: Catalog, name: str, folder: Folder, state: str, beside: Mapping[str, Tree]) -> Task:
    cover, path = catalog.cover(folder.name, state), state_file(folder.name, state)
    spec = _loadable(cover.spec) if _kind(catalog, folder) == "parameter" else cover.spec
    tree = {"param": Slot(0, spec), **beside}
    frame = TorchFrame.of(tree, archive=_stem(path), classes=CLASSES)
    witness = catalog.witness(folder.name) if state == "value" else None
    section = Section(frame.offsets[0], FlatRange(0, spec.size), cover, witness)
    return Task(f"{name}/{path}", frame.size, frame, (section,))


def _kind(catalog: Catalog, folder: Folder) -> Kind:
    return catalog.tensors[folder.name].kind


def _loadable(spec: TensorSpec) -> TensorSpec:
    """The loaders cut the tensor along dim 0, so a scalar needs one (deepspeed/checkpoint/universal_checkpoint.py)."""
    return spec if spec.shape else replace(spec, shape=(1,))


def _round_robin(catalog: Catalog) -> bool:
    config = catalog.state.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    return isinstance(zero, dict) and bool(zero.get("round_robin_gradients"))


def _stem(path: str) -> str:
    """What torch.save calls the folder inside the zip."""
    return path.rpartition("/")[2].removesuffix(".pt")


def _check_zeros(arranged: Content) -> None:
    for folder in arranged.folders:
        for state, spec in folder.zeros.items():
            if spec.nbytes > _MOST_ZERO_BYTES:
                raise FitError(
                    f"{folder.name}: never took an optimizer step, and {spec.nbytes} bytes of zeros for its {state!r} "
                    "are too many",
                    hint="leave it out of the optimizer, or resume from the universal form with ucp.load",
                )


def _expert_notes(stacks: Mapping[str, int]) -> Iterator[str]:
    if stacks:
        ep = max(stacks.values())
        yield (
            f"experts are laid out for jobs of expert-parallel degree {ep}, and others fail on loading: for another "
            "degree give ep (on the command line: -t ep=…)"
        )


def _loader_notes(catalog: Catalog, arranged: Content) -> Iterator[str]:
    remedy = "call ucp.converters.deepspeed_universal.finish_load(engine, url) after load_checkpoint"
    untrained = sum(tensor.kind != "parameter" for tensor in catalog.tensors.values())
    if untrained:
        yield f"DeepSpeed does not load the {untrained} frozen parameters and buffers: {remedy}"
    if arranged.zero3 and len(arranged.groups) > 1:
        differ = ", ".join(disagreeing(arranged))
        keeps = f"keeps its own {differ}, since its loader knows one optimizer group, and " if differ else ""
        yield f"a ZeRO-3 job {keeps}counts steps of torch's optimizers once per group: {remedy}"
    if _round_robin(catalog):
        yield (
            "the source sets round_robin_gradients; set it to false in the job that loads, whatever the checkpoint: "
            "under it DeepSpeed's universal loader puts values in the wrong places"
        )
    saved, told = first_rank(catalog).get("optimizer"), progress(catalog).loss_scale
    if told is not None and not (isinstance(saved, dict) and loss_scale(saved)):
        yield (
            f"the loss scale {told['scale']} is carried as the script's own state, and DeepSpeed does not load it: an "
            "fp16 job starts with its initial_scale_power"
        )
    if "per_rank" in catalog.state:
        yield "of the training state that differs between ranks, that of rank 0 is carried"
