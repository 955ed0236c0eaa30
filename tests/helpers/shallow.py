"""Builds the embedded model with fewer layers, for tests of how a pipeline behaves, not of how well it draws."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from atedm.embedded import embedded_pipeline

# SDXL has 2 and 10 layers at its two levels, the embedded model 2 and 6. Pruning between layers needs at least two.
LAYERS = (1, 2, 2)


def shallow_pipeline(side: int | None = None, layers: Sequence[int] = LAYERS) -> Any:
    """Return the embedded pipeline with only the first ``layers`` of its attention blocks, with their trained weights.

    ``side``: the pipeline's default picture size in pixels; by default the embedded model's.
    """
    pipe = embedded_pipeline()
    pipe.set_progress_bar_config(disable=True)
    config = {key: value for key, value in pipe.unet.config.items() if not key.startswith("_")}
    config["transformer_layers_per_block"] = tuple(layers)
    if side is not None:
        config["sample_size"] = side // pipe.vae_scale_factor
    unet = diffusers.UNet2DConditionModel(**config)
    missing = unet.load_state_dict(pipe.unet.state_dict(), strict=False).missing_keys
    if missing:
        raise ValueError(f"the embedded model has no {missing[0]}; expected no more layers than it has")
    parts = {**pipe.components, "unet": unet.eval().requires_grad_(False)}
    pipe = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_shallow(folder: Path, side: int | None = None, layers: Sequence[int] = LAYERS) -> None:
    """Save :func:`shallow_pipeline` in half precision, as the embedded model is, so that it loads in the same way.

    Float32 weights would stay in memory where the file puts them, and sums over them would round differently.
    """
    shallow_pipeline(side, layers).to(dtype=torch.float16).save_pretrained(folder)
