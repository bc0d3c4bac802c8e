"""Tiny random models of transformers, the folders that they are saved to, and what is read back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor

from tests.programs.hf import models
from ucp.catalog import Catalog
from ucp.converter import read_catalog
from ucp.layout import FlatRange
from ucp.run.convert import convert
from ucp.run.gather import read_region
from ucp.store import LocalStore, Store

CASES = ("llama", "llama-tied", "gpt2", "qwen2-tied", "mixtral", "qwen3-moe", "gpt-neox", "phi3")
"""Families and variants, of `tests.programs.hf.models`."""

SMALL = "10KB"
"""Makes several files of each of them."""

IDS = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(1))


def model(name: str, *, dtype: torch.dtype | None = None, seed: int = 0) -> Any:
    """A module with values of its own in every parameter; tied bfloat16 for the tied Llama, else float32."""
    case = models.CASES[name]
    dtype = dtype or (torch.bfloat16 if name == "llama-tied" else torch.float32)
    made = models.model_class(case)._from_config(models.config(case), experts_implementation="eager").to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return made


def loaded(name: str, folder: Path) -> Any:
    """The module that ``from_pretrained`` makes of `folder`, which must hold it exactly."""
    made, told = models.model_class(models.CASES[name]).from_pretrained(
        folder, output_loading_info=True, experts_implementation="eager"
    )
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), told
    return made.eval()


def on_disk(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the safetensors files of `folder`, read by their own library."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def save_torch_files(tensors: Mapping[str, Tensor], folder: Path, *, size: str = "5GB") -> None:
    """``pytorch_model.bin``, or several and their index, as the library of the Hub writes them."""
    folder.mkdir(parents=True)
    save_torch_state_dict(dict(tensors), folder, max_shard_size=size, safe_serialization=False)


def read(folder: Path, **options: Any) -> tuple[Catalog, dict[str, Tensor]]:
    """The catalog of `folder` and the value of each of its tensors."""
    catalog, store = read_catalog(str(folder), **options)
    return catalog, {name: value(catalog, store, name) for name in catalog.tensors}


def value(catalog: Catalog, store: Store, name: str, state: str = "value") -> Tensor:
    """One state of one tensor."""
    cover = catalog.cover(name, state)
    raw = read_region(store, cover, FlatRange(0, cover.spec.size))
    flat = torch.frombuffer(bytearray(raw.tobytes()), dtype=getattr(torch, cover.spec.dtype)) if raw.size else None
    made = torch.empty(0, dtype=getattr(torch, cover.spec.dtype)) if flat is None else flat
    return made.reshape(cover.spec.shape)


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    """Whether both have the same names, dtypes, shapes and bits."""
    return found.keys() == wanted.keys() and all(
        found[name].dtype == wanted[name].dtype
        and found[name].shape == wanted[name].shape
        and torch.equal(_bits(found[name]), _bits(wanted[name]))
        for name in wanted
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def logits(module: Any) -> Tensor:
    """What the module computes of fixed tokens."""
    with torch.no_grad():
        made: Tensor = module(IDS).logits
    return made


def to_hf(source: Path, destination: Path, **options: Any) -> Path:
    """`source` converted to a Hugging Face folder."""
    convert(str(source), str(destination), to="hf", **options)
    return destination


def names(folder: Path) -> set[str]:
    """The files of a folder, without our record of the conversion."""
    return set(os.listdir(folder)) - {"ucp-conversion.json"}


def edit(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file; those that are None go."""
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: held for key, held in document.items() if held is not None}))


class Counting(LocalStore):
    """A store that counts the bytes read of each object."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.count: dict[str, int] = {}

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        self.count[path] = self.count.get(path, 0) + len(buffer)
        super().read_into(path, offset, buffer)
