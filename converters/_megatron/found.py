"""What a reader has found of tensors and their states, on its way into a catalog."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ucp.catalog import Checksum, Kind, Scalar, Tensor
from ucp.errors import CorruptError
from ucp.plan import Fragment, Key, TensorSpec

VALUE = "value"
STATES = {"param": VALUE, "fp32_param": VALUE}
"""What optimizers call the master of a parameter."""

Held = tuple[TensorSpec, tuple[Fragment, ...]]


@dataclass(slots=True)
class Found:
    """Model tensors by name (`weights`), optimizer states by (name, state), and numbers that states keep."""

    weights: dict[str, Held] = field(default_factory=dict)
    states: dict[Key, Held] = field(default_factory=dict)
    scalars: dict[str, dict[str, Scalar]] = field(default_factory=dict)
    buffers: set[str] = field(default_factory=set)
    checksums: list[Checksum] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    trained: bool = True
    """Whether there is an optimizer, so that what it does not hold was not trained."""

    def keep(self, wanted: Callable[[str], bool]) -> None:
        """Forget all tensors but those whose names are `wanted`."""
        self.weights = {name: held for name, held in self.weights.items() if wanted(name)}
        self.states = {key: held for key, held in self.states.items() if wanted(key.name)}

    def add(self, name: str, state: str, spec: TensorSpec, fragments: Iterable[Fragment]) -> None:
        """Further fragments of a state."""
        key = Key(name, STATES.get(state, state))
        self.states[key] = (spec, (*self.states.get(key, (spec, ()))[1], *fragments))


@dataclass(frozen=True, slots=True)
class Tensors:
    """The parts of a catalog that speak of tensors."""

    tensors: Mapping[str, Tensor]
    fragments: Mapping[Key, tuple[Fragment, ...]]
    witnesses: Mapping[str, Held]


def tensors_of(found: Found) -> Tensors:
    """What a catalog says of tensors.

    Masters are values, and weights of another dtype their witnesses. Weights of the same dtype are the value, and what
    the optimizer holds of it is a further copy. CorruptError for states of a tensor that the model does not have.
    """
    by_name: dict[str, dict[str, Held]] = {name: {} for name in found.weights}
    for key, held in found.states.items():
        if key.name not in by_name:
            raise CorruptError(f"the optimizer holds {key}, but the model has no such tensor")
        by_name[key.name][key.state] = held
    tensors: dict[str, Tensor] = {}
    fragments: dict[Key, tuple[Fragment, ...]] = {}
    witnesses: dict[str, Held] = {}
    for name, states in by_name.items():
        optimized = bool(states)
        weight, master = found.weights[name], states.pop(VALUE, None)
        if master is None or master[0].dtype == weight[0].dtype:
            copies = () if master is None else tuple(_later(fragment) for fragment in master[1])
            value = (weight[0], (*weight[1], *copies))
        else:
            value, witnesses[name] = master, weight
        ordered = {VALUE: value, **states}
        fragments |= {Key(name, state): held[1] for state, held in ordered.items()}
        specs = {state: held[0] for state, held in ordered.items()}
        tensors[name] = Tensor(name, _kind(found, name, optimized=optimized), specs, found.scalars.get(name, {}))
    return Tensors(tensors, fragments, witnesses)


def _later(fragment: Fragment) -> Fragment:
    return Fragment(fragment.region, fragment.extent, fragment.replica + 1, fragment.term)


def _kind(found: Found, name: str, *, optimized: bool) -> Kind:
    if name in found.buffers:
        return "buffer"
    return "parameter" if optimized or not found.trained else "frozen"
