"""Which files a folder of training state has, and what their names say.

Accelerate (accelerate/checkpointing.py, ``save_accelerator_state``; accelerate/utils/constants.py):
``model.safetensors`` or ``pytorch_model.bin``, ``optimizer.bin``, ``scheduler.bin``, ``sampler.bin``,
``dl_state_dict.bin``, ``random_states_R.pkl``, ``scaler.pt``, ``custom_checkpoint_N.pkl``; a second of a kind is
``optimizer_1.bin``. Trainer (transformers/trainer.py): ``optimizer.pt``, ``scheduler.pt``, ``scaler.pt``,
``rng_state.pth`` or ``rng_state_R.pth``, ``trainer_state.json``, ``training_args.bin``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ucp.container.legacy import is_legacy
from ucp.container.zipdir import LOCAL_SIGNATURE
from ucp.errors import UcpError
from ucp.store import Store

ROOT = "checkpoint.json"
"""Put last by our own target, beside the torch file."""

FSDP = "pytorch_model_fsdp"
"""How Accelerate calls the weights of an FSDP model."""

TRAINER = "trainer_state.json"

_JOURNAL = ".ucp-journal/"
_KINDS = {
    "weights": re.compile(
        r"(?:pytorch_model|model)(?:_(\d+))?(?:-\d+-of-\d+)?\.(?:bin|safetensors)|pytorch_model_fsdp(?:_(\d+))?\.bin"
    ),
    "index": re.compile(r"(?:pytorch_model|model)(?:_(\d+))?\.(?:bin|safetensors)\.index\.json"),
    "optimizer": re.compile(r"optimizer(?:_(\d+))?\.(?:bin|pt)"),
    "scheduler": re.compile(r"scheduler(?:_(\d+))?\.(?:bin|pt)"),
    "scaler": re.compile(r"scaler\.pt"),
    "rng": re.compile(r"rng_state(?:_(\d+))?\.pth|random_states_(\d+)\.pkl"),
    "torch": re.compile(r"training_args\.bin|(?:sampler|dl_state_dict)(?:_(\d+))?\.bin|custom_checkpoint_(\d+)\.pkl"),
    "text": re.compile(r"trainer_state\.json"),
}
_TRAINING = ("optimizer", "scheduler", "scaler", "rng", "torch", "text")
_OTHERS = re.compile(
    # Files that say a folder is of another family: DeepSpeed, Megatron, DCP, ByteCheckpoint, Hugging Face, universal.
    r".*_(model|optim)_states\.pt|latest|latest_universal|latest_checkpointed_iteration\.txt|zero/|zero_to_fp32\.py"
    r"|model_optim_rng\.pt|distrib_optim\.pt|(mp_rank|iter)_\d.*/|common\.pt|metadata\.json|\.metadata|.*\.distcp"
    r"|extra_state_rank_\d+\.pt|config\.json|adapter_config\.json|zarr\.json"
    # Accelerate's folders around DCP, which family dcp reads (accelerate/utils/fsdp_utils.py).
    r"|(pytorch_model_fsdp|optimizer)_\d+/"
)
_SAVED = re.compile(r".+\.(pt|pth|ckpt|tar|bin)")
_HEAD = 512


@dataclass(frozen=True, slots=True)
class Files:
    """Files of a folder by kind, in order of their numbers."""

    kinds: dict[str, tuple[str, ...]]

    def __getitem__(self, kind: str) -> tuple[str, ...]:
        return self.kinds.get(kind, ())

    @property
    def training(self) -> bool:
        """Whether there is training state beside weights."""
        return any(self[kind] for kind in _TRAINING)


def sort_out(names: Iterable[str]) -> Files:
    """The files among `names` that Accelerate or Trainer write."""
    found: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        for kind, pattern in _KINDS.items():
            if match := pattern.fullmatch(name):
                numbers = [int(group) for group in match.groups() if group is not None]
                found.setdefault(kind, []).append((numbers[0] if numbers else -1, name))
    return Files({kind: tuple(name for _, name in sorted(held)) for kind, held in found.items()})


def is_training_folder(names: Iterable[str]) -> bool:
    """Whether `names` are of a folder in which Accelerate or Trainer keep training state beside weights."""
    files = sort_out(names)
    return bool(files["weights"]) and files.training


def number(name: str) -> int:
    """The number in a file's name; 0 where there is none, as in the first of its kind."""
    found = re.search(r"_(\d+)(?:-\d+-of-\d+)?\.", name)
    return int(found[1]) if found else 0


def detect(store: Store) -> bool:
    """Whether `store` is a file of torch.save, or a folder that is read as one checkpoint."""
    names = store.children()
    if not names or is_others(names):
        return False
    if ROOT in names and is_ours(store):
        return True
    if is_training_folder(names):
        return True
    saved = candidates(names)
    return bool(saved) and is_saved(store, saved[0])


def is_others(names: Iterable[str]) -> bool:
    """Whether the names are those of another family, or of a conversion that was cut short."""
    names = set(names)
    return is_unfinished(names) or any(_OTHERS.fullmatch(name) for name in names)


def is_unfinished(names: Collection[str]) -> bool:
    """Whether a conversion into the folder was cut short."""
    return _JOURNAL in names and ROOT not in names


def candidates(names: Iterable[str]) -> list[str]:
    """Of the names in a folder, those that files of torch.save have; the only one there is, whatever it is called."""
    names = list(names)
    if len(names) == 1 and not names[0].endswith("/"):
        return names
    return [name for name in names if _SAVED.fullmatch(name)]


def is_saved(store: Store, path: str) -> bool:
    """Whether the object begins like a file of torch.save (torch/serialization.py)."""
    try:
        head = store.read(path, 0, min(store.entry(path).size, _HEAD))
    except UcpError:
        return False
    if not head.startswith(LOCAL_SIGNATURE):
        return is_legacy(head)
    length = int.from_bytes(head[26:28], "little")
    return head[30 : 30 + length].endswith(b"/data.pkl")


def is_ours(store: Store) -> bool:
    """Whether our own target has finished here."""
    try:
        return b'"ucp"' in store.read(ROOT, 0, min(store.entry(ROOT).size, _HEAD))
    except UcpError:
        return False
