"""ZeRO-1 on four processes, saved by DeepSpeed; resumed as ZeRO-3 on three and as FSDP2 on two and on four."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ucp.demo.converting import converted
from ucp.demo.curves import Curve, Outcome
from ucp.demo.quiet import silenced
from ucp.demo.ranks import spawn


def run_with_deepspeed(folder: Path, before: int, after: int, say: Callable[[str], None]) -> Outcome:
    """The demo with DeepSpeed as the source and as one of the targets."""
    with silenced():
        from ucp.demo import deepspeed_jobs, fsdp_jobs

        deepspeed_jobs.prepare_process()
    source, universal, back = (str(folder / name) for name in ("deepspeed", "universal", "deepspeed-universal"))
    say(f"training on 4 processes with DeepSpeed ZeRO-1; it saves at step {before} to {source}")
    whole = spawn(deepspeed_jobs.train_and_save, 4, source, 1, before, after)
    say(converted(source, universal))
    say(converted(universal, back, to="deepspeed-universal"))
    say("resuming on 3 processes with DeepSpeed ZeRO-3, from the DeepSpeed universal folder")
    zero3 = spawn(deepspeed_jobs.resume, 3, back, 3, before, after)
    say("resuming on 2 processes with FSDP2, from the universal checkpoint")
    fsdp = spawn(fsdp_jobs.resume, 2, universal, "fsdp2", before, after)
    say("resuming on 4 processes with FSDP2, straight from the ZeRO-1 folder")
    direct = spawn(fsdp_jobs.resume, 4, source, "fsdp2", before, after)
    return Outcome(
        engine="deepspeed",
        saved_at=before,
        uninterrupted=Curve("ZeRO-1 on 4", 0, tuple(whole)),
        resumed=(
            Curve("ZeRO-3 on 3", before, tuple(zero3)),
            Curve("FSDP2 on 2", before, tuple(fsdp)),
            Curve("FSDP2 on 4, direct", before, tuple(direct)),
        ),
    )
