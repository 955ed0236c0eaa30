"""Compares two runs picture by picture, such as runs with different numbers of threads or dtypes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atedm.app.prompts import PromptCase, Sampling, described_cases
from atedm.app.run_record import read_run
from atedm_bench.quality import metrics
from atedm_bench.quality.images import load_pictures, picture_paths
from atedm_bench.quality.settings import Setting


@dataclasses.dataclass(frozen=True)
class Against:
    """Another run of the same cases, to compare with.

    Args:
        root: the other run's folder. cases, sampling: those of this run.

    Raises:
        ValueError: ``root`` is not a run of these cases, or its pictures have another size.
    """

    root: Path
    cases: Sequence[PromptCase]
    sampling: Sampling

    def __post_init__(self) -> None:
        asked = [list(case) for case in described_cases(self.cases)]
        try:
            found = read_run(self.root)
        except OSError as error:
            raise ValueError(f"against: {self.root} is not the folder of a run: {error.strerror}") from None
        sides = [self.sampling.width, self.sampling.height]
        other = found.get("sampling")
        if not isinstance(other, dict) or [other.get("width"), other.get("height")] != sides:
            raise ValueError(f"against: {self.root} holds pictures of another size; expected {sides[0]}x{sides[1]}")
        if found["cases"][: len(asked)] != asked:
            raise ValueError(f"against: {self.root} holds pictures of other prompts or seeds; expected the same")

    def row(self, setting: Setting, paths: Sequence[Path]) -> dict[str, Any]:
        """Compare the pictures in ``paths`` with the other run's.

        ``against_same`` is the number of equal pictures; ``against_psnr_db`` is the mean PSNR, at most 99 dB per
        picture. The result is empty if the other run lacks the setting.
        """
        others = picture_paths(self.root, setting, len(paths))
        if not all(path.is_file() for path in others):
            return {}
        found = [metrics.psnr(load_pictures([a]), load_pictures([b])) for a, b in zip(paths, others, strict=True)]
        psnr = np.concatenate(found)
        return {"against_same": int((psnr >= metrics.EQUAL_PSNR).sum()), **metrics.mean_of("against_psnr_db", psnr)}
