"""What the pruned blocks of one UNet share."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch

from atedm.options import Options
from atedm.recording import Recording
from atedm.schedule import RankingPeriod

logger = logging.getLogger("atedm")


@dataclass
class PruningState:
    """Shared by the blocks of one UNet.

    Attributes:
        light: whether the current UNet call is in DSAP's light phase.
        ranks_anew: whether tokens are chosen in it, or those chosen in an earlier call stay.
        halves: whether its batch holds both halves of classifier-free guidance, to share one choice.
        is_constant: whether every call is pruned in the same way.
        said: what has been said about a call already, to be said once.
        period: when ``ranks_anew`` is due.
        is_told: whether the call that is about to begin has been followed already, outside of a compiled graph.
        pipeline: weak reference to the pipeline whose scheduler counts the steps, or None. A copy does not take it
            along, but the scheduler, which is copied with a copied pipeline.
        scheduler: the one that counts them: given instead of a pipeline, or last seen on it.
    """

    options: Options
    scheduler: object | None = None
    pipeline: Any = None
    light: bool = field(default=False, init=False)
    is_constant: bool = field(default=True, init=False)
    ranks_anew: bool = field(default=True, init=False)
    halves: bool = field(default=False, init=False)
    is_told: bool = field(default=False, init=False)
    said: set[str] = field(default_factory=set, init=False)
    period: RankingPeriod = field(init=False)
    step: int | None = None
    call: int = -1
    recordings: list[Recording] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Told apart once: an attribute is what a compiled graph can be guarded by.
        self.is_constant = self.options.is_constant
        self.begin(self.scheduler, self.pipeline)

    def begin(self, scheduler: object | None, pipeline: Any) -> None:
        """As it is before the first call."""
        schedule = self.options.schedule
        self.scheduler, self.pipeline = scheduler, pipeline
        self.light = (False if schedule is None else schedule.constant_phase) is True
        self.halves = self.options.share_guidance
        self.ranks_anew, self.is_told = True, False
        self.period, self.said = RankingPeriod(self.options.rank_every), set()
        self.step, self.call, self.recordings = None, -1, []

    def say_once(self, what: str, message: str, *args: Any) -> None:
        # torch.compile cannot trace a logger, and every message is about a call that it need not see.
        if not torch.compiler.is_compiling() and what not in self.said:
            self.said.add(what)
            logger.warning(message, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pipeline": None, "recordings": []}
