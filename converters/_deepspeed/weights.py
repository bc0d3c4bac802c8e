"""The module's own tensors: low-precision copies, frozen parameters, buffers and aliases.

Where they are: deepspeed/runtime/engine.py, ``_common_checkpoint_state``. ``module`` is the module's state dict of
data-parallel rank 0 under ZeRO 0 to 2, and a state dict of empty placeholders beside real buffers on every rank under
ZeRO 3. ``frozen_param_fragments`` holds frozen parameters whole under ZeRO 2 and as dp padded parts under ZeRO 3.
``shared_params`` maps an alias to the name that holds the data, in the file of global rank 0 alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ucp.catalog import Kind
from ucp.errors import CorruptError
from ucp.layout import Box, FlatRange, Shape
from ucp.plan import Extent, Fragment, TensorSpec
from ucp.tree import TensorLeaf, Tree

from . import nodes
from .autoep import stacked_copies
from .experts import experts_of, of_all_experts, shared_by_all
from .flat import PartitionedGroup
from .load import RankFile, Save
from .same import Comparison


@dataclass(frozen=True, slots=True)
class Held:
    """A whole tensor: its spec and where it lies."""

    spec: TensorSpec
    fragments: tuple[Fragment, ...]

    def with_copy(self, leaf: TensorLeaf) -> Held:
        """The same tensor with one more copy, unless that copy is the same bytes."""
        if any(fragment.extent == leaf.extent for fragment in self.fragments):
            return self
        replica = 1 + max((fragment.replica for fragment in self.fragments), default=-1)
        return Held(self.spec, (*self.fragments, Fragment(Box.whole(self.spec.shape), leaf.extent, replica)))


@dataclass(slots=True)
class Weights:
    """The module's tensors, sorted out.

    `order` is the module's order of names; `values` are tensors that the optimizer does not own, with their `kinds`;
    `copies` are the module's copies of those it owns; `extra` is what is in the module and no tensor; `own` are buffers
    of other ranks where they differ from those of rank 0.
    """

    order: list[str] = field(default_factory=list)
    values: dict[str, Held] = field(default_factory=dict)
    kinds: dict[str, Kind] = field(default_factory=dict)
    copies: dict[str, Held] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Tree] = field(default_factory=dict)
    own: dict[int, dict[str, Tree]] = field(default_factory=dict)
    dtypes: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def read_weights(
    save: Save, entries: Mapping[str, Tree], optimized: Mapping[str, Shape], comparison: Comparison
) -> Weights:
    """Sort out the module's `entries`; `optimized` gives the shapes of the parameters that the optimizer owns.

    CorruptError for a tensor whose shape contradicts what the checkpoint says of it.
    """
    weights = Weights()
    buffers, experts = buffer_names(save), experts_of(save)
    shared = shared_by_all(save.shared, experts)
    for mp in range(save.mesh["pp"]):
        _read_frozen(save, mp, weights, experts.stacked)
    _read_stacked(save, weights, optimized, experts.stacked)
    by_extent: dict[Extent, str] = {}
    later: dict[str, TensorLeaf] = {}
    for name, node in entries.items():
        if not nodes.is_tensor(node):
            weights.extra[name] = node
        elif name in optimized:
            _copy_of_optimized(weights, name, node, optimized[name], save)
            by_extent.setdefault(node.extent, name)
        elif name in weights.values:
            _copy_of_frozen(weights, name, node, save)
            by_extent.setdefault(node.extent, name)
        elif name in buffers or name.rpartition(".")[2] == "_extra_state":
            _add(weights, name, node, "buffer")
        else:
            later[name] = node
    for name, node in later.items():
        _alias_or_outsider(weights, name, node, shared, by_extent, optimized, save)
    _ties_without_entry(weights, shared, optimized)
    _compare_buffers(save, weights, buffers, comparison)
    weights.order = [
        name for name in dict.fromkeys([*entries, *weights.values]) if name in weights.order or name in weights.values
    ]
    return weights


def buffer_names(save: Save) -> set[str]:
    """Names of persistent buffers (``_get_buffer_names``); versions before 0.5 do not save them."""
    names = {
        str(name)
        for file in save.models.values()
        for name in nodes.sequence(file.root.get("buffer_names") or (), f"{file.path}: buffer_names")
    }
    return of_all_experts(names, experts_of(save))


def whole(leaf: TensorLeaf) -> Held:
    """A tensor that one file holds whole."""
    shape = leaf.extent.shape
    return Held(TensorSpec(shape, leaf.extent.dtype), (Fragment(Box.whole(shape), leaf.extent),))


def _add(weights: Weights, name: str, leaf: TensorLeaf, kind: Kind) -> None:
    weights.values[name] = whole(leaf)
    weights.kinds[name] = kind


def _copy_of_optimized(weights: Weights, name: str, leaf: TensorLeaf, shape: Shape, save: Save) -> None:
    weights.dtypes.add(leaf.extent.dtype)
    if _is_placeholder(leaf, shape, save):
        return
    if leaf.extent.shape != shape:
        raise CorruptError(
            f"{leaf.extent.object}: {name} has shape {list(leaf.extent.shape)} in module, {list(shape)} in param_shapes"
        )
    weights.copies[name] = whole(leaf)


def _copy_of_frozen(weights: Weights, name: str, leaf: TensorLeaf, save: Save) -> None:
    held = weights.values[name]
    if _is_placeholder(leaf, held.spec.shape, save):
        return
    if (leaf.extent.shape, leaf.extent.dtype) != (held.spec.shape, held.spec.dtype):
        raise CorruptError(f"{leaf.extent.object}: frozen {name} has another shape or dtype in module")
    weights.values[name] = held.with_copy(leaf)


def _is_placeholder(leaf: TensorLeaf, shape: Shape, save: Save) -> bool:
    """ZeRO 3 leaves tensors of no elements in the module (deepspeed/runtime/zero/partition_parameters.py)."""
    return save.stage == 3 and leaf.extent.shape == (0,) != shape


def _read_stacked(save: Save, weights: Weights, optimized: Mapping[str, Shape], stacked: Mapping[str, int]) -> None:
    """Experts of AutoEP: copies of what is trained, and frozen ones."""
    for name, spec, fragments in stacked_copies(save, stacked):
        held = Held(spec, fragments)
        if name not in optimized:
            weights.values[name], weights.kinds[name] = _with_first_rank(save, name, held), "frozen"
            continue
        weights.dtypes.add(spec.dtype)
        if spec.shape != optimized[name]:
            raise CorruptError(
                f"{fragments[0].extent.object}: {name} has shape {list(spec.shape)} in the files of its experts, "
                f"{list(optimized[name])} in param_shapes"
            )
        weights.copies[name] = held


def _with_first_rank(save: Save, name: str, held: Held) -> Held:
    """A stacked frozen parameter with what the model file has of it as well: the experts of rank 0."""
    for pp in range(save.mesh["pp"]):
        model = save.model(pp)
        where = f"{model.path}: frozen_param_fragments"
        node = nodes.mapping(model.root.get("frozen_param_fragments") or {}, where).get(name)
        if node is None:
            continue
        extent = nodes.tensor(node, f"{where} {name}").extent
        if (extent.shape[1:], extent.dtype, extent.is_contiguous) != (held.spec.shape[1:], held.spec.dtype, True):
            raise CorruptError(f"{where}: {name} is of another shape or dtype than in the files of its experts")
        flat = Extent.contiguous(extent.object, extent.offset, (extent.size,), extent.dtype)
        copy = Fragment(FlatRange(0, extent.size), flat, replica=1)
        if extent.size > held.spec.size:
            raise CorruptError(f"{where}: {name} holds more experts than there are")
        return Held(held.spec, (*held.fragments, copy))
    return held


def _read_frozen(save: Save, mp: int, weights: Weights, stacked: Mapping[str, int]) -> None:
    """Frozen parameters with a place of their own: whole under ZeRO 2, in parts under ZeRO 3.

    Of `stacked` ones it has the experts of rank 0 alone, and their files have all.
    """
    files = save.shards(mp)
    shapes = files[0].root.get("frozen_param_shapes")
    if shapes is None:
        return
    where = f"{files[0].path}: frozen_param_shapes"
    for name, node in nodes.mapping(shapes, where).items():
        if name in stacked:
            continue
        shape = nodes.shape(node, f"{where} {name}")
        leaves = [_frozen_fragment(file, name) for file in files]
        if save.stage == 3 and leaves[0].extent.shape != shape:
            weights.values[name] = _joined(name, shape, leaves)
        elif leaves[0].extent.shape == shape:
            weights.values[name] = whole(leaves[0])
        else:
            raise CorruptError(
                f"{files[0].path}: frozen {name} has shape {list(leaves[0].extent.shape)}, not {list(shape)}"
            )
        weights.kinds[name] = "frozen"


def _frozen_fragment(file: RankFile, name: str) -> TensorLeaf:
    where = f"{file.path}: frozen_param_fragments"
    return nodes.tensor(nodes.mapping(file.root.get("frozen_param_fragments"), where).get(name), f"{where} {name}")


def _joined(name: str, shape: Shape, leaves: list[TensorLeaf]) -> Held:
    group = PartitionedGroup({name: shape}, len(leaves))
    for leaf in leaves:
        if leaf.extent.shape != (group.length,) or leaf.extent.dtype != leaves[0].extent.dtype:
            raise CorruptError(
                f"{leaf.extent.object}: a part of frozen {name} is {leaf.extent.dtype} {list(leaf.extent.shape)}, "
                f"not {leaves[0].extent.dtype} [{group.length}]"
            )
    fragments = group.fragments([leaf.extent for leaf in leaves])[name]
    return Held(TensorSpec(shape, leaves[0].extent.dtype), fragments)


def _alias_or_outsider(
    weights: Weights,
    name: str,
    leaf: TensorLeaf,
    shared: Mapping[str, str],
    by_extent: dict[Extent, str],
    optimized: Mapping[str, Shape],
    save: Save,
) -> None:
    """A module tensor that is neither optimized nor known to be frozen nor a buffer."""
    holder = shared.get(name) if leaf.extent.size else None
    if holder is None and leaf.extent.size:
        holder = by_extent.get(leaf.extent)
    if holder in optimized:
        assert holder is not None
        copy = weights.copies.get(holder)
        if copy is None or copy.spec == TensorSpec(leaf.extent.shape, leaf.extent.dtype):
            weights.ties[name] = holder
            if copy is not None:
                weights.copies[holder] = copy.with_copy(leaf)
            return
    elif holder in weights.values and weights.values[holder].spec == TensorSpec(leaf.extent.shape, leaf.extent.dtype):
        weights.ties[name] = holder
        weights.values[holder] = weights.values[holder].with_copy(leaf)
        return
    if name in shared and save.stage == 3:
        return
    if save.stage == 3 and leaf.extent.shape == (0,):
        weights.notes.append(f"{name} is not in the checkpoint: ZeRO 3 saved neither it nor an optimizer state of it")
        return
    by_extent.setdefault(leaf.extent, name)
    _add(weights, name, leaf, "frozen")


def _ties_without_entry(weights: Weights, shared: Mapping[str, str], optimized: Mapping[str, Shape]) -> None:
    """Aliases whose entry is a placeholder, or that the module does not save."""
    for alias, holder in shared.items():
        known = holder in optimized or holder in weights.values
        itself = alias in optimized or alias in weights.values or alias in weights.ties
        if known and not itself:
            weights.ties[alias] = holder


def _compare_buffers(save: Save, weights: Weights, buffers: set[str], comparison: Comparison) -> None:
    """Under ZeRO 3 every rank saves its own buffers: those that differ from rank 0's are kept by rank."""
    first, *others = save.shards(0)
    for rank, file in enumerate(others, 1):
        mine, zero = (nodes.mapping(f.root.get("module"), f"{f.path}: module") for f in (file, first))
        differing = {
            name: node
            for name, node in mine.items()
            if (name in buffers or name in weights.extra or not nodes.is_tensor(node))
            and not comparison.equal(node, zero.get(name))
        }
        if differing:
            weights.own[rank] = differing
    if weights.own:
        names = sorted({name for differing in weights.own.values() for name in differing})
        weights.notes.append(f"buffers differ between ranks and are kept by rank, rank 0's as value: {' '.join(names)}")
