"""What the ranks of the tests of saving run."""

from __future__ import annotations

import atexit
import contextlib
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ucp
from ucp.errors import UcpError
from ucp.format.native_manifest import loads
from ucp.train.save import async_save, engine, native, save
from ucp.train.save.job import Job
from ucp.train.save.plan import SLAB_BYTES


def outcome(work):
    """What `work` raised, as (class, message); None if nothing."""
    try:
        work()
    except UcpError as error:
        return type(error).__name__, str(error)
    return None


def held_back(monkey, event):
    """Let shards only be written once `event` is set."""
    write = monkey._write_file

    def waiting(*args):
        event.wait(60)
        write(*args)

    monkey._write_file = waiting
    return lambda: setattr(monkey, "_write_file", write)


def tensors_of(rank, world, *, step, number=20):
    """Some that all ranks hold, large ones that must be cut among them, and some of one rank's own."""
    shared = {f"shared{i}": torch.full((100 + i, 7), float(step * 1000 + i)) for i in range(number)}
    large = {"large": torch.full((3, SLAB_BYTES // 8), float(step))}
    own = {f"own{rank}.{i}": torch.full((50, 3), float(step * 1000 + 100 * rank + i)) for i in range(number)}
    return shared | large | own


def value(url, name):
    return set(ucp.open(url)[name]["value"][...].flatten().tolist())


def expected(url, world, step, number=20):
    """Whether the checkpoint holds what `tensors_of` made for `step`."""
    ckpt = ucp.open(url)
    wanted = {}
    for rank in range(world):
        wanted |= tensors_of(rank, world, step=step, number=number)
    return (
        ckpt.step == step
        and ckpt.keys() == wanted.keys()
        and all(torch.equal(ckpt[name]["value"][...], tensor) for name, tensor in wanted.items())
    )


def mutate_after_staged(rank, world, folder, wait):
    """Several saves in a row, each mutated in place by threads the moment it is staged, and written only then."""
    tensors, written = tensors_of(rank, world, step=1), threading.Event()
    free = held_back(native, written)
    handles = []
    for step in (1, 2):
        for name, tensor in tensors_of(rank, world, step=step).items():
            tensors[name].copy_(tensor)
        handles.append(async_save(tensors, f"{folder}/{step}", step=step, wait=wait))
        handles[-1].staged.result(60)
        spoil(tensors)
    assert not any(handle.done() for handle in handles)
    written.set()
    reports = [handle.result(60) for handle in handles]
    free()
    return [(report.step, report.tensors, report.ranks) for report in reports]


def spoil(tensors):
    threads = [threading.Thread(target=tensor.fill_, args=(-1.0,)) for tensor in tensors.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def steps_of_training(rank, world, folder):
    """Every step of an FSDP2 model is saved without waiting; what each save holds must be that of its step."""
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 65), nn.BatchNorm1d(65), nn.Linear(65, 9))
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    truth, handles = [], []
    for step in range(1, 6):
        model(torch.randn(8, 33)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        handles.append(async_save((model, optimizer), f"{folder}/{step}", step=step))
        truth.append(
            {
                f"{name}[{state}]": full(tensor)
                for name, parameter in model.named_parameters()
                for state, tensor in {"value": parameter, **optimizer.state[parameter]}.items()
            }
        )
    for handle in handles:
        handle.result(60)
    if rank == 0:
        torch.save(truth, f"{folder}/truth.pt")


def full(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def count_rounds(rank, world, folder):
    """Rounds of messages made in the caller's thread, save by save: with new layouts, an old one, and a strange one."""
    caller, made = threading.get_ident(), []
    channel = engine.engine_of(None).channel
    rounds = channel.round

    def counted(*args, **options):
        made.append(threading.get_ident() == caller)
        return rounds(*args, **options)

    channel.round = counted
    told = []
    for number, extra in enumerate(({}, {}, {"more": torch.ones(4)}, {"more": torch.ones(4)})):
        made.clear()
        async_save(tensors_of(rank, world, step=1, number=3) | extra, f"{folder}/{number}").result(60)
        told.append(list(made))
    return told


def one_rank_changes(rank, world, folder):
    """A rank that holds more than it did before: the others have staged by their old plan."""
    raised = []
    for number, extra in enumerate(({}, {"more": torch.arange(5.0)}, {"more": torch.arange(5.0)})):
        tensors = tensors_of(rank, world, step=1, number=3) | (extra if rank == 1 else {})
        raised.append(outcome(lambda: async_save(tensors, f"{folder}/{number}").result(60)))  # noqa: B023
    return raised


def one_rank_drops(rank, world, folder):
    """A rank does not hold any more what it was to write, and the others, who hold it, have not staged it."""
    tensors, raised = {f"w{i}": torch.arange(100.0) for i in range(4)}, []
    save(tensors, f"{folder}/first")
    mine = [cut.piece.key.name for cut in engine.engine_of(None)._cached.plan.write]
    for number in range(2):
        kept = {name: tensor for name, tensor in tensors.items() if rank == 0 or name not in mine}
        raised.append(outcome(lambda: async_save(kept, f"{folder}/{number}").result(60)))  # noqa: B023
    return raised


def drifted(rank, world, folder):
    tensors = {f"w{i}": torch.full((50,), 1.0 + (rank == world - 1 and i == 3)) for i in range(6)}
    return outcome(lambda: async_save(tensors, f"{folder}/ckpt").result(60))


def one_cannot_look(rank, world, folder):
    """An optimizer state that cannot be saved, on one rank, when layouts are known; then everything is well again."""
    module = nn.ParameterDict({"w": nn.Parameter(torch.ones(3))})
    optimizer = torch.optim.SGD(module.parameters())
    async_save((module, optimizer), f"{folder}/0").result(60)
    optimizer.state[module["w"]] = {"odd": [1, 2]} if rank else {}
    raised = outcome(lambda: async_save((module, optimizer), f"{folder}/1").result(60))
    optimizer.state.clear()
    async_save((module, optimizer), f"{folder}/2").result(60)
    return raised


def one_cannot_travel(rank, world, folder):
    """Something among the hyper-parameters of one rank that cannot be sent to another one."""
    module = nn.ParameterDict({"w": nn.Parameter(torch.ones(3))})
    optimizer = torch.optim.SGD(module.parameters())
    optimizer.param_groups[0]["odd"] = (lambda: rank) if rank else 0
    raised = outcome(lambda: async_save((module, optimizer), f"{folder}/0").result(60))
    optimizer.param_groups[0]["odd"] = 0
    async_save((module, optimizer), f"{folder}/1").result(60)
    return raised


def not_in_the_group(rank, world, folder):
    """A rank that is in no group to save in calls nevertheless."""
    group = distributed.new_group([0])
    return outcome(lambda: save({"w": torch.ones(3)}, f"{folder}/ckpt", group=group))


def errors_raise_later(rank, world, folder):
    """A failure that nobody has heard of is raised by the next call, on all ranks, even if only one has not heard."""
    tensors = {"w": torch.ones(3)}
    save(tensors, f"{folder}/ckpt")
    quiet = async_save(tensors, f"{folder}/ckpt", on_error="raise")
    with contextlib.suppress(UcpError):
        quiet.result(60) if rank == 0 else None
    engine.engine_of(None).drain()
    first = outcome(lambda: async_save(tensors, f"{folder}/other").result(60))
    second = outcome(lambda: async_save(tensors, f"{folder}/third").result(60))
    return first, second


def errors_warn(rank, world, folder):
    tensors = {"w": torch.ones(3)}
    save(tensors, f"{folder}/ckpt")
    quiet = async_save(tensors, f"{folder}/ckpt", on_error="warn")
    quiet.staged.result(60)
    engine.engine_of(None).drain()
    fine = async_save(tensors, f"{folder}/other", on_error="warn").result(60)
    return outcome(lambda: quiet.result(60)), fine.tensors


def disk_full(rank, world, folder):
    """The files of one rank may not grow beyond 64 KiB, as on a full disk."""
    tensors = {f"w{rank}.{i}": torch.ones(30000) for i in range(3)}
    save(tensors, f"{folder}/0", step=0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    raised = outcome(lambda: async_save(tensors, f"{folder}/1", step=1).result(60))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return raised


def folder_removed(rank, world, folder):
    """The folder goes while it is written."""
    tensors = {f"w{rank}.{i}": torch.ones(3000) for i in range(3)}
    save(tensors, f"{folder}/0", step=0)
    write = native._write_file

    def removed(*args):
        write(*args)
        distributed.barrier()
        if rank == 0:
            shutil.rmtree(f"{folder}/1")
        distributed.barrier()

    native._write_file = removed
    return outcome(lambda: save(tensors, f"{folder}/1", step=1))


def killed(rank, world, folder, moment):
    """Rank 1 is killed in the middle of a save in the background. The others note what they raise."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    tensors = {f"w{rank}.{i}": torch.ones(3000) for i in range(3)}
    async_save(tensors, f"{folder}/0", step=0).result(60)
    if rank == 1 and moment == "write":
        native._write_file = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    handle = async_save(tensors, f"{folder}/1", step=1)
    if rank == 1 and moment == "staged":
        os.kill(os.getpid(), signal.SIGKILL)
    raised = [outcome(lambda: handle.result(60))]
    raised.append(outcome(lambda: async_save(tensors, f"{folder}/2", step=2).result(60)))
    Path(folder, f"raised-{rank}").write_text(repr(raised))
    # A rank that has ended would be noticed whatever it had said before.
    until = time.monotonic() + 40
    while not Path(folder, f"raised-{2 - rank}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    os._exit(0)


def group_is_gone(rank, world, folder):
    """The process group is destroyed while a save is under way, as scripts do at their end."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    go = threading.Event()
    held_back(native, go)
    handle = async_save(tensors_of(rank, world, step=3, number=2), f"{folder}/ckpt", step=3)
    distributed.destroy_process_group()
    go.set()
    handle.result(60)
    os._exit(0)


def in_halves(rank, world, folder):
    """Two groups of ranks save at the same time."""
    groups = [distributed.new_group([0, 1]), distributed.new_group([2, 3])]
    half = rank // 2
    tensors = {"w": torch.full((8,), float(half)), f"own{rank}": torch.full((3,), float(rank))}
    handles = [async_save(tensors, f"{folder}/{half}-{step}", step=step, group=groups[half]) for step in range(3)]
    return [handle.result(60).ranks for handle in handles]


def balanced(rank, world, folder):
    """Bytes that each rank writes of what all of them hold."""
    tensors = {"large": torch.ones(5, SLAB_BYTES // 8), "small": torch.ones(7)}
    save(tensors, f"{folder}/ckpt")
    manifest = loads(Path(folder, "ckpt", "ucp.json").read_bytes(), where="")
    return [shard.size - shard.data for shard in manifest.shards]


def wait_at_exit(folder, form):
    """Ends while a save is held back for half a second; tells which threads that hold tensors are left then."""
    write = Job.write

    def late(*args):
        time.sleep(0.5)
        return write(*args)

    Job.write = late
    holding = {"ucp-save", "ucp-stage"}
    atexit.register(lambda: print([thread.name for thread in threading.enumerate() if thread.name in holding]))
    async_save({"w": torch.arange(5.0)}, f"{folder}/ckpt", form=form)


def expected_names(url):
    return set(ucp.open(url).keys())
