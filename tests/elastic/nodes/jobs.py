"""What ranks do in the tests of nodes; importable by name, so that each is a process of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def join_two_per_node(rank: int, world: int, root: str) -> Any:
    """Ranks 0 and 1 are node ``n0``, and so on: save and load by URL, then see who has what."""
    import torch
    from torch import distributed

    import ucp
    from ucp.elastic.nodes import join

    os.environ["UCP_NODE"] = f"n{rank // 2}"
    store = join(root, "job", copies=2)
    model = torch.nn.Linear(64, 64)
    with torch.no_grad():
        model.weight.fill_(3.0)
    url = "nodes://memory/e00001/step-00000001"
    ucp.save({"model": model}, url, step=1)
    with torch.no_grad():
        model.weight.fill_(0.0)
    report = ucp.load({"model": model}, url)
    distributed.barrier()
    found = {
        "nodes": store.nodes,
        "leads": store.leads,
        "targets": store.targets,
        "holders": {path: sorted(held) for path, held in store.listing().items()},
        "right": bool((model.weight == 3.0).all()) and report.step == 1,
        "room": store.room(),
    }
    distributed.barrier()
    store.leave()
    distributed.barrier()
    if store.leads:
        store.remove()
    return found


def join_by_one_name(rank: int, world: int, root: str) -> str:
    """Two ranks that call their node the same but have folders of their own."""
    from ucp.elastic.nodes import join
    from ucp.errors import UsageError

    os.environ["UCP_NODE"] = "same"
    try:
        join(f"{root}/{rank}", "job")
    except UsageError as error:
        return str(error)
    return ""


def join_where_one_may_not(rank: int, world: int, root: str) -> str:
    """Rank 1's folder is open to others."""
    from ucp.elastic.nodes import join
    from ucp.errors import UnsafeError

    os.environ["UCP_NODE"] = f"n{rank}"
    if rank == 1:
        os.makedirs(f"{root}/ucp-{os.geteuid()}/job/n1", mode=0o700)
        os.chmod(f"{root}/ucp-{os.geteuid()}/job/n1", 0o777)
    try:
        join(root, "job")
    except UnsafeError as error:
        return str(error)
    return ""


def save_beside_a_spare_node(rank: int, world: int, root: str) -> Any:
    """Rank 2, alone on its node, is spare; the others save there too, and find a copy there that is damaged."""
    from torch import distributed

    from ucp.elastic.nodes import join

    os.environ["UCP_NODE"] = f"n{rank}"
    store = join(root, "job", copies=3)
    distributed.barrier()
    distributed.destroy_process_group()
    found = _save_on_active_ranks(rank, store, root) if rank < 2 else None
    distributed.init_process_group("gloo", init_method=f"file://{root}/all", rank=rank, world_size=world)
    return found


def _save_on_active_ranks(rank: int, store: Any, root: str) -> Any:
    import torch
    from torch import distributed

    from ucp.checkpoint import open_checkpoint
    from ucp.elastic.nearby import NodesTier
    from ucp.elastic.nodes import NodeFolder

    distributed.init_process_group("gloo", init_method=f"file://{root}/active", rank=rank, world_size=2)
    spare = NodeFolder(f"{os.path.dirname(store.folder.top)}/n2")
    tier = NodesTier("memory", store, every=1)
    tier.begin(2, ["n0", "n1"], None, run="this")
    distributed.barrier()
    begun = spare.children()
    model = torch.nn.Linear(64, 64)
    for step in (1, 2, 3):
        tier.save(step, {"model": model}, epoch=2)
        tier.settle()
        distributed.barrier()
    kept = spare.children("e00002")
    version = store.child("e00002/step-00000003")
    checksum = open_checkpoint(version.url).catalog.checksums[0]
    if rank == 0:
        with open(f"{spare.root}/e00002/step-00000003/{checksum.object}", "r+b") as file:
            file.seek(checksum.offset)
            file.write(b"wrong")
    distributed.barrier()
    bad = version.scrub([checksum])
    distributed.barrier()
    holders = version.holders(checksum.object)
    distributed.barrier()
    healed = store.heal("e00002/step-00000003")
    distributed.barrier()
    again = version.holders(checksum.object)
    distributed.barrier()
    distributed.destroy_process_group()
    return {"begun": begun, "kept": kept, "bad": bad, "holders": holders, "healed": healed > 0, "again": again}


def save_where_one_node_is_full(rank: int, world: int, roots: list[str]) -> Any:
    """Save until there is no room on the last node, then once more when there is."""
    import torch
    from torch import distributed

    import ucp
    from tests.elastic.nodes.processes import eventually, files
    from ucp.elastic.nodes import join
    from ucp.errors import StorageError

    os.environ["UCP_NODE"] = f"n{rank}"
    store = join(roots[rank], "job", copies=2)
    model = torch.nn.Linear(512, 512)
    told, left = "", list[str]()

    def partial() -> list[str]:
        return [name for name in files(Path(store.folder.top)) if f"step-{step}/" in name or ".ucp" in name]

    for step in range(1, 9):
        try:
            ucp.save({"model": model}, f"nodes://memory/step-{step}", step=step)
        except StorageError as error:
            told = str(error)
            distributed.barrier()
            eventually(lambda: not partial())  # the node that was sent to hears of the end a moment later
            left = partial()
            distributed.barrier()
            break
    if rank == 0:
        store.clear("step-1")
    distributed.barrier()
    ucp.save({"model": model}, "nodes://memory/again", step=9)
    report = ucp.load({"model": model}, "nodes://memory/again")
    found = {"told": told, "left": left, "step": step, "again": report.step}
    distributed.barrier()
    store.leave()
    return found


def save_until_the_end(rank: int, world: int, meet: str, root: str, pipe: Any) -> None:
    """Each rank a node: save step after step, tell of each, and end when somebody is gone. Never returns."""
    import torch
    from torch import distributed

    import ucp
    from tests.support.gloo import _set_environment
    from ucp.elastic.nodes import join

    _set_environment(rank, world, {"UCP_NODE": f"n{rank}"})
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world)
    join(root, "job", copies=2, timeout=10)
    model = torch.nn.Linear(512, 700)
    for step in range(1, 1000):
        with torch.no_grad():
            for value in model.parameters():
                value.fill_(float(step))
        pipe.send(step)
        try:
            ucp.save({"model": model}, f"nodes://memory/step-{step:08}", step=step)
        except Exception:
            os._exit(0)
