"""Measures a real checkpoint's pictures: FID against real pictures, CLIP score against prompts (torchmetrics)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.multimodal.clip_score import CLIPScore

from atedm.app.images import open_image
from atedm.app.prompts import PromptCase
from atedm_bench.quality import metrics
from atedm_bench.quality.checker import FEATURES, load_checker, prepare
from atedm_bench.quality.lab import Figures

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
# Pictures are resized to this size for the Inception network, as the definition of FID asks.
_FID_SIZE = 299
_BATCH = 16
# If several processes share a run, only one measures, and it must not wait for the others.
_ALONE = {"sync_on_compute": False}


def reference_paths(folder: Path) -> list[Path]:
    """Return the pictures in ``folder`` and its subfolders.

    Raises:
        ValueError: there are fewer than two, so no distance can be computed.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if len(found) < 2:
        raise ValueError(f"references: {folder} holds {len(found)} pictures; expected at least 2")
    return found


class _CheckerFeatures(torch.nn.Module):
    num_features = FEATURES

    def __init__(self) -> None:
        super().__init__()
        self.model = load_checker()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.stages(prepare(pixels))[-1].mean((2, 3))


class _Clip(torch.nn.Module):
    """A CLIP model that returns its features as tensors; transformers 5 wraps them in an output object."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def get_image_features(self, pixels: Tensor) -> Tensor:
        return _tensor(self.model.get_image_features(pixels))

    def get_text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        return _tensor(self.model.get_text_features(ids, mask))


def _tensor(features: Any) -> Tensor:
    return features if isinstance(features, Tensor) else features.pooler_output


def _load_clip(name: str, allow_pickled: bool) -> tuple[torch.nn.Module, Any]:
    """Load a CLIP model by hub id or folder.

    Raises:
        ValueError: it cannot be loaded; the message names it.
    """
    from transformers import CLIPModel, CLIPProcessor

    try:
        model = CLIPModel.from_pretrained(name, use_safetensors=None if allow_pickled else True)
        return _Clip(model.eval()), CLIPProcessor.from_pretrained(name)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file can raise anything
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"clip-model: {name} cannot be loaded: {first}; expected a folder, or a hub id that is in the local cache "
            "or can be downloaded"
        ) from error


def _square(path: Path) -> Tensor:
    """Load a picture as uint8 ``[1, 3, 299, 299]``."""
    resized = open_image(path).resize((_FID_SIZE, _FID_SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1)[None]


class ReferenceFigures:
    """Computes ``fid`` and ``clip_score``, and PSNR and SSIM to the full model's pictures.

    The networks stay on the CPU, and the references unread, until the first call: drawing comes before it and needs the
    memory.

    Args:
        features: ``"inception"`` (downloads its weights once) or ``"checker"`` (offline, for tests: not an FID).
        clip_model: hub id or folder of the CLIP model. allow_pickled: whether its weights may be pickled.

    Raises:
        ValueError: the CLIP model cannot be loaded, or there are fewer than two references.
    """

    def __init__(
        self,
        cases: Sequence[PromptCase],
        references: Path,
        features: str,
        clip_model: str,
        device: torch.device,
        allow_pickled: bool = False,
    ) -> None:
        self.cases = cases
        self.device = device
        self._unread = reference_paths(references)
        extractor: Any = 2048 if features == "inception" else _CheckerFeatures()
        self.fid = FrechetInceptionDistance(feature=extractor, reset_real_features=False, **_ALONE)
        # Pass a function, because torchmetrics accepts only some names and no folders.
        load = functools.partial(_load_clip, clip_model, allow_pickled)
        self.clip = CLIPScore(model_name_or_path=load, **_ALONE)

    def _read_references(self) -> None:
        self.fid, self.clip = self.fid.to(self.device), self.clip.to(self.device)
        for start in range(0, len(self._unread), _BATCH):
            batch = torch.cat([_square(path) for path in self._unread[start : start + _BATCH]])
            self.fid.update(batch.to(self.device), real=True)
        self._unread = []

    def __call__(self, paths: Sequence[Path], full: Sequence[Path]) -> Figures:
        if self._unread:
            self._read_references()
        self.fid.reset()
        found: dict[str, list[float]] = {"clip_score": [], "psnr_db": [], "ssim": []}
        for n, path in enumerate(paths):
            picture = _pixels(path)
            self.fid.update(_square(path).to(self.device), real=False)
            self.clip.reset()
            self.clip.update(picture.to(self.device), [self.cases[n].prompt])
            found["clip_score"].append(float(self.clip.compute()))
            if paths is not full:
                other = _pixels(full[n])
                found["psnr_db"].append(metrics.psnr(picture, other).item())
                found["ssim"].append(metrics.ssim(picture, other).item())
        samples = {name: np.array(values) for name, values in found.items() if values}
        row = {"fid": float(self.fid.compute())}
        for name, values in samples.items():
            row |= metrics.mean_of(name, values)
        return Figures(row, samples)


def _pixels(path: Path) -> Tensor:
    return torch.from_numpy(np.asarray(open_image(path)).copy()).permute(2, 0, 1)[None]
