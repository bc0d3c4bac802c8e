"""The program with something wrong in it, to see that the demo notices: ``python -m tests.demo.sabotaged FAULT …``."""

from __future__ import annotations

import sys
import time

import ucp
from ucp.cli import main
from ucp.demo import fsdp_jobs


def zeroed(target, url, **options):
    """A load that leaves the first moments at zero."""
    report = load(target, url, **options)
    for state in target[1].state.values():
        state["exp_avg"].zero_()
    return report


def forgetful(target, url, **options):
    """A load that leaves every group its own learning rate, halved."""
    report = load(target, url, **options)
    for group in target[1].param_groups:
        group["lr"] /= 2
    return report


def broken(target, url, **options):
    raise ValueError("this rank is broken")


def hanging(target, url, **options):
    time.sleep(600)


load = ucp.load
fault = sys.argv.pop(1)
ucp.load = {"zeroed": zeroed, "forgetful": forgetful, "broken": broken, "hanging": hanging}[fault]
assert fsdp_jobs.ucp.load is not load
main()
