"""``ucp demo elastic``: a job whose processes are killed, that goes on with fewer and with more, for real."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ucp.cli.command import command as declare
from ucp.cli.demo import kept_folder
from ucp.cli.output import Output
from ucp.errors import ContentError

if TYPE_CHECKING:
    from ucp.demo.elastic.ledger import Recovery
    from ucp.demo.elastic.outcome import Outcome

KEYS = {
    "kills": "list of what was ended by SIGKILL: `what` (rank, agent or node), its `node`, the newest `step` that was "
    "done then, and the `phase` that was waited for, such as optimizer, replication or recovery; null at other moments",
    "world_sizes": "list of the numbers of ranks that trained, in order",
    "layouts": "list of their layouts: object of axes and sizes each",
    "recoveries": "list of recoveries: `ranks`, `step` and `tier` it went on from, `steps_lost`, `seconds` in all, and "
    "by `parts` such as `detect`, `rendezvous`, `start`, `read`, `resume`",
    "steps": "number of steps of the run",
    "steps_lost": "number of steps that had to be done again, in all",
    "samples_missing": "number of samples that no step that counts was trained on",
    "samples_repeated": "number of samples that steps that count were trained on more than once",
    "largest_loss_difference": "largest difference between the loss of a step and that of the undisturbed run",
    "tolerance": "the largest difference that the order of float64 additions explains",
    "held": "whether every promise held; the exit code is then 0, else 6",
    "broken": "list of promises that did not hold, in words",
    "seed": "what the moments of the kills follow from",
    "folder": "where checkpoints, records and the picture were kept, or null",
    "seconds": "time taken",
}


@declare("elastic", json_keys=KEYS)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Chooses the moments of the kills.")
@click.option("--keep", metavar="DIR", type=click.Path(path_type=Path), help="Keep all, and a picture, in this folder.")
def command(out: Output, seed: int, keep: Path | None) -> None:
    """Kill processes of a job that goes on without them, for real.

    A small transformer trains under torchrun on several nodes, which are groups of processes of this machine. Ranks and
    a whole node are ended by SIGKILL, and the node comes back: the job goes on each time with the ranks that there are,
    in a layout that fits them, from what the survivors have in memory. Losses and samples are compared with those of a
    run that nothing happened to; leaves with exit code 6 if any promise did not hold.
    """
    from ucp.demo.elastic.run import run

    with kept_folder(keep) as folder:
        outcome = run(folder, seed=seed, say=out.remark)
    if out.mode == "json":
        out.json(document(outcome, keep))
    elif out.human:
        _print(out, outcome)
        kept = f", kept in {keep}, with picture.svg" if keep else ""
        out.remark(("took", "dim"), f"  {outcome.seconds:.0f} s", kept)
    if not outcome.held:
        _fail(out, outcome)


def document(outcome: Outcome, keep: Path | None) -> dict[str, Any]:
    """The JSON document."""
    account = outcome.account
    return {
        "kills": [
            {"what": kill.what, "node": kill.node, "step": kill.step, "phase": kill.phase} for kill in outcome.kills
        ],
        "world_sizes": list(account.worlds),
        "layouts": [dict(mesh) for mesh in account.meshes],
        "recoveries": [_recovery(one) for one in account.recoveries],
        "steps": account.steps,
        "steps_lost": account.steps_lost,
        "samples_missing": account.samples_missing,
        "samples_repeated": account.samples_repeated,
        "largest_loss_difference": account.loss_difference,
        "tolerance": outcome.tolerance,
        "held": outcome.held,
        "broken": list(outcome.broken),
        "seed": outcome.seed,
        "folder": None if keep is None else str(keep),
        "seconds": outcome.seconds,
    }


def _recovery(one: Recovery) -> dict[str, Any]:
    return {
        "ranks": one.world,
        "step": one.step,
        "tier": one.tier,
        "steps_lost": one.steps_lost,
        "seconds": one.seconds,
        "parts": dict(one.parts),
    }


def _print(out: Output, outcome: Outcome) -> None:
    """What was killed, how the job went on, and the verdict."""
    account = outcome.account
    kills = [(kill.what, kill.node, str(kill.step), kill.phase or "") for kill in outcome.kills]
    out.table(("killed", "on node", "after step", "in"), kills, right=("after step",))
    out.line()
    rows = [_row(one) for one in account.recoveries]
    out.table(
        ("ranks", "layout", "went on from", "of", "seconds", "parts"), rows, right=("ranks", "went on from", "seconds")
    )
    out.line()
    out.fields(
        [
            ("world sizes", " → ".join(str(world) for world in account.worlds)),
            ("steps", f"{account.steps}, {account.steps_lost} of them done again"),
            ("samples missing", str(account.samples_missing)),
            ("samples repeated", str(account.samples_repeated)),
            ("largest loss difference", f"{account.loss_difference:.1e}"),
        ]
    )
    out.line()
    if outcome.held:
        told = f"  losses as if nothing had happened, within float64 rounding ({outcome.tolerance:.0e})"
        out.line(("every promise held", "green"), told)
    for broken in outcome.broken:
        out.line(("broken", "red"), f"  {broken}")


def _row(one: Recovery) -> tuple[str, ...]:
    layout = " ".join(f"{name}={size}" for name, size in one.mesh.items())
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in one.parts.items() if seconds >= 0.05)
    return (str(one.world), layout, str(one.step), one.tier, f"{one.seconds:.1f}", parts)


def _fail(out: Output, outcome: Outcome) -> None:
    if out.mode == "json":
        sys.exit(ContentError.exit_code)
    raise ContentError(
        f"not every promise held: {'; '.join(outcome.broken)}",
        hint=f"this is a bug in ucp or in a framework; please report it with `ucp demo elastic --seed {outcome.seed} "
        "--keep DIR` and the versions that `pip list` shows",
    )
