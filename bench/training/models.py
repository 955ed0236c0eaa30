"""Builds the untrained parts of the pipeline, with SDXL's classes and structure, but small."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
from diffusers import AutoencoderKL, DDPMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from atedm.files import whole_folder
from atedm_bench.scenes import caption
from atedm_bench.scenes.split import scenes
from atedm_bench.training.config import TEXT_HEAD_DIM, VAE_NORM_GROUPS, Config

_START, _END = "<|startoftext|>", "<|endoftext|>"
_TIME_EMBEDDING = 32
_TIME_IDS = 6

# SDXL's noise schedule, stretched so that it ends in pure noise. Otherwise flat backgrounds would reveal their colour.
_NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def build_tokenizer(config: Config, folder: Path) -> CLIPTokenizer:
    """Learn byte-pair merges from captions and save a CLIP tokenizer to ``folder``; every byte has a token."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    rng = np.random.default_rng([config.seed, 1])
    captions = [caption(s, rng) for s in itertools.islice(scenes(rng, test=False), config.tokenizer.captions)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    model.normalizer = normalizers.Lowercase()
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=config.tokenizer.vocabulary, initial_alphabet=alphabet, end_of_word_suffix="</w>"
        ),
    )
    learned = json.loads(model.to_str())["model"]["merges"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learned]
    letters = sorted(alphabet)
    tokens = [*letters, *(c + "</w>" for c in letters), *dict.fromkeys(a + b for a, b in merges), _START, _END]
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": config.tokenizer.max_tokens,
        "bos_token": _START,
        "eos_token": _END,
        "unk_token": _END,
        "pad_token": _END,
    }
    # Go through files: transformers 5 changed the constructor's arguments but not the files.
    with whole_folder(folder) as partial:
        partial.joinpath("vocab.json").write_text(json.dumps({token: n for n, token in enumerate(tokens)}), "utf-8")
        partial.joinpath("merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        partial.joinpath("tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def build_text_encoders(config: Config, tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Build two encoders of different widths. The second one's projection is the pooled embedding, as in SDXL."""
    first, second = (
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=width // TEXT_HEAD_DIM,
            max_position_embeddings=config.tokenizer.max_tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for width, layers in zip(config.text.widths, config.text.layers, strict=True)
    )
    return CLIPTextModel(first), CLIPTextModelWithProjection(second)


def build_unet(config: Config) -> UNet2DConditionModel:
    """Build the UNet with SDXL's levels: no attention, depth 2, deep.

    Its projections are linear, and text and size are added to the time embedding.
    """
    unet = config.unet
    return UNet2DConditionModel(
        sample_size=unet.sample_size,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=unet.channels,
        layers_per_block=2,
        transformer_layers_per_block=unet.depth,
        # diffusers reads this as the number of heads.
        attention_head_dim=tuple(channels // unet.head_dim for channels in unet.channels),
        norm_num_groups=unet.norm_groups,
        cross_attention_dim=sum(config.text.widths),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=_TIME_EMBEDDING,
        projection_class_embeddings_input_dim=config.text.widths[1] + _TIME_IDS * _TIME_EMBEDDING,
    )


def build_vae(config: Config) -> AutoencoderKL:
    """Build the autoencoder: four latent channels, as in SDXL; no attention, which would depend on the image size."""
    vae = config.vae
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(vae.channels),
        up_block_types=("UpDecoderBlock2D",) * len(vae.channels),
        block_out_channels=vae.channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=VAE_NORM_GROUPS,
        sample_size=config.unet.sample_size * vae.scale,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def sampling_scheduler() -> EulerDiscreteScheduler:
    """Return the pipeline's scheduler."""
    return EulerDiscreteScheduler(**_NOISE)


def training_scheduler() -> DDPMScheduler:
    """Return a scheduler with the same noise, for training."""
    return DDPMScheduler(**_NOISE)
