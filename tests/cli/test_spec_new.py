"""``ucp spec new``: drafts from checkpoints of the test family."""

from __future__ import annotations

import numpy as np

from tests.cli import shards
from tests.cli.test_start_up import modules_loaded
from ucp.lang import load_program, parse


def test_a_draft_fits_what_it_was_made_from(checkpoint, tmp_path, invoke, document) -> None:
    path = tmp_path / "new.ucp"
    done = invoke("spec", "new", checkpoint, "--out", path)
    assert done.exit_code == 0, done.stderr
    assert f"ucp spec check {path}" in done.stderr
    assert load_program(path) == parse(path.read_text())
    assert document("spec", "check", path, checkpoint)["checkpoint"]["logical"] == 5
    assert invoke("spec", "fmt", "--check", path).exit_code == 0


def test_a_draft_is_printed(checkpoint, invoke, document) -> None:
    text = invoke("spec", "new", checkpoint).stdout
    found = document("spec", "new", checkpoint)
    assert found["text"] == text
    assert (found["file"], found["problem"]) == (None, None)
    assert "layers.{l}" in text
    assert "state * : like param" in text


def test_a_file_is_not_overwritten(checkpoint, tmp_path, invoke) -> None:
    path = tmp_path / "mine.ucp"
    path.write_text("mine")
    assert invoke("spec", "new", checkpoint, "--out", path).exit_code == 2
    assert path.read_text() == "mine"


def test_questions_are_counted(tmp_path, invoke, document) -> None:
    folder = shards.write(tmp_path / "fused", {"layers.0.attn.qkv.weight": np.zeros((6, 2), np.float32)})
    assert len(document("spec", "new", folder)["undecided"]) == 1
    assert "1 question left open" in invoke("spec", "new", folder, "--no-data").stderr


def test_what_is_no_checkpoint_is_refused(tmp_path, invoke) -> None:
    assert invoke("spec", "new", tmp_path).exit_code == 3


def test_nothing_heavy_is_loaded(checkpoint, tmp_path) -> None:
    path = tmp_path / "new.ucp"
    for words in (["new", checkpoint, "--out", path], ["check", path, checkpoint]):
        assert not modules_loaded("spec", *map(str, words)) & {"torch", "zarr", "rich"}
