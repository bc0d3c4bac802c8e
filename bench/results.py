"""The outcome of `bench.convert` as Markdown: what took how long, what moved, and which targets are met."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

from bench import contenders
from bench.report import spread, table

if TYPE_CHECKING:
    from bench.contenders import Contender
    from bench.convert import Outcome

_MB, _MIB = 1e6, 2**20


def page(outcome: Outcome) -> str:
    """Everything about one checkpoint."""
    made = outcome.made
    head = (
        f"### ZeRO-{made.stage}, {made.ranks} ranks, {made.parameters / 1e6:.1f}M parameters\n\n"
        f"{made.tensors} parameters in {made.layers} layers; optimizer shards {made.shard_bytes / _MB:,.0f} MB, "
        f"all files {made.nbytes / _MB:,.0f} MB, state {made.state_bytes / _MB:,.0f} MB; "
        f"written by DeepSpeed {made.versions['deepspeed']}, torch {made.versions['torch']}."
    )
    tried = ", ".join(f"{c.name.split()[-1]}: {c.walls[0]:.1f} s" for c in outcome.tried)
    workers = f"`{contenders.STOCK}` with extracting/merging workers, once each: {tried}. The fastest took part."
    compared = f"Compared bit for bit with DeepSpeed's own conversion: {outcome.compared} tensors, all equal."
    return "\n\n".join([head, _times(outcome), workers, _volumes(outcome), compared, _targets(outcome)])


def _times(outcome: Outcome) -> str:
    rows = [
        [
            contender.name,
            spread(contender.walls),
            spread([run.cpu for run in contender.runs]),
            *(f"{ratio(contender, other):.2f}" for other in _yardsticks(outcome)),
            f"{outcome.startup[contender.name].wall:.2f}",
        ]
        for contender in outcome.contenders
    ]
    return table(["command", "wall s", "CPU s", "x cp", "x cp + fsync", "x ds_to_universal", "of it start-up s"], rows)


def _volumes(outcome: Outcome) -> str:
    base = outcome.interpreter.peak
    rows = []
    for contender in outcome.contenders:
        largest = _most(contender, lambda run: run.peak)
        rows.append(
            [
                contender.name,
                f"{_most(contender, lambda run: run.read) / _MB:,.0f}",
                f"{_most(contender, lambda run: run.written) / _MB:,.0f}",
                f"{_most(contender, lambda run: run.temporary) / _MB:,.1f}",
                f"{contender.runs[-1].output / _MB:,.0f}",
                f"{contender.runs[-1].files:,}",
                f"{max(0, largest - base) / _MIB:,.0f}",
                f"{_most(contender, lambda run: run.peak_sum) / _MIB:,.0f}",
            ]
        )
    head = ["command", "read MB", "written MB", "temporary MB", "result MB", "files", "peak MiB", "tree MiB"]
    return table(head, rows)


def _targets(outcome: Outcome) -> str:
    """The targets, for the command with all its checks."""
    made, copy, durable, stock = outcome.made, *_yardsticks(outcome)
    ours = next(contender for contender in outcome.contenders if contender.name == contenders.UCP)
    needed = made.shard_bytes + (2 * made.parameters if made.has_working_copy else 0)
    over = _most(ours, lambda run: run.peak) - outcome.interpreter.peak
    limits: list[tuple[str, float, float, str]] = [
        ("bytes read / those needed", _most(ours, lambda run: run.read) / needed, 1.05, ".3f"),
        ("bytes written / state", _most(ours, lambda run: run.written) / made.state_bytes, 1.05, ".3f"),
        ("temporary bytes / state", _most(ours, lambda run: run.temporary) / made.state_bytes, 0.001, ".4f"),
        ("peak memory over the interpreter, MiB", over / _MIB, 512, ".0f"),
        ("wall / ds_to_universal.py", ratio(ours, stock), 0.2, ".3f"),
        ("wall / cp -r", ratio(ours, copy), 1.5, ".2f"),
        ("wall / cp -r + fsync", ratio(ours, durable), 1.5, ".2f"),
    ]
    rows = [
        [name, f"{value:{form}}", f"<= {limit:g}", "yes" if value <= limit else "**no**"]
        for name, value, limit, form in limits
    ]
    return table(["target of `ucp convert`", "measured", "limit", "met"], rows)


def ratio(contender: Contender, other: Contender) -> float:
    """Median over rounds of the wall time of one against the other's in the same round."""
    return statistics.median(a / b for a, b in zip(contender.walls, other.walls, strict=True))


def _yardsticks(outcome: Outcome) -> tuple[Contender, Contender, Contender]:
    """The copy, the copy with fsync, and DeepSpeed's converter."""
    found = {contender.name: contender for contender in outcome.contenders}
    stock = next(contender for name, contender in found.items() if name.startswith(contenders.STOCK))
    return found[contenders.COPY], found[contenders.COPY_SYNC], stock


def _most(contender: Contender, of: Callable[..., int]) -> int:
    """The largest value over the rounds."""
    return max(of(run) for run in contender.runs)
