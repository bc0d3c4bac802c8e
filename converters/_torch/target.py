"""A catalog laid out as one file of torch.save, which ``torch.load(weights_only=True)`` takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ucp.catalog import Catalog, ParamGroup
from ucp.container.torchwrite import Slot, TorchFrame
from ucp.layout import FlatRange
from ucp.plan import Cover, Digests, Section, Task, Witness
from ucp.store import Store
from ucp.training import other_states
from ucp.tree import Tree

from .._deepspeed_universal.small import scalar_tree
from .files import ROOT
from .ours import ENTRY, FILE, TAKEN, VERSION, root_document
from .plain import Plain

FAMILY = "torch"

Others = Mapping[str, Mapping[str, Tree]]
"""Optimizer states of parameters that are no tensors of their shape."""


@dataclass(frozen=True, slots=True)
class TorchTarget:
    """A folder with ``checkpoint.pt`` and, put last, ``checkpoint.json``."""

    tasks: tuple[Task, ...]
    notes: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    family: str = FAMILY
    root: str = ROOT

    def finish(self, digests: Mapping[str, Digests]) -> Iterator[tuple[str, bytes]]:
        """The root object."""
        del digests
        yield ROOT, root_document(self.tasks[0].size)


class _Slots:
    """Hands out slots for tensors, in the order in which the tree has them."""

    def __init__(self) -> None:
        self.covers: list[tuple[Cover, Witness | None]] = []

    def of(self, cover: Cover, witness: Witness | None = None) -> Slot:
        """A slot for all elements of a cover."""
        self.covers.append((cover, witness))
        return Slot(len(self.covers) - 1, cover.spec)


def make_target(catalog: Catalog, store: Store) -> TorchTarget:
    """Lay `catalog`, which lies in `store`, out as a model and an optimizer whose states are numbered and named."""
    slots = _Slots()
    plain = Plain(store, slots.of)
    model = _model(catalog, slots)
    tree: dict[str, Tree] = {"model": model}
    groups = _groups(catalog)
    owned = {catalog.ties.get(name, name) for group in groups for name in group.params}
    others = {name: held for name, held in other_states(catalog).items() if name in owned}
    if groups:
        tree["optimizer"] = _optimizer(catalog, groups, slots, plain, others)
    if catalog.step is not None:
        tree["step"] = catalog.step
    beside = {key: value for key, value in catalog.state.items() if key in TAKEN - {"module"}}
    tree.update(plain.entries({k: v for k, v in catalog.state.items() if k not in TAKEN}, ""))
    kinds = {name: tensor.kind for name, tensor in catalog.tensors.items() if tensor.kind != "parameter"}
    module = catalog.state.get("module")
    model.update(plain.entries(module, "module.") if isinstance(module, dict) else {})
    tree[ENTRY] = {
        "version": VERSION,
        "kinds": kinds,
        "groups": len(catalog.param_groups),
        "state": plain.entries(_without_named(beside, others), ""),
    }
    frame = TorchFrame.of(tree, archive=FILE.removesuffix(".pt"), classes=plain.classes)
    sections = tuple(
        Section(offset, FlatRange(0, cover.spec.size), cover, witness)
        for offset, (cover, witness) in zip(frame.offsets, slots.covers, strict=True)
    )
    task = Task(FILE, frame.size, frame, sections)
    return TorchTarget((task,), tuple(plain.left_out), tuple(_losses(catalog)))


def _model(catalog: Catalog, slots: _Slots) -> dict[str, Tree]:
    """Values of all tensors; those that are tied share their bytes."""
    found = {
        name: slots.of(catalog.cover(name, "value"), catalog.witness(name))
        for name, tensor in catalog.tensors.items()
        if "value" in tensor.states
    }
    aliases = {alias: found[name] for alias, name in catalog.ties.items() if name in found}
    return {**found, **aliases}


def _groups(catalog: Catalog) -> list[ParamGroup]:
    """The optimizer's groups; those of its parameters that no group has make one more, without options."""
    owned = {catalog.ties.get(name, name) for group in catalog.param_groups for name in group.params}
    others = tuple(
        name
        for name, tensor in catalog.tensors.items()
        if name not in owned and (tensor.scalars or set(tensor.states) - {"value"})
    )
    return [*catalog.param_groups, *([ParamGroup(others, {})] if others else [])]


def _optimizer(
    catalog: Catalog, groups: list[ParamGroup], slots: _Slots, plain: Plain, others: Others
) -> dict[str, Tree]:
    """As ``torch.optim.Optimizer.state_dict`` gives it, with the names that it has since torch 2.6."""
    numbers: dict[str, int] = {}
    for name in (name for group in groups for name in group.params):
        numbers.setdefault(name, len(numbers))
    state = {number: _states(catalog, name, slots) for name, number in numbers.items()}
    for name, number in numbers.items():
        state[number] |= plain.entries(others.get(catalog.resolve(name), {}), f"state.{name}.")
    return {
        "state": {number: states for number, states in state.items() if states},
        "param_groups": [
            {
                **plain.entries(group.options, f"param_groups.{g}."),
                "params": [numbers[name] for name in group.params],
                "param_names": list(group.params),
            }
            for g, group in enumerate(groups)
        ],
    }


def _states(catalog: Catalog, name: str, slots: _Slots) -> dict[str, Tree]:
    tensor = catalog.tensors[catalog.resolve(name)]
    found = {key: scalar_tree(scalar) for key, scalar in tensor.scalars.items()}
    found.update({state: slots.of(catalog.cover(name, state)) for state in tensor.states if state != "value"})
    return found


def _without_named(beside: Mapping[str, Tree], others: Others) -> dict[str, Tree]:
    """Training state without optimizer states of nobody, and without those that are with their parameters."""
    optimizer = beside.get("optimizer")
    if not isinstance(optimizer, dict):
        return dict(beside)
    kept = {key: value for key, value in optimizer.items() if key != "unnamed"}
    if isinstance(kept.get("state"), dict):
        kept["state"] = {name: held for name, held in kept["state"].items() if name not in others}
    return {**beside, "optimizer": {key: value for key, value in kept.items() if key != "state" or value}}


def _losses(catalog: Catalog) -> Iterator[str]:
    undecided = [tensor for tensor in catalog.tensors.values() if tensor.undecided is not None]
    if undecided:
        shown = " ".join(tensor.name for tensor in undecided[:8]) + (" …" if len(undecided) > 8 else "")
        yield f"optimizer states that cannot be told apart are left out, those of {shown}: {undecided[0].undecided}"
    for name, tensor in catalog.tensors.items():
        if "value" not in tensor.states:
            yield f"{name} has no value; a state dict of a model cannot hold it"
