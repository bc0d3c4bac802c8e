"""What Hugging Face Trainer and Accelerate put around a DeepSpeed checkpoint.

Trainer (transformers/trainer.py): ``checkpoint-N/{latest, global_stepN/, trainer_state.json, scheduler.pt,
rng_state_R.pth, training_args.bin, model.safetensors}``. Accelerate (accelerate/checkpointing.py): ``latest``,
``pytorch_model/`` (the tag), ``scheduler.bin``, ``random_states_R.pkl``, ``sampler*.bin``, ``custom_checkpoint_N.pkl``.
Under ZeRO 3 with ``stage3_gather_16bit_weights_on_model_save`` the whole low-precision model lies beside it too
(deepspeed/runtime/engine.py, ``save_16bit_model``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ucp.container.safetensors import read_header
from ucp.container.torchfile import TorchFile, read_torch_file
from ucp.layout import Shape
from ucp.store import Entry, Store
from ucp.tree import TensorLeaf, Tree

from . import nodes
from .files import Folder, latest_tag
from .weights import Held, whole

_TORCH = re.compile(
    r"scheduler(_\d+)?\.(pt|bin)|scaler\.pt|training_args\.bin|rng_state(_\d+)?\.pth|random_states_\d+\.pkl"
    r"|(sampler|dl_state_dict)(_\d+)?\.bin|custom_checkpoint_\d+\.pkl"
)
_TEXT = frozenset({"trainer_state.json", "config.json", "generation_config.json"})
_WEIGHTS = re.compile(r"(pytorch_model|model)(-\d+-of-\d+)?\.(bin|safetensors)")
_MOST_TEXT_BYTES = 1 << 26
_TRAINER = "trainer_state.json"


@dataclass(slots=True)
class Around:
    """Files around the tag folder: `state` by file name, `copies` of gathered weights, and what was read for them."""

    state: dict[str, Tree] = field(default_factory=dict)
    copies: dict[str, Held] = field(default_factory=dict)
    files: list[TorchFile] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_around(store: Store, folder: Folder, gathered: Mapping[str, Shape]) -> Around:
    """What lies around `folder`, if it is the latest of its save root.

    `gathered` are shapes of the parameters whose low-precision copies may be in a file of the whole model. Whatever the
    file readers raise.
    """
    found = Around()
    names = store.children() if folder.path else []
    if folder.path and latest_tag(store, names) == folder.tag:
        _read_companions(store, names, found)
    if gathered:
        weights = [folder.path + name for name in folder.others if _WEIGHTS.fullmatch(name)]
        # A save root may also hold weights of another step that someone extracted; Trainer's folder has one step.
        if not weights and _TRAINER in found.state:
            weights = [name for name in names if _WEIGHTS.fullmatch(name)]
        _read_gathered(store, weights, gathered, found)
    return found


def _read_companions(store: Store, names: Iterable[str], found: Around) -> None:
    for name in names:
        if _TORCH.fullmatch(name):
            file = read_torch_file(store, name)
            found.files.append(file)
            found.state[name] = file.root
        elif name in _TEXT and (entry := store.entry(name)).size <= _MOST_TEXT_BYTES:
            found.entries.append(entry)
            found.state[name] = store.read(name)


def _read_gathered(store: Store, paths: Iterable[str], shapes: Mapping[str, Shape], found: Around) -> None:
    """Copies of the whole model, if what they hold is named and shaped like the parameters."""
    for path in paths:
        leaves = _leaves(store, path, found)
        known = {name: leaf for name, leaf in leaves.items() if name in shapes}
        if any(leaf.extent.shape != shapes[name] for name, leaf in known.items()):
            found.notes.append(f"{path} holds a model of other shapes and is not compared")
            return
        found.copies.update({name: whole(leaf) for name, leaf in known.items()})


def _leaves(store: Store, path: str, found: Around) -> dict[str, TensorLeaf]:
    if path.endswith(".safetensors"):
        found.entries.append(store.entry(path))
        return {name: TensorLeaf(extent) for name, extent in read_header(store, path).tensors.items()}
    file = read_torch_file(store, path)
    found.files.append(file)
    return {str(name): node for name, node in nodes.mapping(file.root, path).items() if nodes.is_tensor(node)}
