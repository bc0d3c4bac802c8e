"""Where things lie in a DeepSpeed universal folder; a parameter's name is a path in it.

DeepSpeed joins the name of a parameter to ``<tag>/zero/`` and lists that folder for ``*.pt``
(deepspeed/checkpoint/universal_checkpoint.py, load_hp_checkpoint_state; deepspeed/runtime/zero/stage3.py).
"""

from __future__ import annotations

from collections.abc import Iterable

from ucp.errors import FitError

LATEST = "latest_universal"
"""Text object beside the tag's folder that names it (deepspeed/runtime/engine.py, load_checkpoint)."""

OPTIMIZER_STATE = "zero/optimizer_state.pt"
MODEL_STATES = "mp_rank_00_model_states.pt"
"""What a ZeRO-1, ZeRO-2 or BF16_Optimizer job looks for before anything else."""
MODEL_STATES_3 = "zero_pp_rank_0_mp_rank_00_model_states.pt"
"""What a ZeRO-3 job looks for before anything else."""


def model_files(mp: int, *, zero3: bool) -> list[str]:
    """The model files of a folder for `mp` model-parallel ranks, those for ZeRO-3 jobs last."""
    paths = [MODEL_STATES.replace("00", f"{rank:02d}") for rank in range(mp)]
    return paths + [f"zero_pp_rank_0_{path}" for path in paths if zero3]


VALUE_FILE = "fp32"
_MOST_NAME_BYTES = 255


def state_file(name: str, state: str) -> str:
    """Path, inside the tag's folder, of one state of parameter `name`; the value's file is called ``fp32``."""
    return f"zero/{name}/{VALUE_FILE if state == 'value' else state}.pt"


def step_file(name: str) -> str:
    """Path, inside the tag's folder, of a parameter's step count."""
    return f"zero/{name}/step.pt"


def check_name(name: str) -> None:
    """FitError for a tensor name that cannot be a folder's path below ``zero/``."""
    parts = name.split("/")
    if any(part in {"", ".", ".."} for part in parts) or "\0" in name:
        raise FitError(
            f"{name!r}: DeepSpeed makes a folder of a parameter's name, and this is no path inside the checkpoint",
            hint="rename the module, or resume from the universal form with ucp.load",
        )
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise FitError(
            f"{name!r} is not a valid Unicode name: {error.reason}", hint="rename the module before it is saved"
        ) from error
    if "\\" in name or not name.isprintable():
        raise FitError(
            f"{name!r}: DeepSpeed makes a folder of a parameter's name, and this has characters that no path should",
            hint="rename the module, or resume from the universal form with ucp.load",
        )
    if any(len(part.encode()) > _MOST_NAME_BYTES for part in parts):
        raise FitError(
            f"{name[:60]!r}…: DeepSpeed makes a folder of a parameter's name, and this one is longer than file "
            f"systems allow ({_MOST_NAME_BYTES} bytes)",
            hint="rename the module, or resume from the universal form with ucp.load",
        )


def check_paths(paths: Iterable[str]) -> None:
    """FitError where one object's path is twice there or is a folder of another's."""
    seen: set[str] = set()
    for path in paths:
        if path in seen:
            raise FitError(f"{path}: two states of the checkpoint would be this one file")
        seen.add(path)
    for path in seen:
        parts = path.split("/")
        for end in range(1, len(parts)):
            if (folder := "/".join(parts[:end])) in seen:
                raise FitError(f"{path}: its folder {folder} would also be a file of another tensor")
