"""Copies in host memory: exact, in memory that is kept, and digests that tell elements and their places apart."""

from __future__ import annotations

import threading

import pytest
import torch

from ucp.format.native_shard import Piece
from ucp.layout import Box
from ucp.plan import Key
from ucp.train.save.digest import blocks, device_digest, digests
from ucp.train.save.plan import Cut
from ucp.train.save.staging import Buffer, Buffers, stage

DTYPES = "float32 bfloat16 float16 float64 int64 int8 uint8 bool float8_e4m3fn".split()


def random_bytes(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def held(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    kind = getattr(torch, dtype)
    if dtype == "bool":
        return random_bytes(max(1, torch.Size(shape).numel()), seed).reshape(shape) > 127
    return random_bytes(torch.Size(shape).numel() * kind.itemsize, seed).view(kind).reshape(shape)


def pieces(shapes, *, seed=0):
    memory = {}
    for number, shape in enumerate(shapes):
        dtype = DTYPES[number % len(DTYPES)]
        memory[Piece(Key(f"w{number}", "value"), dtype, Box.whole(shape))] = held(dtype, shape, seed + number)
    return memory


def raw(tensor: torch.Tensor) -> bytes:
    return b"".join(bytes(block) for block in blocks(tensor))


def test_what_is_staged_is_what_was_there_whatever_happens_to_it_then() -> None:
    memory = pieces([(3, 5), (7,), (), (2, 3, 4), (1,), (64, 3), (5, 5), (9,), (4, 4)])
    views = {
        piece: tensor.t() if tensor.ndim == 2 and piece.box.shape[0] == piece.box.shape[1] else tensor
        for piece, tensor in memory.items()
    }
    expected = {piece: raw(tensor) for piece, tensor in views.items()}
    cuts = [Cut(piece, piece) for piece in views]
    buffer = Buffer()
    made = stage(buffer, views, cuts, cuts)
    made.wait()
    assert {piece: raw(tensor) for piece, tensor in made.staged.items()} == expected
    assert made.compared == {piece: digests(tensor) for piece, tensor in views.items()}
    for tensor in memory.values():
        tensor.fill_(0)
    assert {piece: raw(tensor) for piece, tensor in made.staged.items()} == expected


def test_the_same_memory_takes_the_next_save() -> None:
    buffer, cuts = Buffer(), None
    places = []
    for seed in range(3):
        memory = pieces([(30, 5), (7, 2)], seed=seed)
        cuts = cuts or tuple(Cut(piece, piece) for piece in memory)
        made = stage(buffer, memory, cuts, ())
        assert {piece: raw(one) for piece, one in made.staged.items()} == {p: raw(one) for p, one in memory.items()}
        places.append([view.data_ptr() for view in made.staged.values()])
    assert places[0] == places[1] == places[2]
    larger = pieces([(3000, 5)])
    made = stage(buffer, larger, [Cut(piece, piece) for piece in larger], ())
    assert [raw(one) for one in made.staged.values()] == [raw(one) for one in larger.values()]


def test_a_cut_is_a_box_of_what_is_held() -> None:
    tensor = torch.arange(60.0).reshape(10, 6)
    whole = Piece(Key("w", "value"), "float32", Box((5, 0), (10, 6)))
    part = Piece(Key("w", "value"), "float32", Box((8, 2), (3, 4)))
    made = stage(Buffer(), {whole: tensor}, [Cut(part, whole)], ())
    assert torch.equal(made.staged[part], tensor[3:6, 2:6])


def test_a_third_save_waits_for_the_first() -> None:
    buffers = Buffers()
    first, _ = buffers.take(), buffers.take()
    found = []
    third = threading.Thread(target=lambda: found.append(buffers.take()))
    third.start()
    third.join(0.2)
    assert third.is_alive()
    buffers.give_back(first)
    third.join(60)
    assert found == [first]


@pytest.mark.parametrize("shape", [(1,), (3,), (4,), (1000, 3), ()])
@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float32", "int64"])
def test_a_digest_of_a_device_sees_every_byte_and_its_place(shape, dtype) -> None:
    tensor = held(dtype, shape, 5)
    first = int(device_digest(tensor))
    assert int(device_digest(tensor.clone())) == first
    data = tensor.reshape(-1).view(torch.uint8)
    for at in {0, data.numel() // 2, data.numel() - 1}:
        data[at] ^= 1
        assert int(device_digest(tensor)) != first
        data[at] ^= 1
    swapped = tensor.reshape(-1).flip(0).contiguous()
    if not torch.equal(swapped.view(torch.uint8), data):
        assert int(device_digest(swapped)) != first


def test_a_digest_of_a_device_does_not_depend_on_how_it_is_cut(monkeypatch) -> None:
    tensor = random_bytes(100_003)
    first = int(device_digest(tensor))
    monkeypatch.setattr("ucp.train.save.digest._LANES", 1000)
    assert int(device_digest(tensor)) == first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_lies_on_a_gpu_is_staged_into_pinned_memory_as_it_was() -> None:
    memory = {piece: tensor.cuda() for piece, tensor in pieces([(3000, 500), (700,), (200, 300)]).items()}
    memory |= {Piece(Key("t", "value"), "float32", Box.whole((500, 400))): torch.rand(400, 500).cuda().t()}
    expected = {piece: raw(tensor.cpu()) for piece, tensor in memory.items()}
    cuts = [Cut(piece, piece, "device") for piece in memory]
    buffer = Buffer()
    for _ in range(2):
        made = stage(buffer, memory, cuts, ())
        made.wait()
        assert buffer.memory.is_pinned()
        assert {piece: raw(tensor) for piece, tensor in made.staged.items()} == expected
        assert made.compared == {piece: int(device_digest(tensor)) for piece, tensor in memory.items()}
    assert {piece: raw(tensor) for piece, tensor in memory.items()} == expected
    for tensor in memory.values():
        tensor.fill_(1)
    torch.cuda.synchronize()
    assert {piece: raw(tensor) for piece, tensor in made.staged.items()} == expected
