"""torch.distributed.pipelining: a rank's stages, or the schedule that runs them, are the modules in the stages.

Facts from torch/distributed/pipelining: a stage keeps its module as ``submod`` (stage.py), a schedule its one stage as
``_stage`` or its several as ``_stages`` (schedules.py). Names of a stage's parameters are those of the whole model.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle
from torch.distributed.pipelining.stage import _PipelineStageBase

from ucp.train.targets import Targets, take_value


def take(found: Targets, value: Any) -> bool:
    """Add the modules of a stage or of a schedule's stages."""
    if isinstance(value, PipelineScheduleSingle):
        stages = [value._stage]
    elif isinstance(value, PipelineScheduleMulti):
        stages = list(value._stages)
    elif isinstance(value, _PipelineStageBase):
        stages = [value]
    else:
        return False
    for stage in stages:
        take_value(found, stage.submod)
    return True
