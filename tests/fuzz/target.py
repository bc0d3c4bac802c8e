"""A target: a reader, the kind of input it takes, and what may come of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tests.fuzz.memory import FuzzStore, Meter
from tests.fuzz.watch import Allowance, Cost, watched
from ucp.catalog import Catalog
from ucp.container.leaves import leaf_bytes
from ucp.errors import UcpError
from ucp.layout import Box
from ucp.run.gather import read_region
from ucp.store import Store
from ucp.tree import TensorLeaf, Tree, walk

CORPUS = Path(__file__).parent / "corpus"
BASES = Path(__file__).parent / "bases"

Style = Literal["bytes", "json", "pickle", "safetensors", "text"]

_MOST_READ = 1 << 20


@dataclass(frozen=True, slots=True)
class Target:
    """`read` gets one input and raises what the reader raises. `style` says how inputs are best mutated.

    `size` are the bytes that the reader sees beside the input.
    """

    name: str
    read: Callable[[bytes], object]
    style: Style = "bytes"
    size: int = 0
    tokens: tuple[bytes, ...] = ()
    allowance: Allowance = field(default_factory=Allowance)

    @property
    def inputs(self) -> list[Path]:
        """The inputs that are kept."""
        return sorted((CORPUS / self.name).glob("*"))

    def warm(self, data: bytes) -> None:
        """Read one input outside of every bound: what is imported at first use is imported."""
        with suppress(UcpError):
            self.read(data)

    def most_memory(self, length: int) -> int:
        """The most bytes of memory that an input of so many bytes may take."""
        return self.allowance.memory + self.allowance.memory_per_byte * (self.size + length)

    def watched(self, data: bytes) -> Cost:
        """Read one input under every bound."""
        return watched(lambda: self.read(data), self.size + len(data), self.allowance)


def store_of(files: Mapping[str, bytes]) -> Store:
    """The store of `files`, from which no more can be read than a reader needs."""
    return FuzzStore(files, Meter((1 << 20) + 64 * sum(map(len, files.values()))))


def use_tree(store: Store, root: Tree) -> None:
    """Do with a tree what its readers do: walk it, and read its tensors."""
    left = _MOST_READ
    for _, node in walk(root):
        if isinstance(node, TensorLeaf) and (left := left - node.extent.nbytes) >= 0:
            leaf_bytes(store, node)


def use_catalog(store: Store, catalog: Catalog) -> None:
    """Do with a catalog what its users do: check every cover, read small tensors, walk the state."""
    left = _MOST_READ
    for name, tensor in catalog.tensors.items():
        for state, spec in tensor.states.items():
            cover = catalog.cover(name, state)
            if (left := left - spec.nbytes) >= 0:
                read_region(store, cover, Box.whole(spec.shape))
        catalog.witness(name)
    for tree in catalog.state.values():
        use_tree(store, tree)
    for group in catalog.param_groups:
        use_tree(store, dict(group.options))
    list(catalog.checksums)
