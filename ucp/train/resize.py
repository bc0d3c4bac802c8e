"""Loading tensors that grew or shrank along one dim, such as embeddings of another vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ucp.catalog import Catalog, Tensor
from ucp.layout import Box, Shape
from ucp.layout.block import NO_STEP, Block, View
from ucp.plan import TensorSpec
from ucp.train.held import Held
from ucp.train.names import selected
from ucp.train.shares import Supply
from ucp.train.targets import Slot
from ucp.train.transfer import Fill, Share


class Kept(Share):
    """A share of a tensor whose rest stays as it is."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Resized:
    """Fills what source and target have in common of tensors that were resized; `shapes` are the source's, by name.

    The rest of a value stays as it is; that of a state becomes zero, as an optimizer starts.
    """

    inner: Supply
    shapes: Mapping[str, Shape]

    def fills(self, held: Held, name: str, state: str, twins: Sequence[str]) -> list[Fill]:
        """As the inner supply does, for all that has the shape of the source."""
        fills = self.inner.fills(held, name, state, twins)
        if name not in self.shapes:
            return fills
        return [_common(fill) if fill.cover.spec.shape != fill.held.shape else fill for fill in fills]


def _common(fill: Fill) -> Fill:
    stored = fill.cover.spec.shape
    shape = tuple(map(min, stored, fill.held.shape))
    steps = tuple((dim, 1) if size > 1 else NO_STEP for dim, size in enumerate(shape))
    block = Block(Box((0,) * len(shape), shape), (0,) * len(shape), steps)
    kind = Kept if fill.cover.key.state == "value" else Share
    return replace(fill, share=kind(View.plain(stored), block))


def resized(
    catalog: Catalog, supply: Supply, slots: Iterable[Slot], sources: Mapping[str, str], resize: Mapping[str, int]
) -> tuple[Catalog, Supply, dict[str, tuple[Shape, Shape]]]:
    """The catalog as the target sees it, what fills its tensors, and shapes before and after by name.

    Tensors are resized that `resize` selects and that differ in size along the dim it says, and in nothing else.
    `sources` are names of the target with those of the source.
    """
    shapes = _shapes(catalog, slots, sources, resize)
    if not shapes:
        return catalog, supply, {}
    tensors = {name: _reshaped(tensor, shapes.get(name)) for name, tensor in catalog.tensors.items()}
    before = {name: catalog.tensors[name].states["value"].shape for name in shapes}
    told = {name: (before[name], shapes[name]) for name in shapes}
    return replace(catalog, tensors=tensors), Resized(supply, before), told


def _shapes(
    catalog: Catalog, slots: Iterable[Slot], sources: Mapping[str, str], resize: Mapping[str, int]
) -> dict[str, Shape]:
    found: dict[str, Shape] = {}
    for slot in slots:
        for name in (name for name in slot.names if name in sources):
            spec = catalog.tensors[sources[name]].states.get("value")
            if spec is not None and any(
                selected(name, [glob]) and _differ_along(spec.shape, slot.shape, dim) for glob, dim in resize.items()
            ):
                found.update({sources[other]: slot.shape for other in slot.names if other in sources})
    return found


def _differ_along(one: Shape, other: Shape, dim: int) -> bool:
    """Whether two shapes differ in the size of `dim` and in nothing else."""
    return len(one) == len(other) and {d for d in range(len(one)) if one[d] != other[d]} == {dim}


def _reshaped(tensor: Tensor, shape: Shape | None) -> Tensor:
    value = tensor.states.get("value")
    if shape is None or value is None:
        return tensor
    states = {
        state: TensorSpec(shape, spec.dtype) if spec.shape == value.shape else spec
        for state, spec in tensor.states.items()
    }
    return replace(tensor, states=states)
