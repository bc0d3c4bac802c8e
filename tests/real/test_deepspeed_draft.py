"""Drafts from checkpoints that real DeepSpeed wrote: they parse, are sound, and take all of their checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import ucp
from tests.support.cases import CASES
from tests.support.tp.cached import TpFolder, tp_folder  # noqa: F401
from tests.support.tp.compare import differences, truth
from ucp.cli.app import program
from ucp.cli.command import Reading
from ucp.cli.spec_new import comparison
from ucp.cli.spec_source import read_source
from ucp.lang.draft import draft
from ucp.layout import Mesh

PLAIN = ["z0_fp32_dp2_adafactor", "z1_bf16_dp4", "pp2_z1_fp32_dp2_untied", "z3_bf16_dp2"]


def proved(checkpoint: Path, path: Path) -> str:
    """The text of a draft, after `ucp spec check` has bound it to its checkpoint."""
    for words in (["new", str(checkpoint), "--out", str(path)], ["check", str(path), str(checkpoint)]):
        done = CliRunner().invoke(program, ["spec", *words], prog_name="ucp")
        assert done.exit_code == 0, done.output
    return path.read_text()


@pytest.mark.parametrize("name", PLAIN)
def test_a_draft_takes_its_checkpoint(name, deepspeed_case, tmp_path) -> None:
    text = proved(deepspeed_case(CASES[name]) / "ckpt", tmp_path / "new.ucp")
    assert "/dp" not in text  # its shards are put together already


def test_a_draft_of_autotp_cuts_what_autotp_cut(tp_folder: TpFolder, tmp_path) -> None:  # noqa: F811
    text = proved(tp_folder("autotp_z1_fp32_tp2dp1") / "ckpt", tmp_path / "new.ucp")
    assert "undecided" not in text.replace("A draft: `undecided`", "")
    assert "model.layers.{l}" in text
    assert "<-> layers.{l}" in text


def test_a_draft_of_autotp_reads_the_jobs_own_tensors(tp_folder: TpFolder) -> None:  # noqa: F811
    folder = tp_folder("autotp_z1_fp32_tp2dp1")
    source = read_source(str(folder / "ckpt"), Reading(), Mesh({}))
    found = draft(source.held, source.sharded.mesh, same=comparison(source), programs=())
    with ucp.open(str(folder / "ckpt"), program=found.program) as checkpoint:
        assert differences(checkpoint, truth(folder)) == []


def test_a_draft_of_megatron_leaves_fused_tensors_open(tp_folder: TpFolder, tmp_path) -> None:  # noqa: F811
    text = proved(tp_folder("megatron_z1_fp32_pp2tp2dp1") / "ckpt", tmp_path / "new.ucp")
    assert "query, key and value in one?" in text
    assert "[vocab/tp, hidden]" in text
