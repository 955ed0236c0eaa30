"""The models that the commands load. A model that cannot be loaded is a usage error."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from atedm.cli.checks import DTYPES, bad, lacks_memory, local_model

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionXLPipeline

# The parts of a text-to-image pipeline that read its prompt.
_TEXT = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

# Where the parts of a pipeline may come from. Older releases of diffusers import any other
# module, and run a file of that name beside the weights.
_LIBRARIES = ("diffusers", "transformers")

_MAX_PROMPT_TOKENS = 1 << 20  # SDXL takes 77

_TRIAL_SIDE = 512  # pixels: a size that suits every UNet


def load_config(model: str) -> dict[str, Any]:
    """The UNet configuration that ``model`` names; a usage error if it names none."""
    from atedm.app.models import meta_unet, unet_config, unet_inputs

    with _naming(model):
        try:
            config = unet_config(model)
        except ValueError as error:
            raise bad("model", str(error)) from None
        if model != "sdxl":  # that one is known to be right, and the trial would take 1.4 seconds
            # A call on the meta device finds a configuration that makes no UNet, or one that needs other inputs.
            unet = meta_unet(config)
            positional, named = unet_inputs(unet, width=_TRIAL_SIDE, height=_TRIAL_SIDE)
            unet(*positional, **named)
    return config


def load_pipeline(
    model: str, dtype: str, variant: str | None, device: torch.device, allow_pickled: bool = False
) -> StableDiffusionXLPipeline:
    """The pipeline on ``device``; a usage error if ``model`` is not an SDXL pipeline.

    ``allow_pickled``: also read weights that are not safetensors. Reading them can run code that they contain.
    """
    import torch
    from diffusers import StableDiffusionXLPipeline

    folder = local_model(model)
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") != 1
    if folder is None and looks_like_path:
        raise bad("model", f"{model} does not exist; expected a diffusers folder or a hub id such as owner/name")
    if folder is not None and folder.is_file():
        raise bad("model", f"{model} is a file; expected a diffusers folder or a hub id")
    if folder is not None and not (folder / "model_index.json").is_file():
        raise bad("model", f"{model} holds no model_index.json; expected the folder of a diffusers pipeline")
    if folder is not None and variant is not None:
        _check_names(folder, variant)
    source = model if folder is None else str(folder)
    with _naming(model), warnings.catch_warnings():
        # New releases of diffusers prefer another name for torch_dtype; older ones know only this one.
        warnings.simplefilter("ignore", FutureWarning)
        config = StableDiffusionXLPipeline.load_config(source)
        name = config.get("_class_name")
        if not str(name).startswith("StableDiffusionXL"):
            raise bad("model", f"{model} is a {name}; expected a Stable Diffusion XL pipeline")
        for part, found in config.items():
            if isinstance(found, (list, tuple)) and found and _is_own_code(folder, part, found[0]):
                raise bad(
                    "model", f"{model} brings code of its own for its {part}; expected one of diffusers or transformers"
                )
        pipe = StableDiffusionXLPipeline.from_pretrained(
            source,
            torch_dtype=getattr(torch, DTYPES[dtype]),
            variant=variant,
            use_safetensors=None if allow_pickled else True,
        )
    missing = [part for part in _TEXT if getattr(pipe, part) is None]
    if missing:
        raise bad("model", f"{model} has no {missing[0]}; expected a text-to-image model (SDXL's refiner is not one)")
    for part in _TEXT[2:]:
        # If its files are missing, transformers makes a tokenizer without words and without a length.
        if getattr(pipe, part).model_max_length > _MAX_PROMPT_TOKENS:
            raise bad("model", f"{model} has an empty {part}; expected its files in a folder of that name")
    channels, of_latent = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if channels != of_latent:
        raise bad(
            "model",
            f"{model} has a UNet of {channels} channels, its latents have {of_latent}; expected a text-to-image model "
            "(one for inpainting or editing is not)",
        )
    with _naming(model):  # parts whose weights are missing are on no device
        return pipe.to(device)


def _is_own_code(folder: Path | None, part: str, library: object) -> bool:
    if not isinstance(library, str):  # None for a part that the pipeline lacks
        return False
    return library not in _LIBRARIES or (folder is not None and (folder / part / f"{library}.py").exists())


def _check_names(folder: Path, variant: str) -> None:
    """Raise a usage error for a file that diffusers cannot read ``variant`` beside: it takes names apart at dots."""
    for file in folder.glob("*/*"):
        if "." not in file.name:
            raise bad("variant", f"{variant!r} cannot be read, as {file} has no ending; expected that file elsewhere")


@contextlib.contextmanager
def _naming(model: str) -> Iterator[None]:
    """Turn what reading ``model`` raises into a usage error: a damaged file can raise anything, in any library."""
    import torch

    default = torch.get_default_dtype()
    try:
        yield
    except typer.BadParameter:
        raise
    except Exception as error:
        if lacks_memory(error):
            raise
        # The first line says what is wrong; pages of advice on the hub follow.
        first = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise bad("model", f"{model} cannot be loaded: {first}{_advice(model, error, first)}") from None
    finally:
        torch.set_default_dtype(default)  # diffusers changes it to build a model, and leaves it so if that fails


def _advice(model: str, error: Exception, first: str) -> str:
    folder = local_model(model)
    if folder is None:
        return (
            "; it is missing or incomplete in the local cache: give a folder, or download it while online "
            "(with HF_HUB_OFFLINE=1 only the cache is used)"
        ) * isinstance(error, OSError)
    is_missing = "no file named" in first.lower() and "safetensors" in first
    if is_missing and any(str(file.parent) in first for file in folder.glob("*/*.bin")):
        return "; --allow-pickled reads other weights than safetensors"
    return ""
