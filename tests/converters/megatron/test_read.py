"""Checkpoints of real Megatron-Core jobs, in every format, against what their optimizers held."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.converters.megatron.read_jobs import (
    DENSE,
    EXPERTS,
    HALF,
    INTERLEAVED,
    JOBS,
    PLAIN,
    SEVERAL,
    SLOW_JOBS,
    array_of,
    assert_holds,
    catalog_of,
    truth,
)
from tests.support.megatron_trained import ITERATION, Format, Job, Trained
from ucp.converter import find_converter, read_catalog
from ucp.converters.megatron import CONVERTER
from ucp.errors import ConflictError
from ucp.layout import Box
from ucp.plan import Key
from ucp.run.convert import convert
from ucp.store import open_store
from ucp.training import progress

MISPLACED = {(INTERLEAVED.name, "fully_reshardable"), (SEVERAL.name, "fully_reshardable")}
"""Where buffers have several buckets, Megatron-Core 0.16.1 writes fully_reshardable from the wrong places."""


def _cases(jobs: tuple[Job, ...]) -> list[Any]:
    pairs = [(job, form) for job in jobs for form in job.formats if (job.name, form) not in MISPLACED]
    return [pytest.param(job, form, id=f"{job.name}-{form}") for job, form in pairs]


def _whole(trained: Trained, form: Format, folder: Path) -> None:
    catalog, store = catalog_of(trained.checkpoint(form))
    assert_holds(catalog, store, truth(trained))
    convert(str(trained.checkpoint(form)), str(folder / "universal"), workers=1)
    assert_holds(*read_catalog(str(folder / "universal")), truth(trained))


@pytest.mark.parametrize(("job", "form"), _cases(JOBS))
def test_every_state_is_what_the_optimizer_holds(trained, job, form, tmp_path):
    _whole(trained[job.name], form, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("job", "form"), _cases(SLOW_JOBS))
def test_every_state_is_what_the_optimizer_holds_long(trained_long, job, form, tmp_path):
    _whole(trained_long[job.name], form, tmp_path)


def test_masters_that_are_not_the_weights_are_an_error(trained, tmp_path):
    """Megatron-Core's own mistake: it reads a shared embedding as many elements too far as padding comes before it."""
    with pytest.raises(ConflictError, match=r"embed\.weight"):
        convert(str(trained[INTERLEAVED.name].checkpoint("fully_reshardable")), str(tmp_path / "out"), workers=1)


@pytest.mark.slow
def test_masters_of_several_buckets_that_are_not_the_weights_are_an_error(trained_long, tmp_path):
    with pytest.raises(ConflictError, match="copy"):
        convert(str(trained_long[SEVERAL.name].checkpoint("fully_reshardable")), str(tmp_path / "out"), workers=1)


@pytest.mark.parametrize("form", DENSE.formats)
def test_a_root_and_the_folder_in_it_are_found(trained, form):
    root = trained[DENSE.name].checkpoint(form)
    for place in (root, root / f"iter_{ITERATION:07d}"):
        found, store = find_converter(str(place))
        assert found.family == "megatron"
        assert CONVERTER.read(store).step == ITERATION


@pytest.mark.parametrize("form", DENSE.formats)
def test_low_precision_weights_are_witnesses_of_masters(trained, form):
    catalog, _ = catalog_of(trained[DENSE.name].checkpoint(form))
    assert set(catalog.witnesses) == set(catalog.tensors)
    assert {spec.dtype for spec, _ in catalog.witnesses.values()} == {"bfloat16"}
    assert {tensor.states["value"].dtype for tensor in catalog.tensors.values()} == {"float32"}


@pytest.mark.parametrize(("job", "form"), _cases((DENSE, EXPERTS, PLAIN)))
def test_param_groups_are_told_by_parameter(trained, job, form):
    catalog, _ = catalog_of(trained[job.name].checkpoint(form))
    decayed = {name for group in catalog.param_groups if group.options["wd_mult"] == 1.0 for name in group.params}
    plain = {name for group in catalog.param_groups if group.options["wd_mult"] == 0.0 for name in group.params}
    assert decayed == {name for name, tensor in catalog.tensors.items() if len(tensor.states["value"].shape) > 1}
    assert decayed | plain == set(catalog.tensors)
    assert not decayed & plain
    spread = {n for group in catalog.param_groups if group.options["is_expert_parallel"] for n in group.params}
    assert spread == {name for name in catalog.tensors if name.split(".")[-1] in ("gate", "up", "down")}


