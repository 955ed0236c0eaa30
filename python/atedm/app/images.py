"""Images: convert them from a pipeline's pixels, write and read files, and compare two."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from PIL.Image import Image
from torch import Tensor

from atedm.files import whole_file


@contextlib.contextmanager
def unclamped(pipe: Any) -> Iterator[None]:
    """Let ``pipe`` return the pixels as its autoencoder decodes them, to see those that are not finite."""
    processor, mark = pipe.image_processor, getattr(pipe, "watermark", None)
    before = processor.config.do_normalize
    # Otherwise the processor clamps pixels to 0 and 1, which makes finite ones of infinite ones.
    processor.register_to_config(do_normalize=False)
    if mark is not None:  # it clamps too
        mark.apply_watermark = _only_finite(mark.apply_watermark)
    try:
        yield
    finally:
        processor.register_to_config(do_normalize=before)
        if mark is not None:
            del mark.apply_watermark


def _only_finite(apply: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``apply``, which marks pictures ``[B, 3, H, W]``, but it leaves those as they are that are not finite."""

    def applied(images: Tensor) -> Tensor:
        marked = apply(images)
        is_finite = images.flatten(1).isfinite().all(dim=1).to(marked.device)
        return marked.where(is_finite[:, None, None, None], images.to(marked))

    return applied


def images_of(pipe: Any, pixels: Tensor) -> list[Image | None]:
    """The images of ``output_type="pil"``; None for a picture with NaN or infinite pixels, which would be one colour.

    Args:
        pipe: the pipeline. pixels: ``[B, 3, H, W]``, -1 for black and 1 for white: the pipeline's output with
            ``output_type="pt"``, made in a block of :func:`unclamped`.
    """
    is_finite = pixels.flatten(1).isfinite().all(dim=1).cpu()
    processor = pipe.image_processor
    pixels = processor.denormalize(pixels[is_finite.to(pixels.device)])
    images = iter(processor.numpy_to_pil(processor.pt_to_numpy(pixels)))
    return [next(images) if finite else None for finite in is_finite.tolist()]


def save_image(image: Image, path: Path) -> None:
    """Write a PNG atomically: an interrupted run never leaves half a file."""
    with whole_file(path) as partial:
        image.save(partial, format="PNG")


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # pillow raises many types for a damaged file
        raise OSError(f"{path} cannot be read as a picture: {error}; delete it or replace it") from error


def open_image(path: Path) -> Image:
    """Read a whole picture, in RGB.

    Raises:
        OSError: the file is missing, truncated or not a picture; the message names it.
    """
    with _naming(path), PIL.Image.open(path) as image:
        return image.convert("RGB")


def check_image(path: Path) -> None:
    """Check by its checksums that a picture is whole, which takes far less time than reading its pixels.

    Raises:
        OSError: as :func:`open_image`.
    """
    with _naming(path), PIL.Image.open(path) as image:
        image.verify()


def psnr_db(image: Image, reference: Image) -> float | None:
    """Peak signal-to-noise ratio of 8-bit images in dB; None if they are equal (it would be infinite)."""
    error = np.asarray(image, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    mean_square = float(np.mean(error**2))
    return None if mean_square == 0 else 10 * math.log10(255**2 / mean_square)
