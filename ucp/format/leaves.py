"""Reading the tensors of training state, whose digests are checked before they are believed."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from crc32c import crc32c

from ucp.catalog import Checksum
from ucp.container.leaves import leaf_bytes
from ucp.errors import CorruptError
from ucp.plan import BLOCK_BYTES
from ucp.store import Store
from ucp.tree import TensorLeaf


@dataclass(eq=False)
class LeafReader:
    """Gives the bytes of tensor leaves that lie in `store`; each checksum that a leaf touches is verified once."""

    store: Store
    checksums: Sequence[Checksum]
    _by_object: dict[str, list[Checksum]] | None = None
    _verified: set[Checksum] = field(default_factory=set)

    def __call__(self, leaf: TensorLeaf) -> bytes:
        """The elements in C order, little-endian; CorruptError if they fail a digest, or repeat."""
        extent = leaf.extent
        if leaf.inline is not None or not extent.size:
            return leaf.inline or b""
        start, stop = extent.span
        for checksum in self._of(extent.object):
            if checksum.offset < stop and start < checksum.offset + checksum.length:
                self._verify(checksum)
        return leaf_bytes(self.store, leaf)

    def _of(self, path: str) -> list[Checksum]:
        if self._by_object is None:
            self._by_object = defaultdict(list)
            for checksum in self.checksums:
                self._by_object[checksum.object].append(checksum)
        return self._by_object.get(path, [])

    def _verify(self, checksum: Checksum) -> None:
        if checksum in self._verified:
            return
        value, end = 0, checksum.offset + checksum.length
        for at in range(checksum.offset, end, BLOCK_BYTES):
            data = self.store.read(checksum.object, at, min(BLOCK_BYTES, end - at))
            value = crc32c(data, value) if checksum.algorithm == "crc32c" else zlib.crc32(data, value)
        if value != checksum.value:
            raise CorruptError(
                f"{self.store.url}/{checksum.object}: bytes {checksum.offset}..{end} fail their {checksum.algorithm}",
                hint="the file is damaged: restore it from another copy",
            )
        self._verified.add(checksum)
