"""The reader on checkpoints that real DeepSpeed writes here and now, against states taken from the running job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.converters.deepspeed.audit import audit_bytes, audit_entries
from tests.converters.deepspeed.oracle import differences, load_truth, read_state
from tests.real.conftest import DeepSpeedCase
from tests.support.case import Case
from tests.support.cases import CASES
from tests.support.deepspeed_job import read_result
from ucp.catalog import Catalog
from ucp.converters.deepspeed import CONVERTER
from ucp.store import open_store

READABLE = list(CASES)


def own_name(case: Case, name: str) -> str:
    """The name that a catalog has for a parameter: a tied layer's key is in no file of a pipeline without ZeRO."""
    plain = case.launcher == "pipeline" and case.stage == 0 and case.dtype == "fp32"
    return name.replace("tied_modules.embed.", "0.") if plain else name


def options(case: Case) -> dict[str, Any]:
    """ZeRO 0 in fp32 does not save which parameters are frozen, and shapes alone leave a choice in this model."""
    plain = case.stage == 0 and case.dtype == "fp32" and case.frozen
    return {"frozen": "adapter.*"} if plain else {}


class Opened:
    """One case: its folder, what was recorded of the job, and what was read."""

    def __init__(self, folder: Path, case: Case) -> None:
        self.case = case
        self.record = read_result(folder)
        self.root = folder / self.record["root"]
        self.truth = {own_name(case, key): held for key, held in load_truth(folder / "truth.safetensors").items()}
        self.catalog: Catalog = CONVERTER.read(open_store(str(self.root)), **options(case))


@pytest.fixture
def opened(deepspeed_case: DeepSpeedCase, request: pytest.FixtureRequest) -> Opened:
    return Opened(deepspeed_case(CASES[request.param]), CASES[request.param])


