"""The samplers of the lab. Each is compared with its own full model, because every sampler draws different pictures."""

from __future__ import annotations

import copy
from typing import Any

from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

EULER = "euler"
SCHEDULERS = (EULER, "dpm++", "dpm++-karras")


def set_scheduler(pipe: Any, name: str) -> None:
    """Give ``pipe`` the scheduler ``name`` (one of :data:`SCHEDULERS`), with the configuration of its current one."""
    config = pipe.scheduler.config
    if name == EULER:
        pipe.scheduler = EulerDiscreteScheduler.from_config(config)
    else:
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=name.endswith("karras"))


def timesteps_of(pipe: Any, steps: int) -> Tensor:
    """Return the timesteps of a run of ``steps`` steps."""
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    return scheduler.timesteps