@pytest.mark.parametrize(("job", "form"), _cases((DENSE, EXPERTS, PLAIN, HALF)))
def test_progress_of_training(trained, job, form):
    catalog, _ = catalog_of(trained[job.name].checkpoint(form))
    told = progress(catalog)
    assert (told.iteration, told.consumed_samples) == (ITERATION, 48)
    assert isinstance(told.lr_scheduler, Mapping)
    assert told.lr_scheduler["num_steps"] == ITERATION + 1
    assert {tensor.scalars["step"].value for tensor in catalog.tensors.values()} == {float(ITERATION)}
    assert catalog.state["args"]["num_layers"] == job.model.layers
    ranks = job.grid.tp * job.grid.pp * (job.grid.ep if form == "legacy" else 1)
    assert isinstance(told.rng, list) if ranks == 1 else len(told.rng["rank"]) == ranks


@pytest.mark.parametrize("form", HALF.formats)
def test_the_loss_scale_is_a_number(trained, form):
    catalog, _ = catalog_of(trained[HALF.name].checkpoint(form))
    assert catalog.state["loss_scale"]["scale"] == 1024.0


def test_stored_names(trained):
    """Keys of torch_dist as they are, layers stacked and the vocabulary padded."""
    catalog, store = catalog_of(trained[DENSE.name].checkpoint("dp_reshardable"), names="stored")
    logical, _ = catalog_of(trained[DENSE.name].checkpoint("dp_reshardable"))
    model = DENSE.model
    assert catalog.program is None
    assert catalog.tensors["embedding.word_embeddings.weight"].states["exp_avg"].shape == (112, model.hidden)
    stacked = array_of(catalog, store, "decoder.layers.mlp.linear_fc2.weight", "exp_avg")
    for layer in range(model.layers):
        found = array_of(logical, store, f"layers.{layer}.mlp.down.weight", "exp_avg")
        np.testing.assert_array_equal(found, stacked[layer])


@pytest.mark.parametrize("form", ["fully_reshardable", "dp_reshardable", "legacy"])
def test_a_slice_reads_its_own_bytes(trained, form):
    """An eighth of a tensor: of flat buckets no more is read than of tensors that are kept as they are."""
    catalog, store = catalog_of(trained[DENSE.name].checkpoint(form))
    for state in ("value", "exp_avg"):
        cover = catalog.cover("layers.2.mlp.down.weight", state)
        rows, columns = cover.spec.shape
        read: list[int] = []
        plain = store.read_into

        def counted(path: str, offset: int, buffer: Any, plain: Any = plain, read: list[int] = read) -> None:
            read.append(len(memoryview(buffer).cast("B")))
            plain(path, offset, buffer)

        store.read_into = counted  # type: ignore[method-assign]
        try:
            array_of(catalog, store, "layers.2.mlp.down.weight", state, Box((0, 0), (rows // 8, columns)))
        finally:
            store.read_into = plain  # type: ignore[method-assign]
        assert sum(read) <= cover.spec.nbytes // 8 * 1.05


def test_a_logical_tensor_knows_the_program_that_made_it(trained):
    store = open_store(str(trained[EXPERTS.name].checkpoint("legacy")))
    sharded = CONVERTER.sharded(store)
    assert sharded.program == "megatron_core_moe"
    assert [dict(at) for at, _ in sharded.parts] == [
        {"pp": 0, "vpp": 0, "tp": 0, "ep": ep, "etp": 0} for ep in range(2)
    ]
    assert sharded.config["vocab"] == EXPERTS.model.vocab
    assert Key("embedding.word_embeddings.weight", "value") not in sharded.parts[1][1].fragments
