"""Files of Megatron-LM before Megatron-Core, EMULATED: a real job's, tensors renamed and rearranged as sources say."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.converters.megatron.read_jobs import OLD, PLAIN, assert_holds, catalog_of, edit, truth
from tests.programs.megatron import emulated
from tests.support.megatron import Model
from tests.support.megatron_trained import ITERATION
from ucp.converters._megatron.groups import Parameter, members, param_groups
from ucp.converters.megatron import CONVERTER
from ucp.errors import FitError
from ucp.store import open_store

FOLDER = f"iter_{ITERATION:07d}"


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """As ``state_dict_for_save_checkpoint`` nests them: parts of the language model in dicts, a stack's names flat."""
    found: dict[str, Any] = {}
    for name, tensor in flat.items():
        first, *rest = name.split(".", 2 if name.startswith("language_model.") else 1)
        place = found.setdefault(first, {})
        for part in rest[:-1]:
            place = place.setdefault(part, {})
        place[rest[-1]] = tensor
    return found


def tensors(held: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in held["model"].items() if torch.is_tensor(tensor)}


def each_rank(root: Path, change: Any) -> None:
    for path in sorted(root.glob(f"{FOLDER}/*/model_optim_rng.pt")):
        edit(path, change)


def test_names_before_megatron_core(trained, tmp_path):
    """`encoder`, and a copy of the embedding in the last stage."""
    root = Path(shutil.copytree(trained[PLAIN.name].checkpoint("legacy"), tmp_path / "root"))
    each_rank(root, lambda held: held.update(model=nested(emulated.legacy(tensors(held), PLAIN.model))))
    assert CONVERTER.sharded(open_store(str(root))).program == "megatron_legacy"
    assert_holds(*catalog_of(root), truth(trained[PLAIN.name]))


@pytest.mark.parametrize(("version", "order"), [(None, "kind"), (0, "kind"), (1.0, "element"), (2.0, None)])
def test_versions_of_2021(trained, tmp_path, version, order):
    """The version says in which order rows of queries, keys and values lie, in masters and moments too."""
    root = Path(shutil.copytree(trained[OLD.name].checkpoint("legacy"), tmp_path / "root"))

    def change(held: dict[str, Any]) -> None:
        flat = emulated.of_2021(tensors(held), OLD.model)
        masters = held["optimizer"]["fp32_from_fp16_params"]
        groups = held["optimizer"]["optimizer"]["param_groups"]
        for number, group in enumerate(groups):
            names = [name for name, tensor in flat.items() if (tensor.dim() == 1) == bool(number)]
            for place, (name, index) in enumerate(zip(names, group["params"], strict=True)):
                if order and "query_key_value" in name:
                    masters[number][place] = rows(masters[number][place], OLD.model, order)
                    state = held["optimizer"]["optimizer"]["state"][index]
                    state.update({key: rows(state[key], OLD.model, order) for key in ("exp_avg", "exp_avg_sq")})
                    flat[name] = rows(flat[name], OLD.model, order)
            kept = {key: value for key, value in group.items() if key in ("params", "lr", "weight_decay", "betas")}
            group.clear()
            group.update(kept)
        held["model"] = nested(flat)
        held.pop("checkpoint_version")
        held.update({} if version is None else {"checkpoint_version": version})
        held["optimizer"]["fp32_from_fp16"] = held["optimizer"].pop("fp32_from_fp16_params")

    each_rank(root, change)
    catalog, store = catalog_of(root)
    assert_holds(catalog, store, truth(trained[OLD.name]))
    assert {group.options["weight_decay"] for group in catalog.param_groups} == {0.0, 0.1}


def rows(tensor: torch.Tensor, model: Model, order: str) -> torch.Tensor:
    """Rows of a fused projection in another order."""
    exact = tensor.detach().float().numpy()
    (made,) = emulated.rearranged({"query_key_value": exact}, model, order).values()
    return torch.from_numpy(made.copy()).to(tensor.dtype)


