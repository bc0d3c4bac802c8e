"""Ranks that find each other in a store, and how soon they notice that others are gone."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from ucp.elastic import groups
from ucp.elastic import meeting as meeting_module
from ucp.elastic.meeting import Meeting
from ucp.elastic.watch import Watch
from ucp.elastic.world import World
from ucp.errors import StorageError, UsageError

PATIENCE = 30.0


@pytest.fixture
def store(monkeypatch):
    """One store for all ranks, which are threads, as a torchrun agent's that outlives its workers."""
    shared = HashStore()
    monkeypatch.setattr(meeting_module, "_base", lambda *_, **__: shared)
    return shared


def ranks(size, work, timeout=PATIENCE):
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(Meeting(World(rank, size, rank, "n"), timeout)), range(size)))


def test_all_ranks_meet_and_tell_each_other(store):
    found = ranks(3, lambda meeting: meeting.gather("what", {"rank": meeting.world.rank}))
    assert found == [[{"rank": 0}, {"rank": 1}, {"rank": 2}]] * 3


def test_what_an_earlier_start_left_in_the_store_is_not_heard(store):
    def work(number):
        def told(meeting):
            before = meeting.said("done", [0])
            found = meeting.gather("number", [number, meeting.world.rank])
            meeting.say("done")
            meeting.part()
            return before, found

        return told

    first, second, third = ranks(3, work(1)), ranks(3, work(2)), ranks(2, work(3))
    assert [found for _, found in first] == [[[1, 0], [1, 1], [1, 2]]] * 3
    assert [found for _, found in second] == [[[2, 0], [2, 1], [2, 2]]] * 3
    assert [found for _, found in third] == [[[3, 0], [3, 1]]] * 2
    assert not any(before for before, _ in [first[0], second[0], third[0]])


def test_who_does_not_come_is_not_waited_for_longer_than_told(store):
    with pytest.raises(StorageError, match="not all of the ranks have come within"):
        Meeting(World(0, 2, 0, "n"), 0.2)
    with pytest.raises(StorageError, match="rank 0 does not answer within"):
        Meeting(World(1, 2, 0, "n"), 0.2)


def test_an_orphan_does_not_take_part_in_the_meeting_of_the_next_start(store):
    """Nobody ends it, and it has heard nothing of its own start's end."""
    for rank in range(2):
        with pytest.raises(StorageError, match=f"rank {rank} of 2: the torchrun that started it is gone"):
            Meeting(World(rank, 2, 0, "n", agent=1 << 30), PATIENCE)


def test_who_does_not_tell_is_not_waited_for_longer_than_told(store):
    def work(meeting):
        meeting.timeout = 0.3
        if meeting.world.rank == 1:
            return None
        with pytest.raises(StorageError, match=r"roll: another rank is gone"):
            meeting.gather("roll", 1)
        return True

    assert ranks(2, work) == [True, None]


def test_one_alone_needs_no_store():
    alone = Meeting(World(0, 1, 0, "n", alone=True), PATIENCE)
    assert alone.gather("x", 5) == [5]
    alone.say("done")
    assert alone.said("done", [0])
    alone.part()


def test_who_parts_last_may_find_nobody(store):
    """As where rank 0 has the store and is gone, while this rank took long to tidy up."""
    alone = Meeting(World(0, 1, 0, "n"), PATIENCE)
    alone.store = Gone()
    alone.part()


def test_ranks_without_the_gpus_that_others_have_are_named(store):
    def work(meeting):
        with pytest.raises(UsageError) as caught:
            groups._agreed(meeting, "gloo" if meeting.world.rank == 1 else "cpu:gloo,cuda:nccl", 3)
        return caught.value.message

    told = set(ranks(3, work))
    assert told == {
        "ranks would talk by different backends:\n  cpu:gloo,cuda:nccl: rank 0 on n, rank 2 on n\n  gloo: rank 1 on n"
    }


def test_a_spare_rank_needs_no_gpu(store):
    def work(meeting):
        return groups._agreed(meeting, "gloo" if meeting.world.rank == 2 else "cpu:gloo,cuda:nccl", 2)

    assert ranks(3, work)[:2] == ["cpu:gloo,cuda:nccl"] * 2


class Ended:
    """Takes the place of the end of the process."""

    def __init__(self):
        self.reason, self.over = None, threading.Event()

    def __call__(self, reason):
        self.reason = reason
        self.over.set()


def watch(rank, size, store, ended, *, timeout=PATIENCE, agent=None, glance=lambda: None):
    made = Watch(World(rank, size, 0, "n", agent=agent), store, timeout, end=ended, glance=glance)
    made.begin()
    return made


def test_ranks_that_beat_hear_each_other():
    store, ended = HashStore(), Ended()
    seen = threading.Event()
    both = [watch(rank, 2, store, ended, timeout=PATIENCE, glance=seen.set) for rank in range(2)]
    assert seen.wait(PATIENCE)
    while not all(store.check([f"beat/{rank}"]) for rank in range(2)):
        seen.wait(0.05)
    for one in both:
        one.end()
    assert ended.reason is None


def test_a_rank_that_is_not_heard_of_ends_the_one_before_it():
    ended = Ended()
    made = watch(1, 3, HashStore(), ended, timeout=1.0)
    assert ended.over.wait(PATIENCE)
    assert ended.reason == "rank 2 was not heard of for 1 s"
    made.end()


class Stuck:
    """A store whose host was cut off: it answers nothing."""

    def __init__(self):
        self.over = threading.Event()

    def set(self, key, value):
        self.over.wait()


def test_a_store_that_does_not_answer_ends_the_process():
    ended, store = Ended(), Stuck()
    made = watch(0, 2, store, ended, timeout=1.0)
    assert ended.over.wait(PATIENCE)
    assert ended.reason == "the store of the rendezvous was out of reach for 1 s"
    store.over.set()
    made.end()


