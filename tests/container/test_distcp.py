"""Objects of many torch files: torch loads each, and each has the CRC-32 of its own bytes."""

from __future__ import annotations

import io
import random
import zipfile
import zlib
from collections import deque

import pytest
import torch

from ucp.container.distcp import DistcpFrame, TensorItem
from ucp.container.torchwrite import dumps
from ucp.plan import Chain, Digests, TensorSpec


def filled(frame: DistcpFrame, sections: list[bytes]) -> bytes:
    """The object as a worker writes it: in order of offset, without a hole."""
    out, crcs = bytearray(), []

    def put(offset: int, data: bytes) -> None:
        assert offset == len(out)
        out.extend(data)

    literals = deque(frame.literals())
    for offset, data in zip(frame.offsets, sections, strict=True):
        while literals and literals[0][0] <= offset:
            put(*literals.popleft())
        put(offset, data)
        crcs.append(zlib.crc32(data))
        for literal in frame.after(crcs):
            put(*literal)
    for literal in literals:
        put(*literal)
    put(*frame.suffix(Digests((), tuple(crcs))))
    assert len(out) == frame.size
    return bytes(out)


ITEMS = (
    TensorItem(TensorSpec((3, 4), "float32"), (16, 32)),
    dumps({"lr": 0.1}),
    TensorItem(TensorSpec((0,), "float32"), (0,)),
    TensorItem(TensorSpec((), "int64"), (8,)),
    dumps(["last but one"]),
    TensorItem(TensorSpec((5,), "bfloat16"), (2, 4, 4)),
)


@pytest.mark.parametrize("count", [1, 2, 3, len(ITEMS)])
def test_each_item_is_a_whole_torch_file(count: int) -> None:
    frame = DistcpFrame(ITEMS[:count])
    assert isinstance(frame, Chain)
    lengths = [n for item in frame.items if isinstance(item, TensorItem) for n in item.lengths]
    sections = [random.Random(number).randbytes(n) for number, n in enumerate(lengths)]
    data, rest = filled(frame, sections), deque(sections)
    for item, (offset, length) in zip(frame.items, frame.places, strict=True):
        file = data[offset : offset + length]
        assert zipfile.ZipFile(io.BytesIO(file)).testzip() is None, "CRC-32 of every record"
        held = torch.load(io.BytesIO(file), weights_only=True)
        if isinstance(item, TensorItem):
            assert (tuple(held.shape), f"{held.dtype}") == (item.spec.shape, f"torch.{item.spec.dtype}")
            raw = b"".join(rest.popleft() for _ in item.lengths)
            assert bytes(held.reshape(-1).view(torch.uint8).tolist()) == raw


def test_sections_must_make_up_the_tensor() -> None:
    with pytest.raises(AssertionError, match="no TensorSpec"):
        TensorItem(TensorSpec((3,), "float32"), (4, 4))
