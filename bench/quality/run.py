"""One run, from a pipeline and prompts to pictures and rows. Several processes may share it."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from atedm.app.fingerprint import fingerprint
from atedm.app.prompts import PromptCase, Sampling, described_cases
from atedm.app.run_record import claim
from atedm_bench.methods import Costs
from atedm_bench.quality.against import Against
from atedm_bench.quality.images import make_setting, picture_paths, read_kinds
from atedm_bench.quality.lab import Figures
from atedm_bench.quality.metrics import accuracy_change
from atedm_bench.quality.settings import FULL, Setting


@dataclass
class Run:
    """What to make. ``settings[0]`` is the full model; ``root`` is the folder for everything that the run writes."""

    pipe: Any
    model: str
    scheduler: str
    settings: Sequence[Setting]
    cases: Sequence[PromptCase]
    sampling: Sampling
    root: Path

    def check_root(self) -> None:
        """Claim ``root`` for this run, or check that it already belongs to it. Pictures of two runs must not mix.

        Raises:
            ValueError: ``root`` holds pictures made with other settings; the message names the difference.
        """
        dtype = str(self.pipe.unet.dtype).removeprefix("torch.")
        described = {"weights": fingerprint(self.pipe), "dtype": dtype, "scheduler": self.scheduler}
        described["sampling"] = dataclasses.asdict(self.sampling)
        settings = {setting.name: setting.method.described() for setting in self.settings}
        self.model = claim(self.root, self.model, described, described_cases(self.cases), settings)

    def make(self, on_picture: Callable[[str, int], None] = lambda name, count: None) -> None:
        """Make every missing picture. Each process makes its share, and all wait for the last one."""
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
        costs: Costs,
        seconds: Mapping[str, Sequence[float]],
        on_setting: Callable[[str], None] = lambda name: None,
        against: Against | None = None,
    ) -> tuple[list[dict[str, Any]], dict[str, dict[str, np.ndarray]]]:
        """Return one flat row per setting, and the samples behind each row by setting name.

        Args:
            seconds: UNet seconds per picture by setting name, one number per round. A row has their median and range.
            against: another run to compare the pictures with.

        Raises:
            ValueError: the first setting is not the full model.
        """
        if not self.settings or self.settings[0] != FULL:
            raise ValueError("settings do not begin with the full model; expected it first: others are compared to it")
        full = picture_paths(self.root, FULL, len(self.cases))
        rows, samples = [], {}
        for setting in self.settings:
            on_setting(setting.name)
            paths = full if setting == FULL else picture_paths(self.root, setting, len(self.cases))
            found = figures(paths, full)
            samples[setting.name] = found.samples
            row = {
                "name": setting.name,
                "group": setting.group,
                "line": setting.method.line,
                "images": len(self.cases),
                **self._cost(setting, costs),
                **found.row,
            }
            if setting != FULL and "accuracy" in found.samples:
                row |= accuracy_change(found.samples["accuracy"], samples[FULL.name]["accuracy"])
            if against is not None:
                row |= against.row(setting, paths)
            if setting.name in seconds:
                row |= _median_and_range("unet_seconds", seconds[setting.name])
            rows.append({**row, "method": json.dumps(setting.method.described()), "note": setting.note})
        return rows, samples

    def _cost(self, setting: Setting, costs: Costs) -> dict[str, Any]:
        """Return the FLOPs of the mean call, over steps and pictures, and the kinds of the most common run."""
        method, count = setting.method, len(self.cases)
        if method.records:
            kinds = Counter(read_kinds(self.root, setting, count, self.sampling.batch))
        else:
            kinds = Counter({tuple(method.kinds(costs)): count})
        each = [(method.flops(costs, run), pictures) for run, pictures in kinds.items()]
        unet, scoring = (
            sum(getattr(flops, part) * pictures for flops, pictures in each) / count for part in ("unet", "scoring")
        )
        return {
            "gflops": unet / 1e9,
            "gflops_scoring": scoring / 1e9,
            "flops_part": unet / costs.counter.full().unet,
            "kinds": "".join(kind[0] for kind in kinds.most_common(1)[0][0]),
        }


def _median_and_range(name: str, values: Sequence[float]) -> dict[str, float]:
    return {name: statistics.median(values), f"{name}_low": min(values), f"{name}_high": max(values)}