def every(names: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("opened", names, indirect=True)


def some(**wanted: Any) -> pytest.MarkDecorator:
    """All cases with these values."""
    names = [n for n in READABLE if all(getattr(CASES[n], key) == value for key, value in wanted.items())]
    assert names, wanted
    return every(names)


@every(READABLE)
def test_every_state_equals_the_jobs_own(opened: Opened) -> None:
    truth = dict(opened.truth)
    if opened.case.exclude_frozen:
        truth = {key: value for key, value in truth.items() if not key.startswith("frozen/")}
    if not opened.catalog.witnesses:
        assert opened.case.stage in (0, 3)
        truth = {key: value for key, value in truth.items() if not key.startswith("lowp/")}
    assert differences(opened.root, opened.catalog, truth) == []


@every(READABLE)
def test_every_byte_is_mapped_carried_or_padding(opened: Opened) -> None:
    assert audit_bytes(opened.root, opened.catalog) == []


@every(READABLE)
def test_every_entry_is_in_the_state(opened: Opened) -> None:
    assert audit_entries(opened.root, opened.catalog) == []


@every(READABLE)
def test_layout_step_and_ties(opened: Opened) -> None:
    catalog, record = opened.catalog, opened.record
    mesh = catalog.source.mesh
    assert (mesh["pp"], mesh["tp"], mesh["dp"]) == (record["layout"]["pp"], 1, record["layout"]["dp"])
    assert catalog.source.detail["zero_stage"] == opened.case.stage
    assert catalog.source.version == record["versions"]["deepspeed"]
    assert catalog.step == record["global_steps"]
    assert catalog.ties == record["shared"]


@every(READABLE)
def test_steps_are_those_of_the_optimizer(opened: Opened) -> None:
    counted = {n: t.scalars["step"].value for n, t in opened.catalog.tensors.items() if "step" in t.scalars}
    assert counted == {own_name(opened.case, name): step for name, step in opened.record["steps"].items()}


@every([name for name in READABLE if not CASES[name].elastic])
def test_trap_3_every_group_keeps_its_own_hyper_parameters(opened: Opened) -> None:
    groups = opened.catalog.param_groups
    expected = opened.record["groups"]
    names = [sorted(own_name(opened.case, name) for name in group["names"]) for group in expected]
    assert [sorted(group.params) for group in groups] == names
    for group, own in zip(groups, expected, strict=True):
        for name, value in own["hyper"].items():
            assert _plain(group.options[name]) == value, name


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@some(round_robin=True, parameter_alignment=False)
def test_trap_1_the_mapping_that_round_robin_breaks_is_not_believed(opened: Opened) -> None:
    assert any(note.startswith("round_robin_gradients") for note in opened.catalog.notes)


@some(launcher="engine", pipeline_stages=1)
def test_trap_4_buffers_are_read(opened: Opened) -> None:
    buffers = {name for name, tensor in opened.catalog.tensors.items() if tensor.kind == "buffer"}
    assert buffers == {"drift", "calls"}
    assert read_state(opened.root, opened.catalog, "calls", "value") == opened.truth["buffer/calls"][1]


@some(stage=0, launcher="engine")
def test_trap_7_masters_of_zero_0_are_found(opened: Opened) -> None:
    assert {t.states["value"].dtype for t in opened.catalog.tensors.values() if t.kind == "parameter"} == {"float32"}
    assert bool(opened.catalog.witnesses) == (opened.case.dtype != "fp32")


@some(universal_info=True)
def test_trap_8_universal_checkpoint_info_is_carried(opened: Opened) -> None:
    info = opened.catalog.state["client_state"]["universal_checkpoint_info"]
    assert info["universal_checkpoint_version"] == 0.2


@some(rich_client_state=True, launcher="engine")
def test_client_state_is_carried(opened: Opened) -> None:
    client = opened.catalog.state["client_state"]
    assert client["nested"] == {"list": [1, 2.5, None, True], "deep": {"tuple": (1, "two"), "set": {3, 4}}}
    assert client["args"].path == "argparse.Namespace"
    assert client["args"].attribute("hidden_size") == 33
    assert client["random_states"]["torch"].extent.dtype == "uint8"


@some(dtype="fp16", launcher="engine")
def test_loss_scale_is_carried(opened: Opened) -> None:
    optimizer = opened.catalog.state["optimizer"]
    scaler = optimizer.get("loss_scaler")
    scale = optimizer["cur_scale"] if scaler is None else scaler.attribute("cur_scale")
    assert scale == opened.record["loss_scale"]


@every([name for name in READABLE if CASES[name].launcher in ("trainer", "accelerate")])
def test_what_trainer_and_accelerate_save_is_carried(opened: Opened) -> None:
    around = opened.catalog.state["around"]
    ranks = [f"rng_state_{r}.pth" for r in range(opened.case.world)]
    if opened.case.launcher == "accelerate":
        ranks = [f"random_states_{r}.pkl" for r in range(opened.case.world)]
    assert {*ranks} <= around.keys()
    assert any(name.startswith("scheduler") for name in around)


@some(stage=0, dtype="fp32", frozen=True)
def test_parameters_that_shapes_leave_open_are_told_and_all_others_are_right(opened: Opened) -> None:
    catalog = CONVERTER.read(open_store(str(opened.root)))
    undecided = {name for name, tensor in catalog.tensors.items() if tensor.undecided}
    assert undecided == {"blocks.1.down.bias", "adapter.bias", "norm.weight", "norm.bias"}
    truth = {key: held for key, held in opened.truth.items() if not key.startswith("lowp/")}
    wrong = {found.partition(":")[0].removeprefix("frozen/") for found in differences(opened.root, catalog, truth)}
    assert wrong == undecided
    for name in undecided:
        kind = "frozen" if name == "adapter.bias" else "param"
        assert np.array_equal(read_state(opened.root, catalog, name, "value"), opened.truth[f"{kind}/{name}"][1])
    assert len(catalog.state["optimizer"]["unnamed"]) == 3
    assert audit_bytes(opened.root, catalog) == audit_entries(opened.root, catalog) == []


@some(launcher="pipeline", stage=0, tied=True)
def test_a_tied_layer_without_a_name_is_called_by_its_index(opened: Opened) -> None:
    assert any("tied layer is named by its index, 0" in note for note in opened.catalog.notes)
    assert not any(tensor.undecided for tensor in opened.catalog.tensors.values())
