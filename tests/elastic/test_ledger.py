"""The ledger of the elastic demo finds whatever is injected, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ucp.demo.elastic.ledger import Account, Strike, account, newest
from ucp.demo.elastic.records import End, Reader, Record, Recorder, Resume, Start, Step, parsed, read
from ucp.errors import UcpError

SAMPLES, DATA = 6, 30
TOLERANCE = 1e-9


def samples_of(step: int) -> list[int]:
    return [(step * SAMPLES + number) * 7 % DATA for number in range(SAMPLES)]


def loss_of(sample: int, step: int) -> float:
    return 1.0 / (1 + step) + sample / 1000


@dataclass(frozen=True)
class Life:
    """One epoch: `ranks` on each of `tp`, going on `back` steps before where the last one was, for `steps` steps."""

    ranks: int
    tp: int
    back: int
    steps: int
    loads: bool = True


LIVES = st.builds(Life, st.integers(1, 5), st.integers(1, 2), st.integers(0, 4), st.integers(0, 6), st.booleans())


def job(lives: Sequence[Life], last: int) -> list[Record]:
    """Records of a job with those lives, and one more that brings it to `last`."""
    records: list[Record] = []
    states: dict[int, tuple[tuple[int, int], ...]] = {0: ()}
    clock, done = 0.0, 0
    for epoch, life in enumerate([*lives, Life(2, 1, 1, last)], 1):
        begun = max(step for step in states if step <= max(0, done - life.back))
        history = (*states[begun], (epoch, begun))
        until = min(last, begun + life.steps)
        ranks = [
            {"node": "n", "pid": epoch * 100 + rank, "epoch": epoch, "rank": rank, "dp": rank // life.tp}
            for rank in range(life.ranks * life.tp)
        ]
        clock += 10
        world = {"world": len(ranks), "mesh": {"dp": life.ranks, "tp": life.tp}, "spare": False}
        records += [Start(time=clock, **who, **world) for who in ranks]
        if epoch > len(lives) or life.loads:
            records += [
                Resume(time=clock + 1, **who, step=begun, tier="memory", reconfigured=False, history=history, parts={})
                for who in ranks
            ]
            for step in range(begun + 1, until + 1):
                clock += 1
                shares = [samples_of(step)[who["dp"] :: life.ranks] for who in ranks]
                records += [
                    Step(
                        time=clock + 1,
                        **who,
                        step=step,
                        samples=tuple(share),
                        loss=sum(loss_of(sample, step) for sample in share),
                    )
                    for who, share in zip(ranks, shares, strict=True)
                ]
                states[step] = history
            done = max(done, until) if until > begun else done
            states = {step: state for step, state in states.items() if step <= max(begun, until)}
            done = max(states)
    records += [End(time=clock + 2, **who, step=last, history=history) for who in ranks]
    return records


def found(records: list[Record], last: int, strikes: Sequence[Strike] = ()) -> Account:
    return account(records, job([], last), strikes)


JOBS = st.tuples(st.lists(LIVES, max_size=5), st.integers(8, 20))


@settings(max_examples=40)
@given(JOBS)
def test_nothing_is_found_where_nothing_is_wrong(made: tuple[list[Life], int]) -> None:
    lives, last = made
    records = job(lives, last)
    result = found(records, last)
    assert result.broken(tolerance=TOLERANCE) == ()
    assert (result.steps, result.samples_missing, result.samples_repeated) == (last, 0, 0)
    assert len(result.worlds) == len({one.epoch for one in records if isinstance(one, Step)})
    assert all(recovery.seconds > 0 for recovery in result.recoveries)


def counting(records: list[Record], last: int) -> list[int]:
    """Places of the step records that the final state descends from, of ranks whose part no other one has."""
    end = next(record for record in records if isinstance(record, End))
    bounds = [*(step for _, step in end.history[1:]), last]
    places = []
    for (epoch, begun), until in zip(end.history, bounds, strict=True):
        places += [
            place
            for place, one in enumerate(records)
            if isinstance(one, Step) and one.epoch == epoch and begun < one.step <= until and one.samples
        ]
    twins = {(one.epoch, one.step, one.dp): 0 for one in records if isinstance(one, Step)}
    for one in records:
        if isinstance(one, Step):
            twins[one.epoch, one.step, one.dp] += 1
    return [place for place in places if twins[_key(records[place])] == 1]


def _key(record: Record) -> tuple[int, int, int]:
    assert isinstance(record, Step)
    return record.epoch, record.step, record.dp


@settings(max_examples=40)
@given(JOBS, st.data())
def test_a_skipped_sample_is_found(made: tuple[list[Life], int], data: st.DataObject) -> None:
    lives, last = made
    records = job(lives, last)
    place = data.draw(st.sampled_from(counting(records, last)))
    step = records[place]
    assert isinstance(step, Step)
    records[place] = replace(step, samples=step.samples[1:])
    result = found(records, last)
    assert (result.samples_missing, result.samples_repeated) == (1, 0)
    assert result.broken(tolerance=1.0) == ("1 samples missing",)


@settings(max_examples=40)
@given(JOBS, st.data())
def test_a_repeated_sample_is_found(made: tuple[list[Life], int], data: st.DataObject) -> None:
    lives, last = made
    records = job(lives, last)
    place = data.draw(st.sampled_from(counting(records, last)))
    step = records[place]
    assert isinstance(step, Step)
    records[place] = replace(step, samples=(*step.samples, step.samples[0]))
    result = found(records, last)
    assert (result.samples_missing, result.samples_repeated) == (0, 1)


@settings(max_examples=40)
@given(JOBS, st.data())
def test_a_sample_in_another_step_is_found_though_none_is_missing(
    made: tuple[list[Life], int], data: st.DataObject
) -> None:
    lives, last = made
    records = job(lives, last)
    places = counting(records, last)
    one = records[data.draw(st.sampled_from(places))]
    assert isinstance(one, Step)
    others = [
        place
        for place in places
        if isinstance(other := records[place], Step) and other.step != one.step and other.samples[0] != one.samples[0]
    ]
    assume(others)
    place = data.draw(st.sampled_from(others))
    other = records[place]
    assert isinstance(other, Step)
    records[records.index(one)] = replace(one, samples=(other.samples[0], *one.samples[1:]))
    records[place] = replace(other, samples=(one.samples[0], *other.samples[1:]))
    result = found(records, last)
    assert (result.samples_missing, result.samples_repeated) == (0, 0)
    # That of the other step may by chance be one that this step has anyway; then it is there twice.
    assert result.samples_misplaced == 2


@settings(max_examples=40)
@given(JOBS, st.data(), st.sampled_from([1e-3, -1e-3, nan]))
def test_a_wrong_loss_is_found(made: tuple[list[Life], int], data: st.DataObject, wrong: float) -> None:
    lives, last = made
    records = job(lives, last)
    place = data.draw(st.sampled_from(counting(records, last)))
    step = records[place]
    assert isinstance(step, Step)
    records[place] = replace(step, loss=step.loss + wrong)
    result = found(records, last)
    assert len(result.broken(tolerance=TOLERANCE)) == 1
    assert result.loss_difference != result.loss_difference or result.loss_difference == pytest.approx(1e-3 / SAMPLES)


@settings(max_examples=40)
@given(JOBS, st.data())
def test_a_lost_step_is_found(made: tuple[list[Life], int], data: st.DataObject) -> None:
    lives, last = made
    records = job(lives, last)
    one = records[data.draw(st.sampled_from(counting(records, last)))]
    assert isinstance(one, Step)
    kept = [
        other
        for other in records
        if not (isinstance(other, Step) and (other.epoch, other.step) == (one.epoch, one.step))
    ]
    result = found(kept, last)
    assert result.samples_missing == SAMPLES
    assert f"1 steps, {one.step} the first, were never done" in result.problems


@settings(max_examples=40)
@given(JOBS, st.data())
def test_a_rank_that_differs_from_its_twin_is_found(made: tuple[list[Life], int], data: st.DataObject) -> None:
    lives, last = made
    records = job([*lives, Life(2, 2, 0, 30)], last)
    end = next(record for record in records if isinstance(record, End))
    epochs = {epoch for epoch, _ in end.history}
    begun = dict(end.history)
    twins = [
        place
        for place, one in enumerate(records)
        if isinstance(one, Step)
        and one.epoch == len(lives) + 1
        and one.epoch in epochs
        and begun[one.epoch] < one.step < last
        and one.rank % 2
    ]
    if not twins:
        return
    place = data.draw(st.sampled_from(twins))
    step = records[place]
    assert isinstance(step, Step)
    records[place] = replace(step, loss=step.loss + 1)
    assert any("differ" in problem for problem in found(records, last).problems)


def test_ranks_that_go_on_from_different_states_are_found() -> None:
    records = job([Life(2, 1, 0, 4), Life(2, 1, 1, 4)], 12)
    place = next(place for place, one in enumerate(records) if isinstance(one, Resume) and one.epoch == 2)
    resume = records[place]
    assert isinstance(resume, Resume)
    records[place] = replace(resume, step=resume.step + 1)
    assert "ranks of epoch 2 went on from different states" in found(records, 12).problems


def test_a_job_that_has_no_end_is_told() -> None:
    records = [record for record in job([], 8) if not isinstance(record, End)]
    assert "the job has not come to its end" in found(records, 8).broken(tolerance=1)
    assert "undisturbed: the job has not come to its end" in account(job([], 8), records).problems


def test_a_start_that_left_no_trace_has_the_number_of_the_next_one() -> None:
    records = job([Life(2, 1, 0, 4)], 8)
    first = next(record for record in records if isinstance(record, Start) and record.epoch == 2)
    who = {"node": "n", "pid": 7, "epoch": 2, "rank": 5, "dp": 5, "time": first.time - 5}
    ghosts: list[Record] = [
        Start(**who, world=6, mesh={"dp": 6}, spare=False),
        Step(**who, step=5, samples=(1, 2), loss=1.0),
    ]
    assert found([*records, *ghosts], 8).broken(tolerance=TOLERANCE) == ()
    assert len(newest([*records, *ghosts])) == len(records)


def test_a_history_that_cannot_be_is_told() -> None:
    records = [
        replace(record, history=((1, 5), (2, 3))) if isinstance(record, End) else record for record in job([], 8)
    ]
    assert any("what cannot be" in problem for problem in found(records, 8).problems)


def test_recoveries_are_timed_from_the_blow_and_count_what_was_lost() -> None:
    records = job([Life(4, 2, 0, 6), Life(3, 1, 0, 0, loads=False)], 12)
    last = max(one.time for one in records if isinstance(one, Step) and one.epoch == 1)
    strikes = [
        Strike(time=last - 0.25, what="rank", node="n", rank=1),
        Strike(time=last + 5, what="node", node="n"),
        Strike(time=last + 6, what="start", node="n"),
    ]
    result = found(records, 12, strikes)
    assert (result.kills, result.worlds) == (2, (8, 2))
    (recovery,) = result.recoveries
    assert (recovery.steps_lost, recovery.step, recovery.attempts) == (1, 5, 2)
    assert (recovery.world_before, recovery.world) == (8, 2)
    first = min(one.time for one in records if isinstance(one, Step) and one.epoch == 3)
    assert recovery.seconds == pytest.approx(first - last + 0.25)
    assert sum(recovery.seen.values()) == pytest.approx(recovery.seconds)
    assert result.broken(tolerance=TOLERANCE, seconds=recovery.seconds / 2) == (
        f"1 recoveries took more than {recovery.seconds / 2} s",
    )


@pytest.mark.parametrize(
    ("strike", "words"),
    [
        (Strike(time=1, what="rank", node="a", rank=1, phase="forward"), "rank a.1 killed in forward"),
        (Strike(time=1, what="agent", node="a"), "agent of node a killed"),
        (Strike(time=1, what="node", node="a", phase="commit"), "node a killed in commit"),
        (Strike(time=1, what="cut", node="a"), "node a cut off"),
        (Strike(time=1, what="heal", node="a"), "node a reachable again"),
        (Strike(time=1, what="start", node="a"), "node a comes"),
    ],
)
def test_what_was_done_is_told_in_words(strike: Strike, words: str) -> None:
    assert strike.words == words


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "a")
    recorder.start(epoch=3, rank=1, world=2, mesh={"dp": 2}, dp=1)
    recorder.resume(step=4, tier="memory", reconfigured=True, history=[[1, 0], [3, 4]], parts={"read": 0.5})
    reader = Reader(tmp_path)
    assert len(list(reader.more())) == 2
    recorder.step(step=5, samples=[1, 2], loss=0.1 + 0.2)
    recorder.end(step=5, history=[[1, 0], [3, 4]])
    assert [type(record).__name__ for record in reader.more()] == ["Step", "End"]
    start, resume, step, end = read(tmp_path)
    assert (start.epoch, start.rank, start.dp, start.node) == (3, 1, 1, "a")
    assert isinstance(resume, Resume)
    assert isinstance(step, Step)
    assert isinstance(end, End)
    assert resume.history == end.history == ((1, 0), (3, 4))
    assert (step.samples, step.loss) == ((1, 2), 0.1 + 0.2)


def test_a_line_that_is_not_written_to_its_end_waits(tmp_path: Path) -> None:
    Recorder(tmp_path, "a").start(epoch=1, rank=0, world=1, mesh={})
    (file,) = (tmp_path / "records").iterdir()
    line = file.read_bytes()
    file.write_bytes(line + line[:20])
    reader = Reader(tmp_path)
    assert len(list(reader.more())) == 1
    file.write_bytes(line + line)
    assert len(list(reader.more())) == 1


@pytest.mark.parametrize("line", ["", "[]", '{"what": "nothing"}', '{"what": "end"}', "7"])
def test_what_is_no_record_is_told(line: str) -> None:
    with pytest.raises(UcpError, match="no record"):
        parsed(line)
