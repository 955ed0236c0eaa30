"""Stable Diffusion XL's UNet without a download: its configuration, empty models and the inputs of a call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

# The keyword arguments of the UNet2DConditionModel of stabilityai/stable-diffusion-xl-base-1.0 (unet/config.json) that
# differ from diffusers' defaults. attention_head_dim is the number of heads, a misnomer in diffusers.
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

# Pixels of an image per element of its latent, along each side.
LATENT_SCALE = 8

# Count of numbers in SDXL's micro-conditioning: original size, crop, target size.
TIME_IDS = 6


def unet_config(model: str) -> dict[str, Any]:
    """The UNet configuration that ``model`` names.

    Args:
        model: ``"sdxl"``, or a local folder of a diffusers pipeline or of its UNet.

    Raises:
        ValueError: ``model`` is neither.
    """
    if model == "sdxl":
        return dict(SDXL_UNET)
    folder = Path(model).expanduser()
    for candidate in (folder / "unet", folder):
        if not (candidate / "config.json").is_file():
            continue
        config = UNet2DConditionModel.load_config(candidate)
        if not isinstance(config, Mapping):
            raise ValueError(f"{model!r} holds the configuration {str(config)[:40]}; expected a UNet2DConditionModel's")
        if config.get("_class_name") != "UNet2DConditionModel":
            raise ValueError(
                f"{model!r} holds the configuration of a {config.get('_class_name')}; expected a UNet2DConditionModel"
            )
        return dict(config)
    raise ValueError(
        f"{model!r} is neither 'sdxl' nor a folder with unet/config.json or config.json; "
        "expected 'sdxl' or a diffusers folder on this machine"
    )


def meta_unet(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """A UNet in evaluation mode on the meta device: it has shapes but no weights, and uses no memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(config))
    # Not unet.to(): diffusers' version warns about parts to keep in float32 even if there are none.
    return torch.nn.Module.to(unet, dtype).eval().requires_grad_(False)


# In pixels. SDXL draws 1024; at this size its attention at level 2 would take hours: its map has 2^44 entries per head.
MAX_SIDE = 2**15
_MAX_DIGITS = 20  # Python refuses to parse thousands of digits


def image_size(text: str) -> tuple[int, int]:
    """``(width, height)`` in pixels from ``"1024"`` or ``"1216x832"``.

    Raises:
        ValueError: the text has another form, or the size does not fit the latent or is above ``MAX_SIDE``.
    """
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.strip().isdecimal() and len(side) <= _MAX_DIGITS for side in sides):
        raise ValueError(f"{text!r} is not a size; expected a side such as 1024, or WIDTHxHEIGHT such as 1216x832")
    width, height = int(sides[0]), int(sides[-1])
    latent_size(width, height)
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"{text!r} is larger than any picture; expected sides of at most {MAX_SIDE} pixels")
    return width, height


def latent_size(width: int, height: int) -> tuple[int, int]:
    """``(h, w)`` of the latent of an image of ``width`` × ``height`` pixels.

    Raises:
        ValueError: a side is not a positive multiple of ``LATENT_SCALE``.
    """
    for name, pixels in (("width", width), ("height", height)):
        if pixels <= 0 or pixels % LATENT_SCALE:
            raise ValueError(f"{name} is {pixels} pixels; expected a positive multiple of {LATENT_SCALE}")
    return height // LATENT_SCALE, width // LATENT_SCALE


def unet_inputs(
    unet: UNet2DConditionModel,
    *,
    width: int,
    height: int,
    batch: int = 1,
    tokens: int = 77,
    timestep: float = 500.0,
    seed: int = 0,
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """Arguments of one call of ``unet``, in its dtype and on its device.

    Args:
        width, height: size of the image in pixels. tokens: number of text tokens. timestep: the same for the whole
            batch.
        seed: seed of the standard normal values, which are drawn on the CPU so that every device gets the same ones. A
            UNet on the meta device gets no values.

    Returns:
        ``(sample [B, C, h, w], timestep [], encoder_hidden_states [B, tokens, E])``, and ``added_cond_kwargs`` and
        ``return_dict=False`` as keyword arguments.

    Raises:
        ValueError: the size does not fit the latent.
    """
    h, w = latent_size(width, height)
    config, device, dtype = unet.config, unet.device, unet.dtype
    # A UNet that projects its text (Kolors) takes the text in the text encoder's width.
    text = config.encoder_hid_dim if config.encoder_hid_dim_type == "text_proj" else config.cross_attention_dim
    text = text if isinstance(text, int) else text[0]
    generator = None if device.type == "meta" else torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        if device.type == "meta":
            return torch.empty(shape, device=device, dtype=dtype)
        return torch.randn(shape, generator=generator).to(device, dtype)

    kwargs: dict[str, Any] = {"return_dict": False}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim
        ids = torch.tensor([height, width, 0, 0, height, width], dtype=dtype, device=device).expand(batch, TIME_IDS)
        kwargs["added_cond_kwargs"] = {"text_embeds": normal(batch, pooled), "time_ids": ids}
    elif config.addition_embed_type is not None:
        raise ValueError(f"the UNet has addition_embed_type {config.addition_embed_type!r}; expected text_time or none")
    positional = (
        normal(batch, config.in_channels, h, w),
        torch.tensor(timestep, device=device),
        normal(batch, tokens, text),
    )
    return positional, kwargs
