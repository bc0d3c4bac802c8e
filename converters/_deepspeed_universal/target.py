"""A catalog laid out as a DeepSpeed universal folder: a task per state of each tensor, then the small files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from ucp.catalog import Catalog, Kind
from ucp.container.torchwrite import Slot, TorchFrame, dumps
from ucp.errors import FitError, UsageError
from ucp.layout import FlatRange
from ucp.plan import Digests, Extent, Section, Task, TensorSpec
from ucp.store import Store
from ucp.tree import TensorLeaf, Tree

from .carry import CLASSES, inlined
from .folders import Content, Folder, content
from .marks import Marks
from .names import LATEST, OPTIMIZER_STATE, check_paths, model_files, state_file, step_file
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
    family: str = FAMILY
    root: str = LATEST

    @cached_property
    def _small(self) -> tuple[dict[str, Tree], dict[str, Tree], tuple[str, ...]]:
        """Optimizer state, model state, and what of the training state they leave out."""
        left: list[str] = []

        def drop(path: str, reason: str) -> None:
            left.append(f"not carried, it would run code when DeepSpeed loads it: {path} ({reason})")

        optimizer = optimizer_tree(self.catalog, self.content, drop)
        model = model_tree(self.catalog, self.content, drop, mp=self.mp)
        return optimizer, model, tuple(left)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know: what this form of checkpoint cannot hold, and what DeepSpeed will not load of it."""
        loader = _loader_notes(self.catalog, self.content)
        return (*self.content.notes, *self._small[2], *loader, *self.marks.notes(self.catalog))

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
            tree = {"param": zeros, **self.marks.of(folder.name, spec.shape)}
            yield self._file(state_file(folder.name, state), tree)
        if folder.step is not None:
            yield self._file(step_file(folder.name), scalar_tree(folder.step))

    def _file(self, path: str, tree: Tree) -> tuple[str, bytes]:
        return f"{self.folder}/{path}", dumps(inlined(tree, self.store), archive=_stem(path), classes=CLASSES)


def make_target(catalog: Catalog, store: Store, *, tag: str | None = None, mp: int = 1) -> UniversalFolder:
    """Lay `catalog`, which lies in `store`, out as ``<tag>_universal`` in a save root of its own.

    `mp` is the number of model files, one for each model-parallel rank. FitError for names and states that such a
    folder cannot hold.
    """
    tag = tag or f"global_step{catalog.step or 0}"
    if "/" in tag or tag in (".", "..") or not tag.isprintable():
        raise UsageError(f"{tag!r} is not a tag", hint="a tag is the name of a folder inside the save root")
    arranged, name = content(catalog), f"{tag}_universal"
    marks = Marks(catalog)
    tasks = tuple(_task(catalog, name, folder, state, marks) for folder in arranged.folders for state in folder.states)
    _check_zeros(arranged)
    made = UniversalFolder(catalog, store, name, arranged, tasks, marks, mp)
    others = [state_file(folder.name, state) for folder in arranged.folders for state in folder.zeros]
    others += [step_file(folder.name) for folder in arranged.folders if folder.step is not None]
    check_paths([*(task.object for task in tasks), *(f"{name}/{path}" for path in (*others, OPTIMIZER_STATE))])
    return made


def _task(catalog: Catalog, name: str, folder: Folder, state: str, marks: Marks) -> Task:
    cover, path = catalog.cover(folder.name, state), state_file(folder.name, state)
    spec = _loadable(cover.spec) if _kind(catalog, folder) == "parameter" else cover.spec
    tree = {"param": Slot(0, spec), **marks.of(folder.name, cover.spec.shape)}
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
    if "per_rank" in catalog.state:
        yield "of the training state that differs between ranks, that of rank 0 is carried"
