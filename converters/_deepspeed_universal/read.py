"""Reading a DeepSpeed universal folder, ours or one that DeepSpeed's own ``ds_to_universal.py`` made.

Stages 1 and 2 write each state as ``{"param": tensor of the parameter's shape, "cat_dim": …}`` and a ``step.pt``; stage
3 writes bare flat tensors, whose shape the model file knows, and one step for all in ``optimizer_state.pt``
(deepspeed/checkpoint/ds_to_universal.py, ``merge_tp_slices``, ``merge_zero3_slices``).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ucp.catalog import Catalog, Kind, ParamGroup, Scalar, Source, Tensor
from ucp.container.torchfile import TorchFile, leaf_scalar, read_torch_file
from ucp.errors import CorruptError, NotFoundError, UsageError
from ucp.layout import Box, FlatRange, Mesh, Shape
from ucp.plan import Extent, Fragment, Key, TensorSpec
from ucp.store import Store
from ucp.tree import Tree

from .._deepspeed import nodes
from .._deepspeed.carried import ENGINE_KEYS
from .._deepspeed.experts import is_expert
from .experts import COUNT, GROUP_NAMES, IS_EXPERT, unstacked
from .names import LATEST, MODEL_STATES, MODEL_STATES_3, OPTIMIZER_STATE, VALUE_FILE, state_file
from .untrained import untrained

_MOST_TAG_BYTES = 4096
_TENSOR_KEYS = frozenset(
    "module buffer_names optimizer param_shapes frozen_param_shapes frozen_param_fragments shared_params".split()
)
"""Keys of a model file that this reader turns into tensors (deepspeed/runtime/engine.py, ``_save_checkpoint``)."""

_GROUP_KEYS = frozenset("ds_version param_groups optimizer_state_dict fp32_flat_groups group_paddings".split()) | {
    GROUP_NAMES
}


def detect(store: Store) -> bool:
    """Whether `store` is a universal folder, or a save root with universal folders and nothing else."""
    names = store.children()
    if "zero/" in names:
        return _model_name(names) is not None
    return LATEST in names and "latest" not in names


def locate(store: Store, tag: str | None) -> tuple[str, list[str]]:
    """Prefix of the universal folder's paths, and what lies in it; NotFoundError if it is no complete one."""
    names = store.children()
    if tag is None and "zero/" in names:
        return "", names
    if tag is None:
        if LATEST not in names:
            raise NotFoundError(f"{store.url}: no {LATEST} here", hint="the conversion was cut short, or give a tag")
        tag = store.read(LATEST, 0, min(store.entry(LATEST).size, _MOST_TAG_BYTES)).decode("utf-8", "replace").strip()
    if not tag or tag.startswith("/") or ".." in tag.split("/") or not tag.isprintable():
        raise UsageError(f"{tag!r} is not a tag", hint="a tag is the name of a folder inside the save root")
    return f"{tag}/", store.children(tag)


def _model_name(names: list[str]) -> str | None:
    return next((name for name in (MODEL_STATES, MODEL_STATES_3) if name in names), None)


