"""Checkpoints of a whole run: when to save, what to keep, where to go on, and what to do when the job is preempted."""

from ucp.lifecycle.shelf import Saved
from ucp.train.manager.manager import CheckpointManager
from ucp.train.manager.resume import Resumed

__all__ = ["CheckpointManager", "Resumed", "Saved"]
