"""The twelve traps that real checkpoints were found to set, each on real files; numbers are those of the list.

Traps of other frameworks' formats are held against the corpus as well, where it lies beside the repository.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

from tests.converters.deepspeed.oracle import differences, load_truth, read_state
from tests.real.conftest import DeepSpeedCase
from tests.real.hostile import contents, repair, ucp
from tests.support.cases import CASES
from tests.support.deepspeed_job import read_result
from ucp.catalog import Catalog
from ucp.checkpoint import open_checkpoint
from ucp.converters.deepspeed import CONVERTER
from ucp.errors import NotFoundError, UsageError
from ucp.layout import FlatRange
from ucp.run.convert import convert, prepare
from ucp.run.gather import read_region
from ucp.store import open_store

CORPUS = Path(__file__).parents[3] / "shared" / "corpus" / "cases"
ROUND_ROBIN, STAGE_1, STAGE_3 = CASES["z2_bf16_dp4_rr"], CASES["z1_bf16_dp4"], CASES["z3_bf16_dp2"]


def read(root: Path) -> Catalog:
    return CONVERTER.read(open_store(str(root)))


def in_corpus(name: str) -> Path:
    """A folder of the corpus of real checkpoints that may lie beside the repository."""
    if not (CORPUS / name).is_dir():
        pytest.skip("the corpus of real checkpoints is not beside this repository")
    return CORPUS / name


def test_trap_1_round_robin_order_is_that_of_param_shapes(deepspeed_case: DeepSpeedCase, tmp_path: Path) -> None:
    """The saved mapping swaps parameters, and DeepSpeed's converter believes it; the low-precision copies tell."""
    folder = deepspeed_case(ROUND_ROBIN)
    root, truth = folder / "ckpt", load_truth(folder / "truth.safetensors")
    assert differences(root, read(root), truth) == []
    assert any(note.startswith("round_robin_gradients") for note in read(root).notes)
    assert convert(str(root), str(tmp_path / "new")).bytes_checked > 0, "every parameter agrees with its copy"


def test_trap_1_in_the_corpus_values_are_not_the_wrong_ones_of_the_api() -> None:
    root = in_corpus("ds_z2_bf16_dp4_rr")
    wrong = load_truth(root / "ds_api_WRONG.safetensors")
    assert len(differences(root / "ckpt", read(root / "ckpt"), wrong)) > 50


def test_trap_2_padding_of_zero_3_may_hold_anything(deepspeed_case: DeepSpeedCase, tmp_path: Path) -> None:
    """Uninitialised memory: other garbage there gives the same checkpoint, byte for byte, and no complaint."""
    root = Path(shutil.copytree(deepspeed_case(STAGE_3) / "ckpt", tmp_path / "source"))
    convert(str(root), str(tmp_path / "before"))
    catalog = read(root)
    padding = 0
    for path in sorted(root.glob("*/*optim_states.pt")):
        name = str(path.relative_to(root))
        data, used = bytearray(path.read_bytes()), np.zeros(path.stat().st_size, bool)
        for pieces in catalog.fragments.values():
            for extent in (fragment.extent for fragment in pieces if fragment.extent.object == name):
                used[slice(*extent.span)] = True
        for checksum in (c for c in catalog.checksums if c.object == name and c.length > 4):
            free = checksum.offset + np.flatnonzero(~used[checksum.offset : checksum.offset + checksum.length])
            padding += free.size
            for at in free:
                data[at] = 0x7F
        path.write_bytes(data)
        repair(path)
    assert padding > 0
    convert(str(root), str(tmp_path / "after"))
    before, after = contents(tmp_path / "before"), contents(tmp_path / "after")
    assert before == after
    ucp("verify", root, "--deep")


def test_trap_3_groups_keep_their_own_hyper_parameters(deepspeed_case: DeepSpeedCase, tmp_path: Path) -> None:
    """ZeRO-3's universal loader gives every group those of group 0; the user is told what to call."""
    root = deepspeed_case(STAGE_3) / "ckpt"
    rates = [group.options["lr"] for group in read(root).param_groups]
    assert len(set(rates)) == len(rates) > 1
    for family in ("universal", "deepspeed-universal"):
        convert(str(root), str(tmp_path / family), to=family)
        with open_checkpoint(str(tmp_path / family)) as ckpt:
            assert [group.options["lr"] for group in ckpt.param_groups] == rates
    notes = prepare(str(root), str(tmp_path / "new"), to="deepspeed-universal").notes
    assert any("its loader knows one optimizer group" in note and "finish_load" in note for note in notes)


