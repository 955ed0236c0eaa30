"""A Stable Diffusion XL pipeline small enough to ship inside the package: ``atedm demo`` needs no download.

The classes are diffusers' and transformers' own and the UNet has SDXL's level structure (none, shallow, deep), so
whatever works here works on the real checkpoint. The weights are seeded random numbers: the pictures are textures,
but attention is made to have structure, so that the token masks show something.
"""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

# What the demo says about the weights.
WEIGHTS_NOTE = "The embedded model has random weights: it shows the mechanism and its cost, not picture quality."

MAX_TEXT_TOKENS = 77
TEXT_WIDTHS = (32, 64)
CHANNELS = (32, 64, 128)
LATENT_SIZE = 64
_TIME_EMBEDDING = 32

_START, _END = "<|startoftext|>", "<|endoftext|>"

# Words that prompts are made of; the merges of the byte-pair encoding are learned from them.
_WORDS = """
a an the of in on at with and to over under by from photo photograph picture painting drawing portrait landscape
render illustration style light lighting dark bright soft detailed realistic cinematic colorful high quality
red green blue yellow orange purple pink black white gray brown golden silver big small old young tall round
man woman child girl boy dog cat bird horse fox lion fish tree forest flower grass mountain river lake sea ocean
beach sky cloud sun moon star night day morning evening sunset sunrise winter summer snow rain fire water city
street house castle bridge car train boat ship astronaut robot dragon circle square triangle line stripe ring
riding standing sitting walking running flying looking wearing holding
"""
_MERGES = 384


def embedded_pipeline(seed: int = 0) -> StableDiffusionXLPipeline:
    """The small pipeline: float32 on the CPU, latents ``[B, 4, 64, 64]``, images of 512×512.

    Its UNet has no attention at level 1, blocks of depth 2 with 1024 tokens at level 2 and of depth 4 with 256
    tokens at level 3. The same ``seed`` gives the same weights; torch's global random generator is left as it was.
    """
    import torch
    from diffusers import StableDiffusionXLPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = _tokenizer()
        text_encoder, text_encoder_2 = _text_encoders(tokenizer)
        unet = _unet(text_encoder_2.config.projection_dim)
        vae = _vae()
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=_tokenizer(),
        unet=unet,
        scheduler=_scheduler(),
        add_watermarker=False,
    )
    for model in (text_encoder, text_encoder_2, unet, vae):
        model.eval().requires_grad_(False)
    return pipe


def _byte_characters() -> list[str]:
    """The 256 printable characters that stand for bytes in CLIP's vocabulary, in CLIP's order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = len(set(range(256)) - set(plain))
    return [chr(byte) for byte in plain] + [chr(256 + n) for n in range(others)]


def _learn_merges(words: list[str], count: int) -> list[tuple[str, str]]:
    """Byte-pair encoding: join the most frequent neighbouring pair, again and again; ties by spelling."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs = Counter(pair for word in pieces for pair in itertools.pairwise(word))
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = [_joined(word, best) for word in pieces]
    return merges


def _joined(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def _tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which every byte has a token, so that no prompt has unknown ones."""
    from transformers import CLIPTokenizer

    merges = _learn_merges(_WORDS.split(), _MERGES)
    characters = _byte_characters()
    tokens = [*characters, *(c + "</w>" for c in characters), *dict.fromkeys(a + b for a, b in merges), _START, _END]
    # By way of files: the constructor's arguments changed with transformers 5, the files did not.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        vocabulary = {token: n for n, token in enumerate(tokens)}
        path.joinpath("vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
        path.joinpath("merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        settings = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": MAX_TEXT_TOKENS,
            "bos_token": _START,
            "eos_token": _END,
            "unk_token": _END,
            "pad_token": _END,
        }
        path.joinpath("tokenizer_config.json").write_text(json.dumps(settings))
        return CLIPTokenizer.from_pretrained(folder)


def _text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def config(width: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_TEXT_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    first, second = (config(width) for width in TEXT_WIDTHS)
    return CLIPTextModel(first), CLIPTextModelWithProjection(second)


def _unet(pooled_width: int) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=CHANNELS,
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 4),
        # diffusers reads this as the number of heads: 32 channels each, as SDXL has 64 each.
        attention_head_dim=tuple(channels // 32 for channels in CHANNELS),
        norm_num_groups=16,
        cross_attention_dim=sum(TEXT_WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=_TIME_EMBEDDING,
        projection_class_embeddings_input_dim=pooled_width + 6 * _TIME_EMBEDDING,
    )
    _sharpen_attention(unet)
    return unet


def _sharpen_attention(unet: UNet2DConditionModel, gain: float = 2.5) -> None:
    """Give random attention some structure: torch's default weights leave its maps flat."""
    for name, module in unet.named_modules():
        if name.rpartition(".")[2] in ("to_q", "to_k"):
            # Default weights have variance 1/(3·fan_in); this makes a unit input's projection have variance gain.
            module.weight.data.mul_(math.sqrt(3 * gain))


def _vae() -> AutoencoderKL:
    from diffusers import AutoencoderKL

    widths = (16, 32, 32, 32)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=LATENT_SIZE * 8,
        scaling_factor=0.13025,
    )


def _scheduler() -> EulerDiscreteScheduler:
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
    )
