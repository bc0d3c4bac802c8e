"""Training goes on in real Megatron-Core from what was written, at other ranks, bit for bit.

A job trains and records what its ranks hold. That is the source; what was written of it is loaded by a job on another
grid, and, where Megatron-Core can do so, the first job's own checkpoint by a third: it must hold and compute the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.converters.megatron.write_recorded import recorded, written
from tests.converters.megatron.write_support import Job, Ran, run_jobs
from tests.programs.megatron.models import BIASED, GPT, LLAMA, MIXED, MIXTRAL, QWEN3, assert_same, logical
from tests.support.megatron import Grid, Model
from ucp.run.convert import convert

STATES = ("param", "exp_avg", "exp_avg_sq")
TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")
STEPS, MORE = 3, 2
EVEN = 112
"""A vocabulary that no number of ranks has to pad."""


def even(model: Model) -> Model:
    """With a vocabulary without padding: what is learned of padding is no part of a model, and changes losses."""
    return dataclasses.replace(model, vocab=EVEN)


@dataclasses.dataclass(frozen=True)
class Case:
    """A job that trains, and how it is gone on with."""

    model: Model
    source: Grid
    target: Grid
    form: str
    bf16: bool = True
    distributed: bool = True
    reloads: bool = True
    """Whether Megatron-Core itself loads the source at the target: not where experts begin or cease to be spread."""

    @property
    def name(self) -> str:
        kind = "distributed" if self.distributed else "float16" if self.bf16 else "fp32"
        return f"{self.model.name}-{self.source.name}-{self.target.name}-{self.form}-{kind}"

    @property
    def kind(self) -> dict[str, bool]:
        return {"bf16": self.bf16, "distributed": self.distributed}


PADDED = Case(LLAMA, Grid(tp=2), Grid(pp=2), "legacy", reloads=False)
FAST = [
    PADDED,
    Case(even(LLAMA), Grid(tp=2), Grid(pp=2), "torch_dist"),
]
SLOW = [
    Case(even(MIXTRAL), Grid(ep=2, dp=2), Grid(tp=2, etp=2), "legacy", reloads=False),
    Case(even(LLAMA), Grid(tp=2), Grid(tp=2, pp=2), "legacy"),
    Case(even(LLAMA), Grid(tp=2), Grid(pp=2), "torch_dist", distributed=False),
    Case(even(LLAMA), Grid(tp=2), Grid(pp=2), "legacy", distributed=False),
    Case(even(LLAMA), Grid(tp=2), Grid(pp=2, first_stage=1), "legacy"),
    Case(even(LLAMA), Grid(pp=2, first_stage=1), Grid(tp=2), "torch_dist"),
    Case(even(LLAMA), Grid(tp=2), Grid(pp=2, dp=2), "torch_dist", bf16=False, distributed=False),
    Case(even(LLAMA), Grid(tp=2), Grid(pp=2), "legacy", bf16=False, distributed=False),
    Case(even(GPT), Grid(tp=2), Grid(pp=2, vpp=2), "torch_dist"),
    Case(even(GPT), Grid(tp=2), Grid(pp=2, vpp=2), "legacy"),
    Case(even(GPT), Grid(tp=2), Grid(tp=2, pp=2), "legacy", distributed=False),
    Case(even(QWEN3), Grid(tp=2), Grid(pp=2), "torch_dist"),
    Case(even(MIXTRAL), Grid(ep=2, dp=2), Grid(tp=2, dp=2, ep=2, etp=2), "torch_dist"),
    Case(even(MIXTRAL), Grid(ep=2, dp=2), Grid(tp=2, dp=2, ep=2, etp=2), "legacy"),
    Case(even(MIXTRAL), Grid(ep=2, dp=2), Grid(tp=2, ep=2), "torch_dist"),
    Case(
        even(MIXTRAL), Grid(tp=2, etp=2), Grid(ep=2, dp=2), "torch_dist", bf16=False, distributed=False, reloads=False
    ),
    Case(even(BIASED), Grid(ep=2, dp=2), Grid(ep=2, dp=2), "legacy"),
    Case(even(BIASED), Grid(ep=2, dp=2), Grid(ep=2, dp=2, pp=2), "torch_dist"),
    Case(even(MIXED), Grid(tp=2, etp=2), Grid(ep=2, dp=2), "torch_dist", reloads=False),
    Case(even(MIXED), Grid(ep=2, dp=2), Grid(ep=2, dp=2, pp=2), "legacy"),
]


@dataclasses.dataclass(frozen=True)
class Went:
    """The job that trained, the one that went on with what was written, and one with Megatron-Core's own checkpoint."""

    trained: Ran
    on: Ran
    again: Ran | None


