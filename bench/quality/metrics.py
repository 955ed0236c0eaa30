"""Measures of picture quality, taken from torchmetrics where it has them."""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import binomtest, norm
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

from atedm_bench.quality.checker import FEATURES, Checker, prepare

BATCH = 64

# Bootstrap draws for the intervals of means and of the Fréchet distance.
_BOOTSTRAP = 1000
_FRECHET_BOOTSTRAP = 100


def share_interval(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson's)."""
    interval = binomtest(right, count).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def _between(level: float) -> tuple[float, float]:
    """Return the quantiles that enclose the fraction ``level`` of a distribution."""
    return (1 - level) / 2, (1 + level) / 2


def mean_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Return the interval of a mean, from a seeded bootstrap."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(_BOOTSTRAP, len(values)))].mean(1)
    return tuple(float(q) for q in np.quantile(means, _between(level)))


def mean_of(name: str, values: np.ndarray) -> dict[str, float]:
    """Return the mean as ``name``, and its 95 % interval as ``name_low`` and ``name_high``."""
    low, high = mean_interval(values)
    return {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}


def paired_difference(a: np.ndarray, b: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """Return the mean of ``a − b`` and its interval. Both hold one figure per picture, in the same order.

    Pictures of one prompt and seed have much in common, so this can separate settings whose own intervals overlap.
    """
    return (float((a - b).mean()), *mean_interval(a - b, level))


def accuracy_change(right: np.ndarray, full: np.ndarray) -> dict[str, float]:
    """Return the change in accuracy from the full model, in percentage points, with the paired 95 % interval.

    Args:
        right, full: 1 for each picture that shows what was asked, else 0.
    """
    change, low, high = (100 * value for value in paired_difference(right, full))
    return {"accuracy_change": change, "accuracy_change_low": low, "accuracy_change_high": high}


def draws_difference(a: np.ndarray, b: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """Like :func:`paired_difference`, but for figures of whole sets, from bootstrap draws that took the same pictures.

    Resampling biases both figures alike. There are too few draws for far quantiles, so a normal distribution is
    assumed.
    """
    difference = a - b
    half = float(norm.ppf(_between(level)[1]) * difference.std(ddof=1))
    return float(difference.mean()), float(difference.mean()) - half, float(difference.mean()) + half


# The PSNR of two equal pictures, in dB; finite, so that means stay finite.
EQUAL_PSNR = 99.0


def psnr(pixels: Tensor, reference: Tensor) -> np.ndarray:
    """Return the PSNR in dB, one per picture, at most ``EQUAL_PSNR``; pictures are uint8 ``[B, 3, H, W]``."""
    found = peak_signal_noise_ratio(
        pixels.double(), reference.double(), data_range=255.0, reduction="none", dim=(1, 2, 3)
    )
    return found.clamp(max=EQUAL_PSNR).numpy()


def ssim(pixels: Tensor, reference: Tensor) -> np.ndarray:
    """Return the structural similarity, one per picture; pictures are uint8 ``[B, 3, H, W]``."""
    found = structural_similarity_index_measure(pixels.float(), reference.float(), data_range=255.0, reduction="none")
    return found.double().numpy()


@torch.no_grad()
def perceptual_distance(model: Checker, pixels: Tensor, reference: Tensor) -> np.ndarray:
    """LPIPS on the checker's features (Zhang et al. 2018, equation 1, without learned weights), one per picture.

    The feature vectors at every stage and position are scaled to unit length. Their squared distances are averaged
    over positions and summed over stages. 0 for equal pictures.
    """
    total = torch.zeros(len(pixels), dtype=torch.float64)
    for a, b in zip(model.stages(prepare(pixels)), model.stages(prepare(reference)), strict=True):
        a, b = (x / (x.norm(dim=1, keepdim=True) + 1e-8) for x in (a, b))
        total += (a - b).square().sum(1).mean((1, 2)).double()
    return total.numpy()


class _AsTheyAre(torch.nn.Module):
    """The metric's feature extractor: the identity, because the inputs already are features."""

    num_features = FEATURES

    def forward(self, features: Tensor) -> Tensor:
        return features


class FeatureDistance:
    """Fréchet distance between the checker's features of generated and of reference pictures.

    ``reference``: uint8 ``[N, 3, H, W]``. Features: the last stage, averaged over positions, ``FEATURES`` numbers.
    """

    def __init__(self, model: Checker, reference: Tensor) -> None:
        self.model = model
        # If several processes share a run, only one measures, and it must not wait for the others.
        self.metric = FrechetInceptionDistance(feature=_AsTheyAre(), reset_real_features=False, sync_on_compute=False)
        self.metric.update(self._features(reference), real=True)

    @torch.no_grad()
    def _features(self, pixels: Tensor) -> Tensor:
        found = [self.model.stages(prepare(batch))[-1].mean((2, 3)) for batch in pixels.split(BATCH)]
        return torch.cat(found).double()

    def _distance(self, features: Tensor) -> float:
        self.metric.reset()
        self.metric.update(features, real=False)
        return float(self.metric.compute())

    def __call__(self, pixels: Tensor) -> tuple[float, np.ndarray]:
        """Return the distance and its seeded bootstrap draws over the pictures; sets of equal size get equal draws."""
        features = self._features(pixels)
        rng = np.random.default_rng(0)
        draws = rng.integers(len(features), size=(_FRECHET_BOOTSTRAP, len(features)))
        found = [self._distance(features[torch.from_numpy(draw)]) for draw in draws]
        return self._distance(features), np.array(found)


def spread_of(name: str, value: float, draws: np.ndarray) -> dict[str, float]:
    """Return the value as ``name``, and 95 % of its spread as ``name_low`` and ``name_high``.

    A resampled set repeats pictures, which raises a Fréchet distance. So the mean excess of the draws is removed.
    """
    low, high = np.quantile(draws - draws.mean(), _between(0.95))
    return {name: value, f"{name}_low": max(0.0, value + float(low)), f"{name}_high": value + float(high)}
