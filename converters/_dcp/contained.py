"""What a DCP folder of a catalog holds: tensors in chunks, objects, the path of every key, and remarks for the user."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from ucp.catalog import Catalog, Scalar, Tensor
from ucp.container.torchwrite import dumps
from ucp.layout import Box, FlatRange, itemsize
from ucp.plan import ZEROS, Cover, Extent, Fragment, Key, TensorSpec, Witness
from ucp.store import Store
from ucp.training import first_rank, other_states, progress
from ucp.tree import TensorLeaf, Tree

from .._deepspeed_universal.small import scalar_tree
from .cut import Deal, cut
from .folder import Blob, Chunk, Entry, Run
from .hyper import Group, groups_of
from .naming import Naming, Path, joined
from .rest import CLASSES, Left, entry, flattened

_START_AS_ZERO = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq"})
"""States that an optimizer of the Adam kind begins with zeros for."""


@dataclass(slots=True)
class Contained:
    """Entries and blobs with the path of each key, and the key that each alias shares its place with.

    `notes` and `losses` are as a target has them.
    """

    entries: list[Entry] = field(default_factory=list)
    blobs: list[Blob] = field(default_factory=list)
    paths: dict[str, Path] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)


def contain(catalog: Catalog, store: Store, naming: Naming, *, files: int) -> Contained:
    """Everything of `catalog`, which lies in `store`, dealt to `files` files."""
    filling = _Filling(catalog, store, naming, Deal(files))
    groups = groups_of(catalog)
    for tensor in catalog.tensors.values():
        filling.value(tensor)
    for tensor in catalog.tensors.values():
        filling.states(tensor)
    for group in groups:
        filling.begun(group)
    for number, group in enumerate(groups):
        filling.group(number, group)
    filling.rest(_training_state(catalog))
    filling.remarks(groups)
    names = sorted({str(key) for states in other_states(catalog).values() for key in states})
    if names:
        filling.made.losses.append(
            f"optimizer states that are no tensors of parameters are left out: {' '.join(names)}"
        )
    return filling.made


_TOLD_ELSEWHERE = frozenset({"state", "loss_scaler", "dynamic_loss_scale", "overflow"})
"""The loss scale is carried under a name of its own; states of parameters are a loss."""


def _apart(state: Mapping[str, Tree]) -> Iterator[str]:
    """What module and optimizer hold beside tensors, which has no key that a job of another kind would ask for."""
    for name in ("module", "optimizer"):
        held = state.get(name)
        keys = sorted(str(key) for key in held if key not in _TOLD_ELSEWHERE) if isinstance(held, dict) else []
        if keys:
            yield f"left out: entries of the {name} beside tensors: {' '.join(keys)}"


def _training_state(catalog: Catalog) -> dict[str, Tree]:
    """What is neither tensor nor hyper-parameter, under the names that readers of ours know."""
    told = progress(catalog)
    state = {key: value for key, value in first_rank(catalog).items() if key not in ("module", "optimizer")}
    known = {
        "lr_scheduler": told.lr_scheduler,
        "loss_scale": None if told.loss_scale is None else dict(told.loss_scale),
        "rng": told.rng,
        "consumed_samples": told.consumed_samples,
    }
    state.update({key: value for key, value in known.items() if value is not None})
    return state


class _Filling:
    """Fills `made`, tensor by tensor."""

    def __init__(self, catalog: Catalog, store: Store, naming: Naming, deal: Deal) -> None:
        self.made = Contained()
        self._catalog, self._store, self._naming, self._deal = catalog, store, naming, deal
        self._aliases: dict[str, list[str]] = {}
        for alias, name in catalog.ties.items():
            self._aliases.setdefault(name, []).append(alias)
        self._zeroed: list[str] = []
        self._numbers = 0
        self._left: list[Left] = []

    def value(self, tensor: Tensor) -> None:
        """A parameter or buffer, under each of its names."""
        paths = [self._naming.value(name) for name in self._names(tensor.name)]
        cover = self._catalog.cover(tensor.name, "value")
        self._tensor(paths, cover, self._catalog.witness(tensor.name))

    def states(self, tensor: Tensor) -> None:
        """Optimizer states of a parameter, and its step."""
        for state in tensor.states:
            if state != "value":
                self._tensor(self._paths(tensor.name, state), self._catalog.cover(tensor.name, state))
        for key, scalar in tensor.scalars.items():
            self._scalar(self._paths(tensor.name, key), key, scalar)

    def begun(self, group: Group) -> None:
        """States that other parameters of the group have: a job asks for them, even of one that never took a step."""
        members = [self._catalog.tensors[name] for name in group.names if name in self._catalog.tensors]
        trained = [tensor for tensor in members if tensor.kind == "parameter"]
        wanted = dict.fromkeys(state for tensor in trained for state in tensor.states if state in _START_AS_ZERO)
        step = next((tensor.scalars["step"] for tensor in trained if "step" in tensor.scalars), None)
        for tensor in trained:
            if len(tensor.states) > 1 or not wanted:
                continue
            self._zeroed.append(tensor.name)
            for state in wanted:
                spec = TensorSpec(tensor.states["value"].shape, "float32")
                self._tensor(self._paths(tensor.name, state), _zeros(Key(tensor.name, state), spec))
            if step is not None and "step" not in tensor.scalars:
                self._scalar(self._paths(tensor.name, "step"), "step", replace(step, value=type(step.value)(0)))

    def group(self, number: int, group: Group) -> None:
        """Hyper-parameters of an optimizer group."""
        flat = self._naming.flat
        names = tuple(alias for name in group.names for alias in self._names(name)) if flat else group.names
        for option, value in group.options.items():
            paths = list(self._naming.options(number, names, option))
            item = entry(paths[0], value, self._store) if paths else None
            if isinstance(item, Left):
                self._left.append(item)
            elif item is not None:
                self._each(paths, item.value)
        if not flat:
            self._each(self._naming.options(number, names, "params"), list(names))

    def rest(self, state: Mapping[str, Tree]) -> None:
        """Everything else."""
        for item in flattened(state, self._store):
            if isinstance(item, Left):
                self._left.append(item)
            else:
                self._each([item.path], item.value)

    def remarks(self, groups: list[Group]) -> None:
        """Notes of what was made up or left out."""
        self.made.notes.extend(self._remarks(groups))

    def _remarks(self, groups: list[Group]) -> Iterator[str]:
        if not any(len(tensor.states) > 1 for tensor in self._catalog.tensors.values()):
            yield "the source has no optimizer states, so a job can load the model alone"
        if self._zeroed:
            yield (
                f"{len(self._zeroed)} parameters never took an optimizer step ({self._zeroed[0]}, …): their states are "
                "written as zeros at step 0, which is where torch's optimizers begin"
            )
        added = sorted({option for group in groups for option in group.added})
        if added:
            yield (
                "the source's optimizer is not one of torch.optim; what else a torch.optim.AdamW job asks for is "
                f"written with its defaults: {' '.join(added)}"
            )
        if self._numbers:
            yield f"{self._numbers} steps that were plain numbers are written as tensors, as torch.optim keeps them"
        if "per_rank" in self._catalog.state:
            yield "of the training state that differs between ranks, that of rank 0 is carried"
        yield from (f"left out: {joined(left.path)} ({left.reason})" for left in self._left)
        yield from _apart(first_rank(self._catalog))

    def _names(self, name: str) -> list[str]:
        return [name, *self._aliases.get(name, ())]

    def _paths(self, name: str, state: str) -> list[Path]:
        return [self._naming.state(alias, state) for alias in self._names(name)]

    def _keys(self, paths: list[Path]) -> tuple[str, tuple[str, ...]]:
        """The key of the first of `paths` and, as its aliases, those of the others."""
        key, *others = map(joined, paths)
        self.made.paths.update({joined(path): path for path in paths})
        self.made.aliases.update(dict.fromkeys(others, key))
        return key, tuple(others)

    def _tensor(self, paths: list[Path], cover: Cover, witness: Witness | None = None) -> None:
        spec = cover.spec
        boxes = cut(spec.shape, spec.dtype, self._deal.files)
        dealt = self._deal.deal([box.size * itemsize(spec.dtype) for box in boxes])
        chunks = tuple(_chunk(box, cover, witness, file) for box, file in zip(boxes, dealt, strict=True))
        key, aliases = self._keys(paths)
        self.made.entries.append(Entry(key, spec.shape, spec.dtype, chunks, aliases))

    def _scalar(self, paths: list[Path], key: str, scalar: Scalar) -> None:
        if key == "step" and scalar.dtype in ("int", "float"):
            self._numbers += 1
            scalar = replace(scalar, dtype="float32" if abs(scalar.value) < 1 << 24 else "float64")
        tree = scalar_tree(scalar)
        if isinstance(tree, TensorLeaf):
            self._leaf(paths, tree)
        else:
            self._each(paths, tree)

    def _each(self, paths: Iterable[Path], value: Tree) -> None:
        """`value` under each of `paths`, stored as often."""
        data = None
        for path in paths:
            if isinstance(value, TensorLeaf) and not value.numpy:
                self._leaf([path], value)
                continue
            data = dumps(value, classes=CLASSES) if data is None else data
            key, _ = self._keys([path])
            self.made.blobs.append(Blob(key, data))

    def _leaf(self, paths: list[Path], leaf: TensorLeaf) -> None:
        extent = leaf.extent
        if leaf.inline is None:
            fragment = Fragment(Box.whole(extent.shape), extent)
            spec = TensorSpec(extent.shape, extent.dtype)
            self._tensor(paths, Cover.of(Key(joined(paths[0]), "value"), spec, [fragment]))
            return
        key, aliases = self._keys(paths)
        chunk = Chunk((0,) * len(extent.shape), extent.shape, leaf.inline)
        self.made.entries.append(Entry(key, extent.shape, extent.dtype, (chunk,), aliases))


def _chunk(box: Box, cover: Cover, witness: Witness | None, file: int) -> Chunk:
    flat = box.flat(cover.spec.shape)
    assert isinstance(flat, FlatRange), "rows of a tensor are one run"
    return Chunk(box.start, box.shape, (Run(cover, flat, witness),), file)


def _zeros(key: Key, spec: TensorSpec) -> Cover:
    """A tensor of zeros that lies nowhere."""
    return Cover.of(key, spec, [Fragment(Box.whole(spec.shape), Extent.contiguous(ZEROS, 0, spec.shape, spec.dtype))])
