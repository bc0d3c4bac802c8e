"""What one worker does: write one object of a plan, block by block, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ucp.errors import ConflictError, UcpError
from ucp.layout import FlatRange, itemsize
from ucp.plan import Chain, Cover, Digests, Extent, Fragment, Section, Task, Witness
from ucp.run.cast import cast, contradicts, storage_dtype
from ucp.run.crc import crc
from ucp.run.gather import gather, read_into, read_region
from ucp.run.integrity import Ledger
from ucp.run.journal import Moved
from ucp.store import Buffer, Store, Writer

Advance = Callable[[int], None]
"""Called with the bytes of each finished block."""


def write_object(
    source: Store, destination: Store, task: Task, *, ledger: Ledger, advance: Advance
) -> tuple[Digests, Moved]:
    """Write `task`'s object; gives its digests and the bytes moved. `ledger` must be the caller's own.

    Holds one block, its witness and their rounding at a time. ConflictError where a witness contradicts the data;
    StorageError, CorruptError as the stores raise them. An object that was not written wholly is left invalid and is
    written again by the next run.
    """
    with destination.create(task.object, task.size) as writer:
        writing = _Writing(source, writer, task, ledger, advance)
        literals = deque(task.frame.literals())
        for section in task.sections:
            while literals and literals[0][0] <= section.offset:
                writing.put(*literals.popleft())
            writing.section(section)
        for literal in literals:
            writing.put(*literal)
        digests = Digests(tuple(writing.crc32c), tuple(writing.crc32) if task.frame.needs_crc32 else ())
        writing.put(*task.frame.suffix(digests))
        if writing.written != task.size:
            raise UcpError(f"{task.object}: its parts have {writing.written} bytes, not {task.size}")
    return digests, Moved(ledger.bytes_read - writing.checked, writing.checked, writing.written)


@dataclass(slots=True)
class _Writing:
    """One object being written: digests of its blocks and sections, and bytes moved so far."""

    source: Store
    writer: Writer
    task: Task
    ledger: Ledger
    advance: Advance
    crc32c: list[int] = field(default_factory=list)
    crc32: list[int] = field(default_factory=list)
    checked: int = 0
    written: int = 0

    def put(self, offset: int, data: Buffer) -> None:
        """Write `data` at `offset`."""
        self.writer.write_at(offset, data)
        self.written += len(data)

    def section(self, section: Section) -> None:
        """Write one section; notes the crc32c of its blocks and, if the frame has use for it, its crc32."""
        offset, whole, frame = section.offset, 0, self.task.frame
        width = itemsize(section.cover.spec.dtype)
        scratch = bytearray(next((region.length for region in section.blocks(frame.block_bytes)), 0) * width)
        for region in section.blocks(frame.block_bytes):
            view = memoryview(scratch)[: region.length * width]
            read_into(self.source, section.cover, section.target(region), view, self.ledger.record)
            self.check(section, region, view)
            view = _as_written(section, view)
            self.crc32c.append(crc("crc32c", view))
            if frame.needs_crc32:
                whole = crc("crc32", view, whole)
            self.put(offset, view)
            offset += len(view)
            self.advance(len(view))
        self.crc32.append(whole)
        for literal in frame.after(self.crc32) if isinstance(frame, Chain) else ():
            self.put(*literal)

    def check(self, section: Section, region: FlatRange, data: memoryview) -> None:
        """Compare a block with its replicas and its low-precision copy."""
        before = self.ledger.bytes_read
        check_replicas(self.source, section, region, data, self.ledger)
        if section.witness is not None:
            check_witness(self.source, section, section.witness, region, data, self.ledger)
        self.checked += self.ledger.bytes_read - before


def _as_written(section: Section, data: memoryview) -> memoryview:
    """`data`, in the cover's dtype, in the dtype that the section is written in."""
    own, written = section.cover.spec.dtype, section.written_dtype
    if own == written:
        return data
    return cast(np.frombuffer(data, storage_dtype(own)), own, written).view(np.uint8).data


def check_replicas(source: Store, section: Section, region: FlatRange, data: memoryview, ledger: Ledger) -> None:
    """ConflictError naming the first byte where a further replica of `region` differs from `data`.

    The terms of a mean or a sum are read once more, each to be set against its own replicas.
    """
    cover = section.cover
    if cover.reduce is None:
        _check_copies(source, cover, region, data, ledger)
    for term in cover.terms:
        if term.replicas:
            _check_copies(source, term, region, read_region(source, term, region, ledger.record).data, ledger)


def _check_copies(source: Store, cover: Cover, region: FlatRange, data: memoryview, ledger: Ledger) -> None:
    target = Fragment(region, Extent.contiguous("", 0, (region.length,), cover.spec.dtype))
    for copies in cover.replica_copies_into(target):
        other = bytearray(data)
        gather(source, copies, memoryview(other), ledger.record)
        if other != data:
            first = int((np.frombuffer(other, np.uint8) != np.frombuffer(data, np.uint8)).argmax())
            element = region.start + first * region.length // len(data)
            one = Fragment(FlatRange(element, 1), Extent.contiguous("", 0, (1,), cover.spec.dtype))
            held = " ".join(sorted({copy.source.object for copy in cover.copies_into(one)}))
            theirs = {copy.source.object for group in cover.replica_copies_into(one) for copy in group}
            names = " ".join(sorted(theirs & {copy.source.object for copy in copies}))
            raise ConflictError(
                f"{cover.key}: the replica in {names} differs from {held} from element {element} on",
                hint="one of the two is damaged, or the ranks diverged; --no-check takes the first replica as it is",
            )


def check_witness(
    source: Store, section: Section, witness: Witness, region: FlatRange, data: memoryview, ledger: Ledger
) -> None:
    """ConflictError naming the first element of `region` where the low-precision copy is not the rounded `data`."""
    spec, low_spec = section.cover.spec, witness.cover.spec
    low = read_region(source, witness.cover, region, ledger.record).view(storage_dtype(low_spec.dtype))
    exact = np.frombuffer(data, storage_dtype(spec.dtype))
    differs = contradicts(exact, spec.dtype, low, low_spec.dtype)
    if not differs.any():
        return
    first = int(differs.argmax())
    held = witness.cover.copies_into(section.target(FlatRange(region.start + first, 1)))
    where = held[0].source.object if held else "?"
    raise ConflictError(
        f"{section.cover.key.name}: element {region.start + first} is {exact[first]!r} in {spec.dtype}, "
        f"not what its {low_spec.dtype} copy in {where} holds ({int(differs.sum())} of {region.length} differ)",
        hint="one of the two is damaged or was read in another order; --no-check takes the higher precision as it is",
    )
