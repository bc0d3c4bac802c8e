"""What is wrong with a Megatron checkpoint is said, with the file and the remedy, and no number comes out."""

from __future__ import annotations

import pickle
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.converters.megatron.read_jobs import DENSE, EXPERTS, INTERLEAVED, PLAIN, array_of, catalog_of, edit
from tests.support.megatron_trained import ITERATION, Format, Trained
from ucp.converters.megatron import CONVERTER
from ucp.errors import ConflictError, CorruptError, FitError, NotFoundError, UsageError
from ucp.run.convert import convert
from ucp.store import open_store

FOLDER = f"iter_{ITERATION:07d}"


@pytest.fixture
def copied(trained, tmp_path) -> Callable[[Any, Format], Path]:
    """A checkpoint of a job that may be changed."""

    def copy(job: Any, form: Format) -> Path:
        held: Trained = trained[job.name]
        return Path(shutil.copytree(held.checkpoint(form), tmp_path / form))

    return copy


def argued(path: Path, **changes: Any) -> None:
    """Change saved arguments."""

    def change(held: dict[str, Any]) -> None:
        held["args"] = Namespace(**{**vars(held["args"]), **changes})

    edit(path, change)


def common(root: Path) -> Path:
    return root / FOLDER / "common.pt"


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"num_layers": 5}, CorruptError, "num_layers = 5"),
        ({"hidden_size": 64}, FitError, "hidden"),
        ({"num_query_groups": 4}, FitError, "groups"),
        ({"group_query_attention": False}, FitError, "groups"),
        ({"ffn_hidden_size": 80}, FitError, "ffn"),
        ({"vocab_size": 1000}, FitError, "vocab"),
        ({"swiglu": False}, FitError, "ffn"),
        ({"untie_embeddings_and_output_weights": False}, FitError, "tied"),
        ({"num_experts": 4}, FitError, "moe"),
        ({"tensor_model_parallel_size": 4}, FitError, "not how 4 ranks cut it"),
        ({"tensor_model_parallel_size": 1}, CorruptError, "model-parallel rank 1, but args say there were 1"),
        ({"pipeline_model_parallel_size": 2}, NotFoundError, "model-parallel rank 2"),
        ({"pipeline_model_parallel_layout": "Et|tL"}, FitError, "pipeline_model_parallel_layout"),
        ({"tensor_model_parallel_size": 0}, CorruptError, "tensor_model_parallel_size"),
        ({"expert_tensor_parallel_size": -1}, CorruptError, "expert_tensor_parallel_size"),
        ({"tensor_model_parallel_size": 10**10}, CorruptError, "tp 10000000000"),
        ({"pipeline_model_parallel_size": 10**10}, CorruptError, "pp 10000000000"),
        ({"data_parallel_size": 10**10}, CorruptError, "dp 10000000000"),
        ({"num_experts": 10**10}, CorruptError, "10000000000 experts"),
        ({"expert_tensor_parallel_size": 10**10}, CorruptError, "etp 10000000000"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_arguments_that_contradict_tensors(copied, changes, error, said):
    root = copied(DENSE, "dp_reshardable")
    argued(common(root), **changes)
    with pytest.raises(error, match=said):
        catalog_of(root)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"tensor_model_parallel_size": 4}, NotFoundError, "no folder of tp 2"),
        ({"tensor_model_parallel_size": 1}, CorruptError, "a folder of tp 1"),
        ({"pipeline_model_parallel_size": 2}, CorruptError, "2 stages"),
        ({"num_query_groups": 4}, FitError, "groups"),
        ({"hidden_size": 64}, FitError, "hidden"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_arguments_that_contradict_rank_folders(copied, changes, error, said):
    root = copied(DENSE, "legacy")
    argued(root / FOLDER / "mp_rank_00" / "model_optim_rng.pt", **changes)
    with pytest.raises(error, match=said):
        catalog_of(root)


def test_a_missing_rank_folder(copied):
    root = copied(DENSE, "legacy")
    shutil.rmtree(root / FOLDER / "mp_rank_01")
    with pytest.raises(NotFoundError, match="no folder of tp 1"):
        catalog_of(root)


def test_a_folder_too_many(copied):
    root = copied(DENSE, "legacy")
    shutil.copytree(root / FOLDER / "mp_rank_01", root / FOLDER / "mp_rank_02")
    with pytest.raises(CorruptError, match="a folder of tp 2"):
        catalog_of(root)


@pytest.mark.parametrize("job", [DENSE, EXPERTS], ids=lambda job: job.name)
def test_missing_optimizer_states_of_a_rank(copied, job):
    root = copied(job, "legacy")
    last = max((root / FOLDER).iterdir())
    (last / "distrib_optim.pt").unlink()
    with pytest.raises(NotFoundError, match=r"distrib_optim\.pt"):
        catalog_of(root)


def test_ranks_of_two_iterations(copied):
    root = copied(DENSE, "legacy")
    edit(root / FOLDER / "mp_rank_01" / "model_optim_rng.pt", lambda held: held.update(iteration=7))
    with pytest.raises(ConflictError, match="iteration 7"):
        catalog_of(root)


@pytest.mark.parametrize("form", ["fully_reshardable", "legacy"])
def test_a_folder_of_another_iteration(copied, form):
    root = copied(DENSE, form)
    (root / FOLDER).rename(root / "iter_0000009")
    (root / "latest_checkpointed_iteration.txt").write_text("9")
    with pytest.raises(ConflictError, match="iteration 3"):
        catalog_of(root)


def test_the_tracker_file(copied):
    root = copied(DENSE, "fully_reshardable")
    tracker = root / "latest_checkpointed_iteration.txt"
    tracker.write_text("12")
    assert not CONVERTER.detect(open_store(str(root)))
    with pytest.raises(NotFoundError, match="iter_0000012"):
        catalog_of(root)
    assert catalog_of(root, iteration=ITERATION)[0].step == ITERATION
    tracker.write_text("../../elsewhere")
    with pytest.raises(CorruptError, match="no iteration"):
        catalog_of(root)


def test_a_release_has_no_iteration(copied):
    root = copied(DENSE, "fully_reshardable")
    (root / FOLDER).rename(root / "release")
    (root / "latest_checkpointed_iteration.txt").write_text("release")
    assert catalog_of(root)[0].step == ITERATION


def test_options(copied):
    root = copied(DENSE, "legacy")
    with pytest.raises(UsageError, match="unknown option 'tag'"):
        catalog_of(root, tag="5")
    with pytest.raises(UsageError, match="names"):
        catalog_of(root, names="mine")
    with pytest.raises(FitError, match="2 ranks"):
        catalog_of(root, names="stored")
    with pytest.raises(FitError, match="vocab"):
        catalog_of(root, vocab=4000)


@pytest.mark.parametrize("form", ["fully_reshardable", "legacy"])
def test_a_vocabulary_that_is_not_recorded_keeps_its_padding(copied, form):
    root = copied(DENSE, form)
    place = common(root) if form != "legacy" else root / FOLDER / "mp_rank_00" / "model_optim_rng.pt"
    argued(place, vocab_size=None)
    catalog, store = catalog_of(root)
    assert catalog.tensors["embed.weight"].states["value"].shape[0] == 112
    assert any("vocab=N" in note for note in catalog.notes)
    given, _ = catalog_of(root, vocab=103)
    assert given.tensors["embed.weight"].states["value"].shape[0] == 103
    assert not array_of(catalog, store, "embed.weight", "value")[103:].any()


def test_copies_of_a_norm_that_differ(copied, tmp_path):
    """Every tensor-parallel rank has the norms: masters, weights and all."""
    root = copied(PLAIN, "legacy")

    def change(held: dict[str, Any]) -> None:
        norm = held["model"]["decoder.final_layernorm.weight"]
        masters = [master for group in held["optimizer"]["fp32_from_fp16_params"] for master in group]
        (own,) = [m for m in masters if m.shape == norm.shape and torch.equal(m.to(norm.dtype), norm)]
        norm[3] = own[3] = 5.0

    edit(root / FOLDER / "mp_rank_01_001" / "model_optim_rng.pt", change)
    with pytest.raises(ConflictError, match=r"norm\.weight"):
        convert(str(root), str(tmp_path / "out"), workers=1)


def test_the_last_stages_copy_of_a_tied_embedding_that_differs(copied, tmp_path):
    root = copied(PLAIN, "legacy")

    def change(held: dict[str, Any]) -> None:
        head = held["model"]["output_layer.weight"]
        head[2, 2] = 5.0
        (master,) = [m for group in held["optimizer"]["fp32_from_fp16_params"] for m in group if m.shape == head.shape]
        master[2, 2] = 5.0

    edit(root / FOLDER / "mp_rank_00_001" / "model_optim_rng.pt", change)
    with pytest.raises(ConflictError, match=r"embed\.weight"):
        convert(str(root), str(tmp_path / "out"), workers=1)


def test_expert_parallel_ranks_that_differ_in_what_is_no_expert(copied):
    root = copied(EXPERTS, "legacy")

    def change(held: dict[str, Any]) -> None:
        held["model"]["decoder.final_layernorm.weight"][3] = 5.0

    edit(root / FOLDER / "mp_rank_00_001" / "model_optim_rng.pt", change)
    with pytest.raises(ConflictError, match=r"final_layernorm\.weight"):
        catalog_of(root)


def test_masters_in_another_order(copied):
    root = copied(PLAIN, "legacy")

    def change(held: dict[str, Any]) -> None:
        held["optimizer"]["fp32_from_fp16_params"][0].reverse()

    edit(root / FOLDER / "mp_rank_00_000" / "model_optim_rng.pt", change)
    with pytest.raises(CorruptError, match="param"):
        catalog_of(root)


def test_a_buffer_of_another_model(copied):
    root = copied(DENSE, "legacy")

    def change(held: dict[str, Any]) -> None:
        (states,) = held[0].values()
        states.update({name: tensor[:-64] for name, tensor in states.items() if torch.is_tensor(tensor)})

    edit(root / FOLDER / "mp_rank_01" / "distrib_optim.pt", change)
    with pytest.raises(CorruptError, match="buffer of"):
        catalog_of(root)


def test_flat_tensors_of_before_2024(copied):
    root = copied(DENSE, "legacy")
    edit(root / FOLDER / "mp_rank_00" / "distrib_optim.pt", lambda held: held.pop("buckets_coalesced"))
    with pytest.raises(FitError, match="February 2024"):
        catalog_of(root)


def metadata(root: Path, change: Callable[[Any], None]) -> None:
    """Change the ``.metadata`` of a torch_dist checkpoint."""
    path = root / FOLDER / ".metadata"
    held = pickle.loads(path.read_bytes())
    change(held)
    path.write_bytes(pickle.dumps(held))


def forget(held: Any, wanted: Callable[[str], bool]) -> None:
    held.state_dict_metadata = {key: entry for key, entry in held.state_dict_metadata.items() if not wanted(key)}
    held.storage_data = {index: info for index, info in held.storage_data.items() if not wanted(index.fqn)}


def test_buckets_of_a_rank_that_are_missing(copied):
    root = copied(DENSE, "dp_reshardable")
    metadata(root, lambda held: forget(held, lambda key: ".dp_group_idx_1." in key))
    with pytest.raises(NotFoundError, match="model-parallel rank 1"):
        catalog_of(root)


def test_buckets_of_all_experts_that_are_missing(copied):
    root = copied(EXPERTS, "dp_reshardable")
    metadata(root, lambda held: forget(held, lambda key: key.startswith("chained_1.")))
    with pytest.raises(NotFoundError, match="model-parallel rank 0"):
        catalog_of(root)


def test_a_bucket_that_is_missing(copied):
    root = copied(INTERLEAVED, "dp_reshardable")
    metadata(
        root, lambda held: forget(held, lambda key: ".dp_group_idx_0.gbuf_idx_0." in key and "bucket_idx_0" in key)
    )
    with pytest.raises(CorruptError, match="buckets at"):
        catalog_of(root)


def test_a_module_that_is_not_known(copied):
    """Where nothing but the order of modules tells what is what, a layer that is not known is refused."""
    from dataclasses import replace

    root = copied(DENSE, "dp_reshardable")

    def change(held: Any) -> None:
        old, new = "decoder.layers.mlp.linear_fc2.weight", "decoder.layers.mlp.latent.weight"
        named = {old: new}
        held.state_dict_metadata = {named.get(key, key): entry for key, entry in held.state_dict_metadata.items()}
        held.storage_data = {
            replace(index, fqn=named.get(index.fqn, index.fqn)): info for index, info in held.storage_data.items()
        }

    metadata(root, change)
    with pytest.raises(FitError, match=r"latent\.weight"):
        catalog_of(root)


def test_states_of_another_shape(copied):
    root = copied(DENSE, "fully_reshardable")

    def change(held: Any) -> None:
        entry = held.state_dict_metadata["optimizer.state.exp_avg.decoder.final_layernorm.weight"]
        entry.size = torch.Size([50])

    metadata(root, change)
    with pytest.raises(CorruptError, match="final_layernorm"):
        catalog_of(root)


def test_a_lost_file(copied):
    root = copied(DENSE, "dp_reshardable")
    (root / FOLDER / "__1_0.distcp").unlink()
    with pytest.raises(NotFoundError, match=r"__1_0\.distcp"):
        catalog_of(root)


@pytest.mark.parametrize(
    "change",
    [
        lambda held: held.update({0: "x"}),
        lambda held: held.update({0: {("a", "b"): 3}}),
        lambda held: held.update({0: {3: next(iter(held[0].values()))}}),
        lambda held: next(iter(held[0].values())).pop("param"),
    ],
    ids=["no buffer", "no tensors", "no dtypes", "no masters"],
)
def test_flat_buffers_that_are_none(copied, change):
    root = copied(DENSE, "legacy")
    edit(root / FOLDER / "mp_rank_01" / "distrib_optim.pt", change)
    with pytest.raises(CorruptError, match="buffer"):
        catalog_of(root)


@pytest.mark.parametrize("optimizer", [3.5, None, "x"])
def test_an_optimizer_that_is_none(copied, optimizer):
    root = copied(DENSE, "fully_reshardable")
    edit(common(root), lambda held: held.update(optimizer=optimizer))
    if optimizer is not None:
        with pytest.raises(CorruptError, match="optimizer"):
            catalog_of(root)
        return
    assert any("holds no optimizer" in note for note in catalog_of(root)[0].notes)


def test_an_iteration_that_is_no_number(copied):
    root = copied(DENSE, "fully_reshardable")
    edit(common(root), lambda held: held.update(iteration=[3]))
    with pytest.raises(CorruptError, match="iteration"):
        catalog_of(root)


@pytest.mark.parametrize("text", ["\u00b3", "9" * 5000, "../x", ""])
def test_a_tracker_that_names_no_iteration(copied, text):
    root = copied(DENSE, "legacy")
    (root / "latest_checkpointed_iteration.txt").write_text(text)
    store = open_store(str(root))
    assert not CONVERTER.detect(store)
    with pytest.raises(CorruptError, match="is no iteration"):
        CONVERTER.read(store)
