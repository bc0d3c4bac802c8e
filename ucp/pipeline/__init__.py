"""Pipelines without a scheduler: what appears under one prefix is converted, verified and published under another.

Everything that is known lies in the destination, so that any number of watchers may work on the same prefixes, and any
of them may die at any time: the next pass of any other goes on.
"""

from ucp.pipeline.events import Event, Failure, Outcome
from ucp.pipeline.settings import Settings
from ucp.pipeline.watch import Watch

__all__ = ["Event", "Failure", "Outcome", "Settings", "Watch"]
