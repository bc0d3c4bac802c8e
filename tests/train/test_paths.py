"""A path is as good as a URL, wherever one says where a checkpoint lies."""

from __future__ import annotations

import torch

import ucp


def test_saving_converting_and_loading(tmp_path):
    saved, made = {"w": torch.arange(6.0)}, tmp_path / "made"
    ucp.save(saved, tmp_path / "saved")
    assert ucp.async_save(saved, tmp_path / "behind").result(60).step is None
    ucp.convert(tmp_path / "saved", made)
    found = {"w": torch.zeros(6)}
    ucp.load(found, made)
    assert torch.equal(found["w"], saved["w"])


def test_a_run(tmp_path):
    with ucp.CheckpointManager(tmp_path / "run", every=1, upload=tmp_path / "far") as manager:
        manager.step(1, {"w": torch.arange(6.0)})
    assert ucp.CheckpointManager(tmp_path / "far").latest.step == 1
