"""A Stable Diffusion XL pipeline that is small enough to ship inside the package, so ``atedm demo`` needs no download.

The classes are diffusers' and transformers' own, and the UNet's attention has SDXL's level structure (none, shallow,
deep), so whatever works here works on the real checkpoint. README.md beside this file is the model card.
"""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

WEIGHTS = Path(__file__).with_name("weights")

# What the demo prints about the model.
ABOUT = (
    "The embedded model was trained only on drawn scenes: up to three circles, squares, triangles, stars, crosses or "
    "rings, small to large, in nine colours, left of, right of, above or below each other, on a background."
)


def embedded_pipeline() -> StableDiffusionXLPipeline:
    """Load the small pipeline from the package's own files: float32 on the CPU, for inference.

    By default its images have ``unet.config.sample_size * vae_scale_factor`` pixels per side. Torch's global random
    generator stays unchanged.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        FileNotFoundError: the package was installed without its weights.
    """
    try:
        import transformers  # noqa: F401 (diffusers has placeholders instead of pipelines without it)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "embedded_pipeline needs transformers; pip install 'atedm-kernels[generate]'", name=error.name
        ) from error
    if not (WEIGHTS / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{WEIGHTS} holds no model_index.json; expected the embedded model: reinstall atedm-kernels"
        )
    import torch

    with _quiet(), torch.random.fork_rng(devices=[]):
        # Imported here, because this import also gives advice, on packages that only image inputs need.
        from diffusers import StableDiffusionXLPipeline

        pipe = StableDiffusionXLPipeline.from_pretrained(
            WEIGHTS,
            torch_dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            add_watermarker=False,
        )
    for part in (pipe.text_encoder, pipe.text_encoder_2, pipe.unet, pipe.vae):
        part.eval().requires_grad_(False)
    return pipe


def unknown_words(prompt: str) -> list[str]:
    """The words of ``prompt`` that no training caption had, in lower case, each once, in their order."""
    words = re.findall(r"\w+", prompt.lower())
    return [word for word in dict.fromkeys(words) if word not in _known_words()]


@functools.cache
def _known_words() -> frozenset[str]:
    # Read from a file, because the tokenizer's vocabulary also has parts of words.
    return frozenset(Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Turn off the libraries' progress bars and advice while the package's own files load, and restore both after."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    libraries = (of_diffusers, of_transformers)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # New releases of diffusers prefer another name for torch_dtype; older ones know only this one.
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