class Gone:
    def set(self, key, value):
        raise RuntimeError("Connection reset by peer")


def test_a_store_that_is_gone_ends_the_process_at_once():
    ended = Ended()
    made = watch(0, 2, Gone(), ended)
    assert ended.over.wait(PATIENCE)
    assert ended.reason == "the store of the rendezvous is gone (Connection reset by peer)"
    made.end()


def test_who_leaves_is_not_waited_for():
    store, ended = HashStore(), Ended()
    staying = watch(0, 3, store, ended)
    leaving = watch(1, 3, store, Ended())
    leaving.tell("ValueError: no luck")
    assert ended.over.wait(PATIENCE)
    assert ended.reason == "rank 1 on n left: ValueError: no luck"
    staying.end()
    leaving.end()


def test_of_those_who_leave_the_first_is_told():
    """What others run into afterwards is not the cause."""
    store, ended = HashStore(), Ended()
    leaving = [watch(rank, 3, store, Ended()) for rank in (1, 2)]
    assert leaving[0].tell("ValueError: no luck") is None
    assert leaving[1].tell("RuntimeError: connection closed") == "rank 1 on n left: ValueError: no luck"
    assert leaving[0].tell("ValueError: no luck") is None
    staying = watch(0, 3, store, ended)
    assert ended.over.wait(PATIENCE)
    assert ended.reason == "rank 1 on n left: ValueError: no luck"
    for one in (*leaving, staying):
        one.end()


def test_a_rank_that_stands_still_is_told_as_the_cause():
    """Who waits for it in a collective hears of a timeout alone."""
    store = HashStore()
    leaving = [watch(rank, 3, store, Ended()) for rank in (0, 1)]
    store.set("beat/2", f"{time.time() - 20:.3f} far")
    told = leaving[0].tell("RuntimeError: timed out")
    assert told is not None
    assert re.fullmatch(r"rank 2 on far was not heard of for 2\d s", told)
    assert leaving[1].tell("RuntimeError: timed out") == f"rank 0 on n left: RuntimeError: timed out ({told})"
    for one in leaving:
        one.end()


def test_an_agent_that_is_gone_ends_the_process():
    ended = Ended()
    made = watch(0, 1, HashStore(), ended, agent=1 << 30)
    assert ended.over.wait(PATIENCE)
    assert ended.reason == "the torchrun that started it is gone"
    made.end()


def test_after_the_end_nothing_is_watched():
    ended = Ended()
    made = watch(0, 2, HashStore(), ended, timeout=1.0)
    made.end()
    assert not ended.over.wait(1.5)


ENDINGS = """
import atexit, sys, threading
from ucp.elastic.ending import leave_with
# What a process would hang in: a thread that nobody ends, as one that waits for ranks that are gone.
threading.Thread(target=threading.Event().wait).start()
def main():
    error = {error}
    leave_with(error)
    raise error
{call}
"""


@pytest.mark.parametrize(
    ("error", "call", "code", "told"),
    [
        ("ValueError('what went wrong')", "main()", 1, "ValueError: what went wrong"),
        ("SystemExit(7)", "main()", 7, ""),
        ("SystemExit('a text')", "main()", 1, "a text"),
        ("KeyboardInterrupt()", "main()", 1, "KeyboardInterrupt"),
        (
            "ValueError('what went wrong')",
            "try:\n    main()\nexcept ValueError as error:\n    raise RuntimeError('no luck') from error",
            1,
            "RuntimeError: no luck",
        ),
        (
            "ValueError('what went wrong')",
            "try:\n    main()\nexcept ValueError:\n    raise RuntimeError('no luck') from KeyError('else')",
            1,
            "RuntimeError: no luck",
        ),
        (
            "ValueError('what went wrong')",
            "try:\n    main()\nexcept ValueError as error:\n    found = error\nraise ExceptionGroup('all', [found])",
            1,
            "ExceptionGroup: all",
        ),
    ],
)
def test_a_process_ends_at_once_when_nobody_catches_it(error, call, code, told):
    program = ENDINGS.format(error=error, call=call)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    assert told in done.stderr


def test_who_catches_it_goes_on():
    caught = "try:\n    main()\nexcept ValueError:\n    print('on')\n    import os; sys.stdout.flush(); os._exit(0)"
    program = ENDINGS.format(error="ValueError('x')", call=caught)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "on\n")


def test_sigterm_ends_a_process_that_waits_outside_python():
    program = (
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "from ucp.elastic.ending import Mortal\n"
        "Mortal().begin()\n"
        "from torch.distributed import HashStore\n"
        "print('ready', flush=True)\n"
        "HashStore().get('never')\n"  # waits in C++, where no Python handler is called
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait(timeout=60) == -15


def test_who_leaves_does_not_wait_for_those_who_do_not_read():
    """As an agent that stands still, while the pipe in which it reads what its ranks print is full."""
    program = (
        "import logging, sys, threading\n"
        "from torch.distributed import HashStore\n"
        "from ucp.elastic.watch import Watch\n"
        "from ucp.elastic.world import World\n"
        "logging.basicConfig()\n"
        "threading.Thread(target=logging.error, args=('x' * (1 << 20),), daemon=True).start()\n"
        "Watch(World(0, 1, 0, 'n', agent=1 << 30), HashStore(), 60).begin()\n"
        "threading.Event().wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE) as process:
        assert process.wait(timeout=90) == 1


def test_ranks_of_a_large_job_beat_often_enough():
    assert Watch(World(0, 20_000, 0, "n"), HashStore(), 10)._pause <= 2.5
    assert Watch(World(0, 20_000, 0, "n"), HashStore(), 1000)._pause == 40