def test_trap_4_buffers_and_frozen_parameters_are_there(deepspeed_case: DeepSpeedCase, tmp_path: Path) -> None:
    """DeepSpeed's universal loader restores neither; both are in what is written, and the user is told what to call."""
    folder = deepspeed_case(STAGE_1)
    truth = load_truth(folder / "truth.safetensors")
    for family in ("universal", "deepspeed-universal"):
        convert(str(folder / "ckpt"), str(tmp_path / family), to=family)
        with open_checkpoint(str(tmp_path / family)) as ckpt:
            for name in ("drift", "calls"):
                assert np.array_equal(_bits(ckpt[name]["value"][...]), truth[f"buffer/{name}"][1].reshape(-1))
            assert ckpt["adapter.weight"].shape == (33, 33)
    notes = prepare(str(folder / "ckpt"), str(tmp_path / "new"), to="deepspeed-universal").notes
    assert any("does not load" in note and "finish_load" in note for note in notes)


def _bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return (
        tensor.reshape(-1)
        .view({4: torch.int32, 8: torch.int64}[tensor.element_size()])
        .numpy()
        .view(f"<u{tensor.element_size()}")
    )


def test_trap_5_states_of_later_groups_are_found(deepspeed_case: DeepSpeedCase) -> None:
    """DeepSpeed's own accessor raises for groups after the first; the files have them."""
    folder = deepspeed_case(STAGE_1)
    root, truth = folder / "ckpt", load_truth(folder / "truth.safetensors")
    catalog = read(root)
    assert len(catalog.param_groups) == 3
    for group in catalog.param_groups[1:]:
        for name in group.params:
            for state in ("exp_avg", "exp_avg_sq"):
                assert np.array_equal(read_state(root, catalog, name, state), truth[f"{state}/{name}"][1])


@pytest.mark.parametrize("case", [STAGE_1, STAGE_3], ids=lambda case: case.name)
def test_trap_6_one_folder_for_every_stage(deepspeed_case: DeepSpeedCase, tmp_path: Path, case: Any) -> None:
    """Each stage globs for its own model file and reads its own keys; one folder has what each of them wants."""
    convert(str(deepspeed_case(case) / "ckpt"), str(tmp_path / "new"), to="deepspeed-universal")
    folder = tmp_path / "new" / (tmp_path / "new" / "latest_universal").read_text()
    assert len(list(folder.glob("mp_rank_*_model_states.pt"))) == 1
    assert len(list(folder.glob("zero_pp_rank_0_mp_rank_*_model_states.pt"))) == 1
    parameter = folder / "zero" / "blocks.0.up.weight"
    for state in ("fp32", "exp_avg", "exp_avg_sq"):
        held = torch.load(parameter / f"{state}.pt", weights_only=True)
        assert (held["param"].shape, held["cat_dim"]) == ((53, 33), 0)
    assert torch.load(parameter / "step.pt", weights_only=True).item() == 3
    state = torch.load(folder / "zero" / "optimizer_state.pt", weights_only=False)
    assert {"ds_version", "param_groups", "optimizer_state_dict"} <= state.keys()
    assert state["optimizer_state_dict"]["state"][0]["step"] == 3


@pytest.mark.parametrize("name", ["z0_bf16_dp2", "z0_fp16_dp3"])
def test_trap_7_zero_0_in_16_bits(deepspeed_case: DeepSpeedCase, name: str) -> None:
    """Masters lie inside the model file, and the optimizer counted one step more than the engine: told, not refused."""
    folder = deepspeed_case(CASES[name])
    catalog, record = read(folder / "ckpt"), read_result(folder)
    parameters = [tensor for tensor in catalog.tensors.values() if tensor.kind == "parameter"]
    assert {tensor.states["value"].dtype for tensor in parameters} == {"float32"}
    assert set(catalog.witnesses) == {tensor.name for tensor in parameters}
    assert {n: t.scalars["step"].value for n, t in catalog.tensors.items() if "step" in t.scalars} == record["steps"]
    assert catalog.step == record["global_steps"]
    if set(record["steps"].values()) != {record["global_steps"]}:
        assert any("counted" in note for note in catalog.notes)


def test_trap_8_universal_checkpoint_info_is_not_needed(deepspeed_case: DeepSpeedCase, tmp_path: Path) -> None:
    """DeepSpeed's converter asks the user for it; where it is there it is client state like any other."""
    without = deepspeed_case(STAGE_1) / "ckpt"
    assert "universal_checkpoint_info" not in read(without).state["client_state"]
    convert(str(without), str(tmp_path / "new"), to="deepspeed-universal")
    given = read(deepspeed_case(ROUND_ROBIN) / "ckpt").state["client_state"]["universal_checkpoint_info"]
    assert given["universal_checkpoint_version"] == 0.2


