"""Which parameters belong to which param group: Megatron keeps hyper-parameters of groups without saying of what.

megatron/core/optimizer/__init__.py, ``_get_param_groups``: parameters of one dim and biases are not decayed
(``wd_mult`` 0), experts under expert parallelism have groups of their own, embeddings and heads may have their own
learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ucp.catalog import ParamGroup, Scalar
from ucp.container.torchfile import leaf_scalar
from ucp.errors import ConflictError, CorruptError
from ucp.store import Store
from ucp.tree import TensorLeaf, Tree

_EDGES = ("word_embeddings.weight", "output_layer.weight", "word_embeddings_for_head.weight")
_QK_NORMS = ("q_layernorm.", "k_layernorm.")


class Parameter(NamedTuple):
    """What tells a parameter's group: its name, its number of dims in the module, whether its experts are spread."""

    name: str
    ndim: int
    expert: bool = False


@dataclass(frozen=True, slots=True)
class Optimizer:
    """One of the chained optimizers, as saved."""

    groups: tuple[Mapping[str, Tree], ...]
    step: Tree = None
    scaler: Tree = None


def optimizers_of(tree: Tree, *, where: str) -> list[Optimizer]:
    """The optimizers of a state dict: one alone, a list, or a dict by number (``ChainedOptimizer.state_dict``)."""
    if tree is None:
        return []
    if isinstance(tree, Mapping) and tree and all(isinstance(key, int) for key in tree):
        tree = [tree[number] for number in sorted(tree)]
    return [_optimizer(one, where) for one in (tree if isinstance(tree, list) else [tree])]


def inner_of(tree: Tree) -> Mapping[str, Tree]:
    """What torch's optimizer saved inside of Megatron's."""
    if not isinstance(tree, Mapping):
        return {}
    inner = tree.get("optimizer", tree.get("optimizer_state_dict"))
    return inner if isinstance(inner, Mapping) else tree


def _optimizer(tree: Tree, where: str) -> Optimizer:
    if not isinstance(tree, Mapping):
        raise CorruptError(f"{where}: the optimizer is a {type(tree).__name__}")
    inner = inner_of(tree)
    groups = inner.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        raise CorruptError(f"{where}: the optimizer's param_groups are no list of dicts")
    state = inner.get("state")
    step = state.get("common_step") if isinstance(state, Mapping) else None
    return Optimizer(tuple(groups), step, tree.get("grad_scaler", tree.get("loss_scaler")))


def step_of(store: Store, optimizer: Optimizer, *, where: str) -> Scalar | None:
    """The step of all its parameters: Megatron saves only what they have in common.

    ConflictError for groups that stand at different steps.
    """
    if optimizer.step is not None:
        return scalar(store, optimizer.step)
    steps = {found for group in optimizer.groups if (found := scalar(store, group.get("step"))) is not None}
    if len(steps) > 1:
        raise ConflictError(f"{where}: param groups stand at steps {' and '.join(str(s.value) for s in steps)}")
    return next(iter(steps), None)


def scalar(store: Store, value: Tree) -> Scalar | None:
    """A Python number, or the value of a tensor of one element."""
    if isinstance(value, bool | int | float):
        return Scalar(value, type(value).__name__)
    if isinstance(value, TensorLeaf) and value.extent.size == 1:
        return Scalar(leaf_scalar(store, value), value.extent.dtype)
    return None


def members(
    groups: Sequence[Mapping[str, Tree]], parameters: Sequence[Parameter], *, decay_qk: bool = False
) -> list[list[Parameter]] | None:
    """The parameters of each group, in order; None if the groups do not tell.

    Groups that say the same are one to whoever reads them, and the first of them has all the parameters.
    """
    own_rate = any(_decoupled(group) for group in groups)
    homes: dict[tuple[bool, bool, bool], int] = {}
    alone = len(groups) == 1
    for number, group in enumerate(groups):
        sign = (_undecayed(group, groups), bool(group.get("is_expert_parallel", False)), _decoupled(group))
        known = homes.setdefault(sign, number)
        if known != number and _options(groups[known]) != _options(group):
            return None
    found: list[list[Parameter]] = [[] for _ in groups]
    for one in parameters:
        decayed = decay_qk and any(part in one.name for part in _QK_NORMS)
        flat = (one.ndim == 1 or one.name.endswith(".bias")) and not decayed
        home = 0 if alone else homes.get((flat, one.expert, own_rate and one.name.endswith(_EDGES)))
        if home is None:
            return None
        found[home].append(one)
    return found


def _undecayed(group: Mapping[str, Tree], groups: Sequence[Mapping[str, Tree]]) -> bool:
    if "wd_mult" in group:
        return bool(group["wd_mult"] == 0.0)
    # Until 2021 a group said only its own weight decay.
    return group.get("weight_decay") == 0.0 and any(other.get("weight_decay") != 0.0 for other in groups)


def _decoupled(group: Mapping[str, Tree]) -> bool:
    return bool(group.get("is_decoupled_lr", False)) or group.get("default_config") is False


def _options(group: Mapping[str, Tree]) -> dict[str, Tree]:
    return {name: value for name, value in group.items() if name not in ("params", "step")}


def param_groups(
    groups: Sequence[Mapping[str, Tree]], parameters: Sequence[Parameter], *, decay_qk: bool = False
) -> tuple[ParamGroup, ...] | None:
    """The groups by name; None if they do not tell their parameters."""
    found = members(groups, parameters, decay_qk=decay_qk)
    if found is None:
        return None
    return tuple(
        ParamGroup(tuple(one.name for one in held), _options(group))
        for group, held in zip(groups, found, strict=True)
        if held
    )