def test_a_version_that_never_was(trained, tmp_path):
    root = Path(shutil.copytree(trained[PLAIN.name].checkpoint("legacy"), tmp_path / "root"))

    def change(held: dict[str, Any]) -> None:
        held.update(model=nested(emulated.legacy(tensors(held), PLAIN.model)), checkpoint_version=1.0)

    each_rank(root, change)
    with pytest.raises(FitError, match="checkpoint_version 1"):
        catalog_of(root)


def test_tensors_that_no_program_knows(trained, tmp_path):
    root = Path(shutil.copytree(trained[OLD.name].checkpoint("legacy"), tmp_path / "root"))
    each_rank(root, lambda held: held.update(model={f"mine.{name}": t for name, t in tensors(held).items()}))
    with pytest.raises(FitError, match="no program is shipped"):
        catalog_of(root)


def test_model_and_optimizer_apart(trained, tmp_path):
    """The layout of late 2022."""
    root = Path(shutil.copytree(trained[OLD.name].checkpoint("legacy"), tmp_path / "root"))
    for path in root.glob(f"{FOLDER}/*/model_optim_rng.pt"):
        path.rename(path.with_name("model_rng.pt"))
        (path.parent / "optim.pt").write_bytes(b"")
    assert CONVERTER.detect(open_store(str(root)))
    with pytest.raises(FitError, match="late 2022"):
        catalog_of(root)


WEIGHT, NORM = Parameter("layers.0.mlp.weight", 2), Parameter("layers.0.norm.weight", 1)
QK, TABLE = Parameter("layers.0.q_layernorm.weight", 1), Parameter("embedding.word_embeddings.weight", 2)
SPREAD = Parameter("layers.0.experts.weight", 2, expert=True)


def test_groups_are_told_by_what_they_say():
    groups = [{"wd_mult": 1.0}, {"wd_mult": 0.0}, {"wd_mult": 1.0, "is_expert_parallel": True}]
    assert members(groups, [WEIGHT, NORM, QK, SPREAD]) == [[WEIGHT], [NORM, QK], [SPREAD]]
    assert members(groups, [WEIGHT, NORM, QK, SPREAD], decay_qk=True) == [[WEIGHT, QK], [NORM], [SPREAD]]


def test_embeddings_with_a_learning_rate_of_their_own():
    groups = [{"wd_mult": 1.0}, {"wd_mult": 0.0}, {"wd_mult": 1.0, "is_decoupled_lr": True}]
    assert members(groups, [TABLE, WEIGHT, NORM]) == [[WEIGHT], [NORM], [TABLE]]
    groups[2] = {"wd_mult": 1.0, "default_config": False, "max_lr": 0.1}
    assert members(groups, [TABLE, WEIGHT, NORM]) == [[WEIGHT], [NORM], [TABLE]]


def test_groups_that_nothing_tells_apart():
    groups = [{"wd_mult": 1.0, "lr": 0.1}, {"wd_mult": 1.0, "lr": 0.2}, {"wd_mult": 0.0}]
    assert members(groups, [WEIGHT, NORM]) is None
    assert param_groups(groups, [WEIGHT, NORM]) is None
    assert members([{"wd_mult": 1.0}, {"wd_mult": 1.0, "is_expert_parallel": True}], [WEIGHT, NORM]) is None


def test_hyper_parameters_of_groups_that_nothing_tells_apart_are_carried(trained, tmp_path):
    root = Path(shutil.copytree(trained[PLAIN.name].checkpoint("plain"), tmp_path / "root"))

    def change(held: dict[str, Any]) -> None:
        first = held["optimizer"]["optimizer"]["param_groups"][0]
        held["optimizer"]["optimizer"]["param_groups"].append({**first, "lr": 7.0})

    edit(root / FOLDER / "common.pt", change)
    catalog, _ = catalog_of(root)
    assert not catalog.param_groups
    assert catalog.state["optimizer_param_groups"][0][2]["lr"] == 7.0
    assert any("nothing tells" in note for note in catalog.notes)