def test_trap_8_experts_that_reserve_the_key_are_read() -> None:
    folder = in_corpus("ds_moe_z1_fp32_ep2dp2")
    root, truth = folder / "ckpt", load_truth(folder / "truth.safetensors")
    assert differences(root, read(root), truth) == []


def aliased_full_state(folder: Path) -> None:
    torch.manual_seed(0)
    moment = torch.randn(4, 4)
    state = {"layer.weight": {"step": torch.tensor(5.0), "exp_avg": moment, "exp_avg_sq": moment}}
    optimizer = {"state": state, "param_groups": [{"params": ["layer.weight"], "lr": 0.1}]}
    torch.save({"model": {"layer.weight": moment}, "optim": optimizer}, folder / "full_state.pt")


def dcp_folder(folder: Path) -> None:
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"model": {"w": torch.zeros(4, 4)}, "optim": {"step": 3}}, checkpoint_id=folder, no_dist=True)


def hugging_face_shards(folder: Path) -> None:
    info = {"w": {"saved_offsets": [0, 0]}}
    metadata = {"DCP_SHARDING_INFO": json.dumps(info), "DCP_VERSION": "1"}
    save_file({"w": torch.zeros(2, 4)}, folder / "shard-00001-model-00001-of-00001.safetensors", metadata)


def transformers_model(folder: Path) -> None:
    names = [f"model.layers.0.block_sparse_moe.experts.{n}.w1.weight" for n in range(2)]
    save_file({name: torch.zeros(2, 4) for name in names}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral"}))


def test_trap_9_moments_that_are_one_storage_are_remarked(tmp_path: Path) -> None:
    """torch's full state of FSDP1 on CPU has exp_avg equal to exp_avg_sq: read as it is, every state by its name."""
    aliased_full_state(tmp_path)
    with open_checkpoint(str(tmp_path / "full_state.pt")) as ckpt:
        held = ckpt.catalog.tensors["layer.weight"]
        assert set(held.states) == {"value", "exp_avg", "exp_avg_sq"}
        assert held.scalars["step"].value == 5


def test_trap_10_a_dcp_folder_is_one(tmp_path: Path) -> None:
    dcp_folder(tmp_path)
    with open_checkpoint(str(tmp_path)) as ckpt:
        assert (ckpt.catalog.source.family, ckpt["w"].shape) == ("dcp", (4, 4))


def test_trap_11_shards_that_may_not_be_all_are_refused_until_told(tmp_path: Path) -> None:
    hugging_face_shards(tmp_path)
    with pytest.raises(UsageError, match="do not tell whether these are all"):
        open_checkpoint(str(tmp_path))
    with open_checkpoint(str(tmp_path), ranks=1) as ckpt:
        assert ckpt["w"].shape == (2, 4)


def test_trap_12_names_of_files_are_kept(tmp_path: Path) -> None:
    transformers_model(tmp_path)
    with open_checkpoint(str(tmp_path)) as ckpt:
        assert "model.layers.0.block_sparse_moe.experts.1.w1.weight" in ckpt.catalog.tensors


def foreign_folders() -> list[str]:
    found = (p for p in sorted(CORPUS.glob("*/*")) if p.is_dir() and not p.parent.name.startswith("ds_"))
    return [str(path.relative_to(CORPUS)) for path in found] or ["fsdp2tp_2x2/ckpt"]


@pytest.mark.parametrize("name", foreign_folders())
def test_traps_9_to_12_in_the_corpus(name: str) -> None:
    """Every folder of another framework is read, and what of it has the truth's names equals the truth."""
    folder = in_corpus(name)
    if name.endswith("ckpt_local"):
        with pytest.raises(NotFoundError, match="several files"):
            open_checkpoint(str(folder))
        return
    truth = load_truth(folder.parent / "truth.safetensors")
    with open_checkpoint(str(folder)) as ckpt:
        compared = 0
        for entry, (dtype, bits) in truth.items():
            kind, _, tensor = entry.partition("/")
            state = kind if kind in ("exp_avg", "exp_avg_sq") else "value"
            held = ckpt.catalog.tensors.get(ckpt.catalog.ties.get(tensor, tensor))
            if kind == "lowp" or held is None or state not in held.states or held.states[state].dtype != dtype:
                continue
            cover = ckpt.catalog.cover(tensor, state)
            raw = read_region(open_store(str(folder)), cover, FlatRange(0, cover.spec.size))
            assert np.array_equal(raw.view(bits.dtype), bits.reshape(-1)), entry
            compared += 1
        assert compared > 20 or name.startswith("mc_"), "Megatron's tensors have logical names here"
        assert len(ckpt.catalog.tensors) > 20
