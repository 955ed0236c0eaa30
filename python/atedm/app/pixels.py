"""Images of the pixels that a pipeline makes; a picture that is not finite has none."""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch import Tensor


def images_of(pipe: Any, pixels: Tensor) -> list[Image.Image | None]:
    """What ``output_type="pil"`` gives; None for a picture with NaN or infinite pixels, which it would turn black.

    Args:
        pipe: the pipeline. pixels: ``[B, 3, H, W]`` in 0 to 1, as its ``output_type="pt"`` gives them.
    """
    is_finite = pixels.flatten(1).isfinite().all(dim=1).cpu()
    processor = pipe.image_processor
    images = iter(processor.numpy_to_pil(processor.pt_to_numpy(pixels[is_finite.to(pixels.device)])))
    return [next(images) if finite else None for finite in is_finite.tolist()]
