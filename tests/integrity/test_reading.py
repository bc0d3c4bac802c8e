"""What indexing gives of a damaged checkpoint: an error where a digest tells, and by choice the bytes as they are."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

import ucp
from tests.integrity.made import LARGE, make, objects
from ucp.errors import CorruptError


@pytest.fixture(params=["native", "universal"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint whose large tensor has a wrong bit near its end."""
    folder = make(request.param, tmp_path / "ckpt", large=True)
    true = ucp.open(str(folder))["large"]["value"][...]
    data = true.numpy().tobytes()
    path, at = next((path, at) for path in objects(folder) if (at := path.read_bytes().find(data)) >= 0)
    with path.open("r+b") as file:
        file.seek(at + len(data) - 4)
        file.write(b"\x01")
    return folder


def test_a_damaged_tensor_is_not_given(folder: Path) -> None:
    ckpt = ucp.open(str(folder))
    for copy in (ckpt, pickle.loads(pickle.dumps(ckpt))):
        for read in (lambda: copy["large"]["value"][...], lambda: copy["large"]["value"][1], copy.state_dict):  # noqa: B023
            with pytest.raises(CorruptError, match="fail their crc32c"):
                read()
    assert ckpt["head.bias"]["value"][...].shape == (7,)


def test_other_digest_blocks_of_it_are(folder: Path) -> None:
    ckpt, whole = ucp.open(str(folder)), ucp.open(str(folder), verify=False)["large"]["value"][...]
    assert torch.equal(ckpt["large"]["value"][0], whole[0])
    with pytest.raises(CorruptError):
        ckpt["large"]["value"][1, -10:]  # the rest of the last digest block is read to tell
    assert whole.shape == (2, LARGE)


def test_by_choice_bytes_are_given_as_they_are(folder: Path) -> None:
    ckpt = ucp.open(str(folder), verify=False)
    assert torch.equal(ckpt.state_dict()["large"], ckpt["large"]["value"][...])


def test_training_state_is_checked_however_little_of_it_is_read(tmp_path: Path) -> None:
    folder = make("torch", tmp_path / "ckpt")
    ckpt = ucp.open(str(folder))
    assert ckpt.read_state("epoch") == 3
    state = {"table": torch.arange(40_000.0), "more": torch.ones(3)}
    torch.save({"model": {"w": torch.ones(2, 2)}, "extra": state}, tmp_path / "one.pt")
    data = bytearray((tmp_path / "one.pt").read_bytes())
    at = data.find(state["table"].numpy().tobytes())
    data[at + 100_000] ^= 1
    (tmp_path / "one.pt").write_bytes(data)
    damaged = ucp.open(str(tmp_path / "one.pt"))
    with pytest.raises(CorruptError, match="fail their crc32"):
        damaged.state["extra"]["table"][:3]
    assert torch.equal(damaged.state["extra"]["more"][...], torch.ones(3))
    assert ucp.open(str(tmp_path / "one.pt"), verify=False).state["extra"]["table"][2] == 2