@dataclass(slots=True)
class _Found:
    """What was read so far.

    `ranks` is the number of model files: where there are several, each knows the shapes of its own pieces, and `parts`
    are the names of each optimizer group over all of them.
    """

    prefix: str
    model: Mapping[str, Tree]
    optimizer: Mapping[str, Tree]
    shapes: dict[str, Shape]
    parts: list[dict[str, Tree]]
    ranks: int
    files: list[TorchFile] = field(default_factory=list)
    fragments: dict[Key, tuple[Fragment, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    stacks: dict[str, int] = field(default_factory=dict)


def read(store: Store, *, tag: str | None = None) -> Catalog:
    """The catalog of the universal folder in `store`; `tag` names one of several in a save root.

    NotFoundError for an incomplete folder; CorruptError, UnsafeError as its files are.
    """
    prefix, names = locate(store, tag)
    model_name = _model_name(names)
    if model_name is None:
        raise NotFoundError(f"{store.url}/{prefix}: no {MODEL_STATES} here", hint="the conversion was cut short")
    files: list[TorchFile] = []
    model = _tree(store, prefix + model_name, files)
    optimizer = _tree(store, prefix + OPTIMIZER_STATE, files)
    models = [model, *(_tree(store, prefix + name, files) for name in _other_ranks(model_name, names))]
    found = _Found(prefix, model, optimizer, _shapes(model, prefix + model_name), _parts(models), len(models), files)
    ties = {str(k): str(v) for k, v in _mapping(model, "shared_params").items()}
    tensors = {tensor.name: tensor for tensor in _tensors(store, found) if tensor.name not in ties}
    _check_complete(f"{store.url}/{prefix}", found, tensors, ties)
    step = model.get("global_steps")
    catalog = Catalog(
        url=store.url,
        source=Source(
            family="deepspeed-universal",
            version=str(model.get("ds_version", optimizer.get("ds_version", ""))),
            mesh=Mesh({"dp": 1}),
        ),
        tensors=tensors,
        fragments={key: held for key, held in found.fragments.items() if key.name in tensors},
        step=step if isinstance(step, int) else None,
        ties={alias: name for alias, name in ties.items() if name in tensors},
        param_groups=_groups(found, tensors),
        state=_state(found),
        checksums=tuple(checksum for file in files for checksum in file.checksums),
        objects={file.entry.path: (file.entry.size, file.entry.fingerprint) for file in files},
        notes=tuple(found.notes),
        options={"tag": tag} if tag else {},
    )
    return unstacked(catalog, found.stacks) if found.stacks else catalog


def _tree(store: Store, path: str, files: list[TorchFile]) -> Mapping[str, Tree]:
    file = read_torch_file(store, path)
    files.append(file)
    return nodes.mapping(file.root, path)


def _mapping(tree: Mapping[str, Tree], key: str) -> Mapping[str, Tree]:
    value = tree.get(key)
    return value if isinstance(value, Mapping) else {}


def _shapes(model: Mapping[str, Tree], where: str) -> dict[str, Shape]:
    """Shape of every parameter that the model file knows."""
    parts = [*_shape_dicts(model), _mapping(model, "frozen_param_shapes")]
    return {str(name): nodes.shape(size, f"{where}: {name}") for part in parts for name, size in part.items()}


def _other_ranks(model_name: str, names: list[str]) -> list[str]:
    """Model files of the other model-parallel ranks, which DeepSpeed's own converter copies."""
    like = re.compile(re.escape(model_name).replace("mp_rank_00", r"mp_rank_\d+"))
    return sorted(name for name in names if name != model_name and like.fullmatch(name))


def _parts(models: list[Mapping[str, Tree]]) -> list[dict[str, Tree]]:
    """Shapes by name of each optimizer group, over all model files where they have the same groups."""
    listed = [_shape_dicts(model) for model in models]
    if len({len(parts) for parts in listed}) > 1:
        listed = listed[:1]
    return [{name: shape for parts in listed for name, shape in parts[k].items()} for k in range(len(listed[0]))]


def _shape_dicts(model: Mapping[str, Tree]) -> list[Mapping[str, Tree]]:
    listed = model.get("param_shapes")
    return [part for part in listed if isinstance(part, Mapping)] if isinstance(listed, list | tuple) else []


def _tensors(store: Store, found: _Found) -> Iterator[Tensor]:
    """Every folder below ``zero/`` as a tensor; its fragments go into `found`."""
    files: dict[str, dict[str, str]] = defaultdict(dict)
    for entry in store.entries(f"{found.prefix}zero/"):
        name, _, file = entry.path[len(found.prefix) + len("zero/") :].rpartition("/")
        if name and file.endswith(".pt"):
            files[name][file.removesuffix(".pt")] = entry.path
    shared_step = _shared_step(store, found)
    for name, paths in sorted(files.items()):
        if VALUE_FILE not in paths:
            raise CorruptError(f"{store.url}/{found.prefix}zero/{name}: has no {VALUE_FILE}.pt", hint="copy it again")
        scalars: dict[str, Scalar] = {}
        if "step" in paths:
            scalars["step"] = _step(store, _root(store, paths.pop("step"), found))
        states = {
            "value" if state == VALUE_FILE else state: path
            for state, path in sorted(paths.items(), key=lambda item: (item[0] != VALUE_FILE, item[0]))
        }
        specs = {state: _state_file(store, path, Key(name, state), found) for state, path in states.items()}
        if "step" not in scalars and shared_step is not None and len(specs) > 1:
            scalars["step"] = shared_step
        yield Tensor(name, _kind(name, found, trained=len(specs) > 1), specs, scalars)
    if found.ranks > 1:
        _note_untrained(found, set(files))
        return
    for name, spec, fragments in untrained(store, found.prefix, found.model, known=set(files), files=found.files):
        found.fragments[Key(name, "value")] = fragments
        yield Tensor(name, _kind(name, found, trained=False), {"value": spec})


def _note_untrained(found: _Found, known: set[str]) -> None:
    """Model files of several ranks hold pieces, and nothing here says of what."""
    held = {
        *_mapping(found.model, "frozen_param_shapes"),
        *(str(name) for name in found.model.get("buffer_names") or ()),
    }
    left = sorted(held - known)
    if left:
        found.notes.append(
            f"{len(left)} frozen parameters and buffers ({left[0]}, …) are in model files of ranks alone and left out: "
            "convert from the original checkpoint to have them"
        )


def _check_complete(where: str, found: _Found, tensors: Mapping[str, Tensor], ties: Mapping[str, str]) -> None:
    """NotFoundError where a parameter that the model file lists, or a state that others have, has no file."""
    hint = "a file was lost: copy the folder again"
    for name in found.shapes:
        if name not in tensors and name not in ties:
            raise NotFoundError(f"{where}zero/{name}: missing", hint=hint)
    trained = [tensors[name] for part in found.parts for name in part if name in tensors]
    states = dict.fromkeys(state for tensor in trained for state in (*tensor.states, *tensor.scalars))
    for tensor in trained:
        for state in states:
            if state not in tensor.states and state not in tensor.scalars:
                raise NotFoundError(f"{where}{state_file(tensor.name, state)}: missing, others have it", hint=hint)


def _root(store: Store, path: str, found: _Found) -> Tree:
    file = read_torch_file(store, path)
    found.files.append(file)
    return file.root


def _state_file(store: Store, path: str, key: Key, found: _Found) -> TensorSpec:
    root = _root(store, path, found)
    leaf = nodes.tensor(root.get("param") if isinstance(root, Mapping) else root, path)
    if isinstance(root, Mapping) and root.get(IS_EXPERT) and is_expert(key.name):
        found.stacks[key.name] = nodes.integer(root.get(COUNT), f"{path}: {COUNT}")
    shape = found.shapes.get(key.name, leaf.extent.shape)
    if found.ranks > 1 and isinstance(root, Mapping):
        shape = leaf.extent.shape
    if math.prod(shape) != leaf.extent.size:
        raise CorruptError(f"{store.url}/{path}: holds {leaf.extent.size} elements for a tensor of shape {list(shape)}")
    found.fragments[key] = (_fragment(leaf.extent, shape, f"{store.url}/{path}"),)
    return TensorSpec(shape, leaf.extent.dtype)


def _fragment(extent: Extent, shape: Shape, where: str) -> Fragment:
    if extent.is_contiguous:
        flat = Extent.contiguous(extent.object, extent.offset, (extent.size,), extent.dtype)
        return Fragment(FlatRange(0, extent.size), flat)
    if extent.shape != shape:
        raise CorruptError(f"{where}: holds a strided tensor of another shape, {list(extent.shape)}")
    return Fragment(Box.whole(shape), extent)


def _kind(name: str, found: _Found, *, trained: bool) -> Kind:
    buffers = found.model.get("buffer_names")
    if isinstance(buffers, list | tuple) and name in buffers:
        return "buffer"
    if trained or any(name in part for part in found.parts):
        return "parameter"
    return "frozen"


def _step(store: Store, node: Tree) -> Scalar:
    if nodes.is_tensor(node):
        return Scalar(leaf_scalar(store, node), node.extent.dtype)
    if nodes.is_number(node):
        return Scalar(node, type(node).__name__)
    raise CorruptError(f"{store.url}: a step that is a {type(node).__name__}")


def _shared_step(store: Store, found: _Found) -> Scalar | None:
    """The step that ZeRO-3 keeps for all parameters (deepspeed/runtime/zero/stage3.py)."""
    states = _mapping(_mapping(found.optimizer, "optimizer_state_dict"), "state")
    first: Any = states.get(0)  # type: ignore[call-overload]
    step = first.get("step") if isinstance(first, Mapping) else None
    return None if step is None else _step(store, step)


def _groups(found: _Found, tensors: Mapping[str, Tensor]) -> tuple[ParamGroup, ...]:
    """Hyper-parameters by the names of each group's parameters, where the files still tell."""
    listed = nodes.sequence(found.optimizer.get("param_groups", ()), OPTIMIZER_STATE)
    groups = [group for group in listed if isinstance(group, Mapping) and group.keys() - {"params"}]
    groups = _called(groups, found.optimizer.get(GROUP_NAMES))
    parts = found.parts
    named = _by_group(groups, parts, _mapping(found.optimizer, "optimizer_state_dict"))
    if named is None:
        if groups:
            found.notes.append(f"which parameters are in which of {len(groups)} optimizer groups is not recorded")
        return ()
    return tuple(
        ParamGroup(
            tuple(name for name in names if name in tensors),
            {str(key): value for key, value in group.items() if key != "params"},
        )
        for group, names in zip(groups, named, strict=True)
    )


def _called(groups: list[Mapping[Any, Tree]], names: Tree) -> list[Mapping[Any, Tree]]:
    """Groups under the names that they had in the source, where these were changed."""
    if not isinstance(names, list) or len(names) != len(groups):
        return groups
    return [{**group, "name": name} if "name" in group else group for group, name in zip(groups, names, strict=True)]


def _by_group(
    groups: list[Mapping[str, Tree]], parts: Sequence[Mapping[str, Tree]], inner: Mapping[str, Tree]
) -> list[list[str]] | None:
    """Names of each group's parameters; ZeRO-3 lists shapes by sub-group, and its groups list their sub-groups."""
    if len(groups) == 1:
        return [[str(name) for part in parts for name in part]]
    listed = inner.get("param_groups")
    inner_groups = [group for group in listed if isinstance(group, Mapping)] if isinstance(listed, list) else []
    ids = [members for group in inner_groups if isinstance(members := group.get("params"), list)]
    if len(ids) == len(groups):
        flat = [i for members in ids for i in members]
        if sorted(flat) == list(range(len(parts))):
            return [[str(name) for i in members for name in parts[i]] for members in ids]
    if len(parts) == len(groups):
        return [[str(name) for name in part] for part in parts]
    return None


def _state(found: _Found) -> dict[str, Tree]:
    """The rest of the training state, under the keys that the reader of DeepSpeed's own checkpoints uses."""
    state = {str(key): value for key, value in found.model.items() if key in ENGINE_KEYS}
    client = {str(k): v for k, v in found.model.items() if k not in ENGINE_KEYS and k not in _TENSOR_KEYS}
    if client:
        state["client_state"] = client
    optimizer = {str(key): value for key, value in found.optimizer.items() if key not in _GROUP_KEYS}
    if optimizer:
        state["optimizer"] = optimizer
    extra = {str(k): v for k, v in _mapping(found.model, "module").items() if not nodes.is_tensor(v)}
    if extra:
        state["module"] = extra
    return state
