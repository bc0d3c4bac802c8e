"""A catalog made of the contents of a checkpoint: model, optimizers, and what was saved around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ucp.catalog import Catalog, Kind, ParamGroup, Scalar, Source, Tensor
from ucp.container.torchfile import leaf_scalar
from ucp.errors import ConflictError, FitError
from ucp.plan import Fragment, Key, TensorSpec
from ucp.store import Store
from ucp.tree import TensorLeaf, Tree

from .around import apart, around, told_step
from .contents import Contents, nested
from .keys import Sections, optimizer_keys, sections
from .names import below
from .numbers import Named, name_numbers
from .optimizer import Optimizer, read_optimizer
from .pieces import objects
from .remarks import kind_notes, state_notes, step_of
from .tied import tied

# Moments and their like are of the parameter's shape in every optimizer that has them (torch/optim).
_OF_ITS_SHAPE = frozenset("exp_avg exp_avg_sq max_exp_avg_sq momentum_buffer square_avg exp_inf grad_avg".split())
_BUFFERS = frozenset("running_mean running_var num_batches_tracked inv_freq".split())
_FLOATS = ("float", "bfloat", "complex")


@dataclass(frozen=True, slots=True)
class Choices:
    """What the caller decides: see the readers' options of these names. `kinds` is what is known of tensors' kinds."""

    model: str | None = None
    frozen: tuple[str, ...] = ()
    strict: bool = True
    kinds: Mapping[str, Kind] = field(default_factory=dict)


@dataclass(slots=True)
class _Build:
    """A catalog in the making. `all_cut`: every trained tensor that can be is cut, as FSDP does and to no buffer."""

    store: Store
    contents: Contents
    parts: Sections
    named: Named
    tensors: dict[str, Tensor] = field(default_factory=dict)
    fragments: dict[Key, tuple[Fragment, ...]] = field(default_factory=dict)
    left: dict[str, Tree] = field(default_factory=dict)
    all_cut: bool = False
    ties: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def build(store: Store, contents: Contents, source: Source, choices: Choices) -> Catalog:
    """The catalog of `contents`.

    FitError where there is no model, or the optimizer has parameters that the model has not; ConflictError where two
    optimizers have the same state, or a moment is not of its parameter's shape.
    """
    contents = contents.unfolded(store, _whole_optimizers(contents))
    owned = optimizer_keys(contents)
    guesses = [read_optimizer(contents, prefix, keys) for prefix, keys in owned.items()]
    parameters = {str(name) for one in guesses for name in one.parameters if isinstance(name, str)}
    parts = sections(contents, owned, parameters, prefix=choices.model)
    if not parts.model:
        raise _no_model(contents, owned, choices)
    optimizers = [read_optimizer(contents, prefix, keys, parts.model) for prefix, keys in owned.items()]
    buffers = {name for name in parts.model if name.rpartition(".")[2] in _BUFFERS}
    named = name_numbers(store, contents, optimizers, parts.model, buffers=buffers, frozen=choices.frozen)
    made = _Build(store, contents, parts, named)
    _add_tensors(made, choices)
    _fold_ties(made)
    return _catalog(made, source, choices)


def _whole_optimizers(contents: Contents) -> list[str]:
    """Keys of optimizers that were saved as one object."""
    return [
        key
        for key, value in contents.values.items()
        if isinstance(value, dict) and {"state", "param_groups"} <= value.keys()
    ]


def _add_tensors(made: _Build, choices: Choices) -> None:
    states = _states(made, choices)
    trained = {name for one in made.named.optimizers for group in one.groups for name in group.params} | states.keys()
    cut = [made.contents.tensors[key] for name, key in made.parts.model.items() if name in trained]
    made.all_cut = bool(cut) and not any(_is_whole(held.spec, held.fragments) for held in cut)
    for name, key in made.parts.model.items():
        held = made.contents.tensors[key]
        specs: dict[str, TensorSpec] = {"value": held.spec}
        made.fragments[Key(name, "value")] = held.fragments
        scalars = _add_states(made, name, states.get(name, {}), specs)
        known = choices.kinds.get(name, _kind(made, name, held.spec))
        kind: Kind = "parameter" if name in trained or name in made.named.open else known
        made.tensors[name] = Tensor(name, kind, specs, scalars, undecided=made.named.open.get(name))


def _fold_ties(made: _Build) -> None:
    """Second names of a tensor become ties, what was saved under them replicas: so they are compared when copied."""
    made.ties.update(tied(made.store, made.tensors, made.fragments, made.contents.checksums))
    for alias, name in made.ties.items():
        key = Key(name, "value")
        last = max(fragment.replica for fragment in made.fragments[key])
        copies = made.fragments.pop(Key(alias, "value"))
        made.fragments[key] += tuple(replace(copy, replica=last + 1 + copy.replica) for copy in copies)
        del made.tensors[alias]
        made.notes.append(f"{alias} is {name}, byte for byte, and has no optimizer state of its own: taken for tied")


def _kind(made: _Build, name: str, spec: TensorSpec) -> Kind:
    """What a tensor is that no optimizer has."""
    if not spec.dtype.startswith(_FLOATS) or name.rpartition(".")[2] in _BUFFERS:
        return "buffer"
    if not made.parts.optimizers:
        return "parameter"
    return "buffer" if made.all_cut and _is_whole(spec, made.fragments[Key(name, "value")]) else "frozen"


def _is_whole(spec: TensorSpec, fragments: Sequence[Fragment]) -> bool:
    """Whether a tensor that could be cut along its first dim lies in one piece."""
    return len(fragments) == 1 and bool(spec.shape) and spec.shape[0] > 1


def _states(made: _Build, choices: Choices) -> dict[str, dict[str, str]]:
    """The key of each state of each parameter of the model."""
    found: dict[str, dict[str, str]] = {}
    for one in made.named.optimizers:
        for parameter, keys in one.states.items():
            name = str(parameter)
            if name not in made.parts.model:
                _carry_unknown(made, one, name, keys, choices)
                continue
            own = found.setdefault(name, {})
            for state, key in keys.items():
                if own.setdefault(state, key) != key:
                    raise ConflictError(
                        f"{made.contents.where}: {own[state]} and {key} are both the {state} of {name}",
                        hint="two optimizers were saved that own the same parameter",
                    )
    return found


def _carry_unknown(made: _Build, one: Optimizer, name: str, keys: Mapping[str, str], choices: Choices) -> None:
    if choices.strict:
        raise FitError(
            f"{made.contents.where}: the optimizer has {', '.join(sorted(keys))} of {name}, which is no tensor of the "
            f"model ({len(made.parts.model)} tensors below {made.parts.prefix!r})",
            hint="name the model's prefix with model='…', or carry such states along as they are with strict=no",
        )
    one.rest.extend(keys.values())
    made.notes.append(f"{name}: the optimizer has states of it and the model has no such tensor; they are carried")


def _add_states(made: _Build, name: str, keys: Mapping[str, str], specs: dict[str, TensorSpec]) -> dict[str, Scalar]:
    scalars: dict[str, Scalar] = {}
    for state, key in keys.items():
        scalar = _scalar(made, state, key, specs["value"])
        if scalar is not None:
            scalars[state] = scalar
        elif key in made.contents.tensors and state != "value":
            held = made.contents.tensors[key]
            _check_shape(made, name, state, held.spec, specs["value"])
            specs[state] = held.spec
            made.fragments[Key(name, state)] = held.fragments
        else:
            made.left.setdefault("state", {}).setdefault(name, {})[state] = made.contents.tree(key)
    return scalars


def _scalar(made: _Build, state: str, key: str, value: TensorSpec) -> Scalar | None:
    """A number that is kept per parameter; a tensor of one element is one if the parameter is not such a tensor."""
    tree = made.contents.tree(key)
    if isinstance(tree, bool | int | float):
        return Scalar(tree, type(tree).__name__)
    if not isinstance(tree, TensorLeaf) or tree.inline is None or tree.extent.size != 1:
        return None
    if tree.extent.dtype == "complex64" or (state != "step" and (value.size == 1 or tree.extent.shape != ())):
        return None
    return Scalar(leaf_scalar(made.store, tree), tree.extent.dtype)


def _check_shape(made: _Build, name: str, state: str, spec: TensorSpec, value: TensorSpec) -> None:
    if state in _OF_ITS_SHAPE and spec.shape != value.shape:
        raise ConflictError(
            f"{made.contents.where}: {name} has shape {list(value.shape)}, its {state} in the optimizer "
            f"{list(spec.shape)}",
            hint="model and optimizer are of different saves, or ranks saved different tensors under one name",
        )


def _catalog(made: _Build, source: Source, choices: Choices) -> Catalog:
    contents, parts, named = made.contents, made.parts, made.named
    extra = apart(contents, _carried(made), parts.model)
    for key in (key for key in contents.paths if key in extra):
        _add_apart(made, key)
    state = around(contents, [key for key in parts.rest if key not in extra])
    optimizer = _optimizer_state(made, extra)
    if optimizer:
        state["optimizer"] = optimizer
    step, step_notes = step_of(made.tensors, told_step(contents, parts.rest))
    flat = any(one.flat for one in named.optimizers)
    options = {"model": choices.model, "frozen": choices.frozen, "strict": None if choices.strict else False}
    return Catalog(
        url=contents.where,
        source=source,
        tensors=made.tensors,
        fragments=made.fragments,
        step=step,
        ties=made.ties,
        param_groups=tuple(_groups(named, parts.model)),
        state=state,
        checksums=contents.checksums,
        objects=objects(contents),
        notes=(
            *named.notes,
            *made.notes,
            *kind_notes(made.tensors, trained=bool(parts.optimizers), apart=sorted(extra), known=choices.kinds),
            *state_notes(made.tensors, flat=flat),
            *step_notes,
        ),
        options={name: value for name, value in options.items() if value not in (None, ())},
    )


def _carried(made: _Build) -> list[str]:
    """Keys of everything that is neither the model's nor a state of one of its parameters."""
    unnamed = [key for _, _, keys in made.named.unnamed for key in keys.values()]
    return [*made.parts.rest, *(key for one in made.named.optimizers for key in one.rest), *unnamed]


