"""Files that hold tensors: torch.save's zip, its pickle, its older form, and safetensors."""

from __future__ import annotations

from tests.fuzz.target import Target, store_of, use_tree
from tests.fuzz.zips import torch_zip
from ucp.container.safetensors import read_header
from ucp.container.torchfile import read_torch_file

STORAGES = {str(number): bytes(64) for number in range(4)}
"""Records beside a pickle for its persistent ids to name."""


def _torch(data: bytes) -> None:
    store = store_of({"x.pt": data})
    use_tree(store, read_torch_file(store, "x.pt").root)


def _pickle(data: bytes) -> None:
    _torch(torch_zip(data, STORAGES))


def _safetensors(data: bytes) -> None:
    read_header(store_of({"x.safetensors": data}), "x.safetensors")


def targets() -> list[Target]:
    return [
        Target("torch-zip", _torch, tokens=(b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07")),
        Target("torch-legacy", _torch, style="pickle"),
        Target("pickle", _pickle, style="pickle", size=1024),
        Target("safetensors", _safetensors, style="safetensors"),
    ]
