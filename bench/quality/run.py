"""One run, from a pipeline and prompts to rows, plots and contact sheets; several processes may share it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from atedm.app.prompts import PromptCase, Sampling, claim
from atedm.policy.options import Options
from atedm_bench.quality.images import make_setting
from atedm_bench.quality.lab import Figures, rows_of
from atedm_bench.quality.settings import Setting


@dataclass
class Run:
    """What to make. ``settings[0]`` is the full model; ``root``: the folder for everything that the run writes.

    ``skip``: the number of cases at the beginning that the figures leave out.
    """

    pipe: Any
    model: str
    settings: Sequence[Setting]
    cases: Sequence[PromptCase]
    sampling: Sampling
    root: Path
    skip: int = 0

    @property
    def chosen(self) -> range:
        """The cases to compute figures of."""
        return range(self.skip, len(self.cases))

    def _setting(self, setting: Setting) -> dict[str, Any]:
        kept = ("kind", "ratio", "options", "pooled")
        described = {key: getattr(setting, key) for key in kept}
        if setting.kind not in ("full", "tomesd"):
            # All options, because a default may change between two versions.
            described["options"] = Options(ratio=setting.ratio, **setting.options).to_dict()
        return described

    def check_root(self) -> None:
        """Claim ``root`` for this run, or check that it already belongs to it: pictures of two runs must not mix.

        Raises:
            ValueError: ``root`` holds pictures made with other settings; the message names the difference.
        """
        dtype = str(self.pipe.unet.dtype).removeprefix("torch.")
        described = {"model": self.model, "dtype": dtype, "sampling": dataclasses.asdict(self.sampling)}
        claim(self.root, described, self.cases, {setting.name: self._setting(setting) for setting in self.settings})

    def make(self, on_picture: Callable[[str, int], None] = lambda name, count: None) -> None:
        """Make every missing picture. Each process makes its part, and all wait for the last one."""
        state = PartialState()
        for setting in self.settings:
            make_setting(
                self.pipe,
                setting,
                self.cases,
                self.root,
                self.sampling,
                process=state.process_index,
                processes=state.num_processes,
                on_picture=lambda count, name=setting.name: on_picture(name, count),
            )
        state.wait_for_everyone()

    def rows(
        self,
        figures: Callable[[Sequence[Path], Sequence[Path]], Figures],
        seconds: Mapping[str, Sequence[float]],
        on_setting: Callable[[str], None] = lambda name: None,
    ) -> tuple[list[dict[str, Any]], dict[str, dict[str, np.ndarray]]]:
        """See :func:`atedm_bench.quality.lab.rows_of`."""
        return rows_of(self.settings, self.root, self.chosen, figures, seconds, on_setting)
