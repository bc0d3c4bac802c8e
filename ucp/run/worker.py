"""What one worker does: write one object of a plan, block by block, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ucp.errors import ConflictError
from ucp.layout import FlatRange
from ucp.plan import Digests, Section, Task, Witness
from ucp.run.cast import contradicts, storage_dtype
from ucp.run.crc import crc
from ucp.run.gather import gather, read_region
from ucp.run.integrity import Ledger
from ucp.store import Store, Writer

Advance = Callable[[int], None]
"""Called with the bytes of each finished block."""


def write_object(source: Store, destination: Store, task: Task, *, ledger: Ledger, advance: Advance) -> Digests:
    """Write `task`'s object and give its digests. Holds one block, its witness and their rounding at a time.

    ConflictError where a witness contradicts the data; StorageError, CorruptError as the stores raise them. An object
    that was not written wholly is left invalid and is written again by the next run.
    """
    crc32c: list[int] = []
    crc32: list[int] = []
    with destination.create(task.object, task.size) as writer:
        literals = list(task.frame.literals())
        for section in task.sections:
            while literals and literals[0][0] <= section.offset:
                writer.write_at(*literals.pop(0))
            crc32.append(_write_section(source, writer, task, section, crc32c, ledger, advance))
        for literal in literals:
            writer.write_at(*literal)
        digests = Digests(tuple(crc32c), tuple(crc32) if task.frame.needs_crc32 else ())
        writer.write_at(*task.frame.suffix(digests))
    return digests


def _write_section(
    source: Store, writer: Writer, task: Task, section: Section, crc32c: list[int], ledger: Ledger, advance: Advance
) -> int:
    """Write one section, append the crc32c of its blocks and return its crc32 (0 if the frame has no use for it)."""
    offset, whole = section.offset, 0
    width = section.nbytes // section.region.length if section.region.length else 1
    scratch = bytearray(min(section.nbytes, max(task.frame.block_bytes, width)))
    for region in section.blocks(task.frame.block_bytes):
        view = memoryview(scratch)[: region.length * width]
        gather(source, section.cover.copies_into(section.target(region)), view, ledger.record)
        check_replicas(source, section, region, view, ledger)
        if section.witness is not None:
            check_witness(source, section, section.witness, region, view, ledger)
        crc32c.append(crc("crc32c", view))
        if task.frame.needs_crc32:
            whole = crc("crc32", view, whole)
        writer.write_at(offset, view)
        offset += len(view)
        advance(len(view))
    return whole


def check_replicas(source: Store, section: Section, region: FlatRange, data: memoryview, ledger: Ledger) -> None:
    """ConflictError naming the first byte where a further replica of `region` differs from `data`."""
    target = section.target(region)
    for copies in section.cover.replica_copies_into(target):
        other = bytearray(data)
        gather(source, copies, memoryview(other), ledger.record)
        if other != data:
            first = int((np.frombuffer(other, np.uint8) != np.frombuffer(data, np.uint8)).argmax())
            element = region.start + first * region.length // len(data)
            names = sorted({copy.source.object for copy in copies})
            raise ConflictError(
                f"{section.cover.key}: replica in {' '.join(names)} differs from element {element} on",
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