def go_on(cases: Sequence[Case], folder: Path) -> list[Went]:
    """Train, write, go on. Megatron-Core is started twice, whatever the number of cases."""
    places = [folder / str(number) for number in range(len(cases))]
    trained = run_jobs([first(case, place) for case, place in zip(cases, places, strict=True)])
    jobs: list[Job] = []
    for case, place, ran in zip(cases, places, trained, strict=True):
        catalog, store = recorded(ran, step=STEPS, checkpoint=place / "own")
        at = written(catalog, store, place / "made", case.target, form=case.form)
        on = Job(case.model, case.target, str(place / "on"), load=str(at), form=case.form, then=MORE, **case.kind)
        again = dataclasses.replace(on, out=str(place / "again"), load=str(place / "own"), form="torch_dist")
        jobs += [on, again] if case.reloads else [on]
    rest = iter(run_jobs(jobs))
    return [
        Went(ran, next(rest), next(rest) if case.reloads else None) for case, ran in zip(cases, trained, strict=True)
    ]


def first(case: Case, place: Path) -> Job:
    """The job that trains and saves."""
    out, own = str(place / "first"), str(place / "own")
    return Job(case.model, case.source, out, save=own, first=STEPS, then=MORE, **case.kind)


def options(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Hyper-parameters, without what only Transformer Engine's optimizer asks for."""
    return [{key: value for key, value in group.items() if key != "bias_correction"} for group in groups]


def check(case: Case, went: Went) -> None:
    """States bit for bit, and losses."""
    trained, on, again = went.trained, went.on, went.again
    for state in ("value", *STATES):
        assert_same(logical(case.model, on.arrays(state)), logical(case.model, trained.arrays(state)))
    if case.model.vocab == EVEN:
        np.testing.assert_allclose(on.losses, trained.losses, rtol=2e-4)
    if again is not None:
        assert on.shards.keys() == again.shards.keys()
        for at, held in again.shards.items():
            assert held.keys() == on.shards[at].keys()
            assert all(tensor.equal(on.shards[at][key]) for key, tensor in held.items())
        assert options(on.groups) == options(again.groups)
        assert on.losses == again.losses


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Went]:
    """All fast cases."""
    found = go_on(FAST, tmp_path_factory.mktemp("fast"))
    return {case.name: went for case, went in zip(FAST, found, strict=True)}


@pytest.mark.parametrize("case", FAST, ids=lambda case: case.name)
def test_training_goes_on(case, fast):
    check(case, fast[case.name])


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=lambda case: case.name)
def test_training_goes_on_everywhere(case, tmp_path):
    check(case, *go_on([case], tmp_path))


def test_padding_of_the_vocabulary_is_zero_whatever_was_learned_of_it(fast):
    on = fast[PADDED.name].on
    tables = [held[f"{s}/{n}"] for held in on.shards.values() for s in STATES for n in TABLES if f"{s}/{n}" in held]
    assert len(tables) == 6
    assert all(table.shape[0] == 104 and not table[LLAMA.vocab :].any() for table in tables)


@pytest.mark.parametrize("case", FAST, ids=lambda case: case.name)
def test_by_way_of_the_universal_form(case, fast, tmp_path):
    """Megatron-Core's own checkpoint, read, kept and written: the same bytes as of what its ranks recorded."""
    place = Path(fast[case.name].on.job.load or "").parent.parent
    universal, made = tmp_path / "universal", tmp_path / "made"
    convert(str(place / "own"), str(universal))
    axes = ("tp", "pp", "vpp", "ep", "etp")
    mesh = {axis: case.target.mesh[axis] for axis in axes}
    convert(str(universal), str(made), to="megatron", mesh=mesh, to_flags={"te": False}, form=case.form)
    pattern = "*/*.distcp" if case.form == "torch_dist" else "*/*/distrib_optim.pt"
    files = sorted(path.relative_to(made) for path in made.glob(pattern))
    assert len(files) == case.target.tp * case.target.pp * case.target.ep
    for path in files:
        assert (made / path).read_bytes() == (place / "made" / path).read_bytes(), path


@pytest.mark.slow
def test_random_states_go_on_where_ranks_are_the_same(fast, tmp_path):
    trained = fast[PADDED.name].trained
    source = str(Path(trained.job.save or ""))
    jobs = []
    for form, grid in (("torch_dist", Grid(tp=2)), ("legacy", Grid(tp=2)), ("torch_dist", Grid(pp=2))):
        made, out = tmp_path / f"{form}-{grid.name}", str(tmp_path / f"{form}-{grid.name}-out")
        mesh = {"tp": grid.tp, "pp": grid.pp}
        convert(source, str(made), to="megatron", mesh=mesh, to_flags={"te": False}, form=form)
        jobs.append(Job(LLAMA, grid, out, load=str(made / "iter_0000003"), form=form))
    same, also, other = run_jobs(jobs)
    assert same.random == also.random == trained.random
    assert len(set(trained.random.values())) == 2
    assert not set(other.random.values()) & set(trained.random.values())
