"""The forms of checkpoint that a running job can write."""

from __future__ import annotations

from typing import Any

from ucp.converter import families
from ucp.errors import UsageError
from ucp.format.native_manifest import FAMILY as NATIVE
from ucp.train.save.consolidated import ConsolidatedForm
from ucp.train.save.form import Form
from ucp.train.save.native import NativeForm


def form_of(name: str, *, share: bool = False, **options: Any) -> Form:
    """A form for one save: ``native``, or that of any family that `ucp.convert` writes, with options of its target.

    With `share` it reuses what other checkpoints of the run hold.

    UsageError if there is none of that name.
    """
    if name == NATIVE:
        if options:
            raise UsageError(f"native checkpoints are saved without options, not {' '.join(sorted(options))}")
        return NativeForm(share=share)
    if name not in families():
        raise UsageError(f"{name!r} is no form of checkpoint", hint=f"form= takes one of: {' '.join(families())}")
    if share:
        raise UsageError(
            f"saves in form {name!r} share nothing", hint="form='native' does, and so does ucp.convert(..., share=True)"
        )
    return ConsolidatedForm(name, **options)
