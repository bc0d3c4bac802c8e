"""FSDP2 on four processes, saved as its shards; resumed as FSDP2 on three, as FSDP2 with TP on four, as DDP on two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ucp.demo.converting import converted
from ucp.demo.curves import Curve, Outcome
from ucp.demo.quiet import silenced
from ucp.demo.ranks import spawn


def run_with_fsdp(folder: Path, before: int, after: int, say: Callable[[str], None]) -> Outcome:
    """The demo with torch alone."""
    with silenced():
        from ucp.demo import fsdp_jobs
    source, universal = str(folder / "shards"), str(folder / "universal")
    say(f"training on 4 processes with FSDP2; at step {before} each saves its shards to {source}")
    whole = spawn(fsdp_jobs.train_and_save, 4, source, before, after)
    say(converted(source, universal))
    say("resuming on 3 processes with FSDP2, from the universal checkpoint")
    fsdp = spawn(fsdp_jobs.resume, 3, universal, "fsdp2", before, after)
    say("resuming on 4 processes with FSDP2 on 2 x tensor parallelism on 2, from the universal checkpoint")
    tensor_parallel = spawn(fsdp_jobs.resume, 4, universal, "fsdp2+tp2", before, after)
    say("resuming on 2 processes with DistributedDataParallel, straight from the shards")
    direct = spawn(fsdp_jobs.resume, 2, source, "ddp", before, after)
    return Outcome(
        engine="fsdp2",
        saved_at=before,
        uninterrupted=Curve("FSDP2 on 4", 0, tuple(whole)),
        resumed=(
            Curve("FSDP2 on 3", before, tuple(fsdp)),
            Curve("FSDP2 2 × TP 2", before, tuple(tensor_parallel)),
            Curve("DDP on 2, direct", before, tuple(direct)),
        ),
    )