def _add_apart(made: _Build, key: str) -> None:
    held = made.contents.tensors[key]
    if key in made.tensors:
        raise ConflictError(f"{made.contents.where}: both the model and the state around it have a tensor {key}")
    made.tensors[key] = Tensor(key, "buffer", {"value": held.spec})
    made.fragments[Key(key, "value")] = held.fragments


def _optimizer_state(made: _Build, extra: set[str]) -> dict[str, Tree]:
    """What optimizers saved beside the states and hyper-parameters of named parameters."""
    contents = made.contents
    found: dict[str, Tree] = dict(made.left)
    for one in made.named.optimizers:
        tree = nested(
            (below(contents.paths[key], one.prefix), contents.tree(key)) for key in one.rest if key not in extra
        )
        for name, value in tree.items() if isinstance(tree, dict) else ():
            found.setdefault(str(name), value)
    unnamed = [
        {
            "group": group,
            "number": number,
            # Of a tensor in pieces, the name under which it is a tensor of the catalog.
            "states": {state: key if key in extra else contents.tree(key) for state, key in keys.items()},
        }
        for group, number, keys in made.named.unnamed
    ]
    return {**found, "unnamed": unnamed} if unnamed else found


def _groups(named: Named, model: Mapping[str, str]) -> Sequence[ParamGroup]:
    groups = [group for one in named.optimizers for group in one.groups]
    return [ParamGroup(tuple(str(name) for name in group.params if name in model), group.options) for group in groups]


def _no_model(contents: Contents, owned: Mapping[str, Sequence[str]], choices: Choices) -> FitError:
    if choices.model is not None:
        return FitError(
            f"{contents.where}: no tensor's key starts with {choices.model!r}", hint="model= is the model's prefix"
        )
    what = "an optimizer and no model" if owned else "no tensors"
    return FitError(f"{contents.where}: holds {what}", hint="name the folder that the model was saved to")
