"""Stage 3: the UNet and the text encoders together, at growing sizes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from atedm.bench.training.config import Config, Phase
from atedm.bench.training.data import draw, generator, pictures, tokenize
from atedm.bench.training.loop import Counter, Stage, newest_checkpoint
from atedm.bench.training.models import build_unet, training_scheduler
from atedm.bench.training.text import TextEncoders

_STAGE = 4
_FOLDER = "unet-training"
_WARM_UP_STEPS = 100

# Up to this many latent elements a side, the backward of unfused attention is the faster one on a CPU.
_UNFUSED_UP_TO = 32


class Denoiser(nn.Module):
    """Captions and noisy latents to predictions: all that learns, in one module."""

    def __init__(self, unet: nn.Module, encoders: TextEncoders) -> None:
        super().__init__()
        self.unet = unet
        self.encoders = encoders

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor, said: Tensor, size: int) -> Tensor:
        """``said`` float ``[B]``: 0 where the caption is dropped, as the pipeline drops it for guidance."""
        states, pooled = self.encoders(ids)
        time_ids = torch.tensor([size, size, 0, 0, size, size], dtype=noisy.dtype).expand(len(noisy), -1)
        return self.unet(
            noisy,
            timesteps,
            encoder_hidden_states=states * said[:, None, None],
            added_cond_kwargs={"text_embeds": pooled * said[:, None], "time_ids": time_ids},
        ).sample


def _phase_at(config: Config, images: int) -> tuple[Phase, float]:
    """The phase that image number ``images`` belongs to, and how much of it is done, 0 … 1."""
    before = 0
    for phase in config.unet.phases:
        if images < before + phase.images:
            return phase, (images - before) / phase.images
        before += phase.images
    return config.unet.phases[-1], 1.0


def _optimizers(model: Denoiser, config: Config) -> list[torch.optim.Optimizer]:
    """Muon for the transformers' matrices, AdamW for the rest; the learning rate is set at each step."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inside = "transformer_blocks" in name or ".layers." in name
        (matrices if inside and parameter.ndim == 2 else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _build(config: Config, folder: Path) -> Denoiser:
    encoders = TextEncoders(
        CLIPTextModel.from_pretrained(folder / "text_encoder"),
        CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"),
    )
    return Denoiser(build_unet(config), encoders)


def _average(model: Denoiser, config: Config) -> EMAModel:
    return EMAModel(model.parameters(), decay=config.unet.ema_decay, use_ema_warmup=True, power=0.75)


def load_average(config: Config, folder: Path) -> tuple[Denoiser, Counter]:
    """The moving average of the newest checkpoint, and how far it has come.

    Raises:
        FileNotFoundError: ``folder`` holds no checkpoint of the UNet.
    """
    checkpoint = newest_checkpoint(folder / _FOLDER)
    if checkpoint is None:
        raise FileNotFoundError(f"{folder / _FOLDER} holds no checkpoint; expected one of a training's UNet stage")
    model = _build(config, folder)
    average, counter = _average(model, config), Counter()
    # Registered in this order below: accelerate numbers what it saves.
    for n, part in enumerate((counter, average)):
        part.load_state_dict(torch.load(checkpoint / f"custom_checkpoint_{n}.pkl", weights_only=True))
    average.copy_to(model.parameters())
    return model.eval(), counter


def train_unet(config: Config, folder: Path, accelerator: Accelerator) -> None:
    """Train from the encoders in ``folder``; the result, with its moving average, is the last checkpoint."""
    recipe = config.unet
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval().requires_grad_(False)
    stage = Stage(accelerator, folder / _FOLDER, "UNet")
    model = _build(config, folder)
    average = _average(model, config)
    noise = training_scheduler()
    optimizers = _optimizers(model, config)
    factors = [recipe.matrix_learning_rate, 1.0]
    model, *optimizers = accelerator.prepare(model, *optimizers)
    accelerator.register_for_checkpointing(average)
    stage.resume()
    phase_steps = {"phase": None, "steps": 0}

    def step(counter: Counter) -> tuple[int, dict[str, float]]:
        phase, done = _phase_at(config, counter.images)
        if phase_steps["phase"] is not phase:
            phase_steps.update(phase=phase, steps=0)
        phase_steps["steps"] += 1
        start, end = phase.learning_rate
        rate = (start + (end - start) * done) * min(1.0, phase_steps["steps"] / _WARM_UP_STEPS)
        for optimizer, factor in zip(optimizers, factors, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        count = phase.batch // accelerator.num_processes
        seed = (config.seed, _STAGE, counter.step, accelerator.process_index)
        rng = generator(*seed)
        found, captions = draw(rng, count)
        size = phase.latent * config.vae.scale
        with torch.no_grad(), accelerator.autocast():
            latents = vae.encode(pictures(found, size)).latent_dist.mean.float() * vae.config.scaling_factor
        random = torch.Generator().manual_seed(int(rng.integers(2**62)))
        clean_noise = torch.randn(latents.shape, generator=random)
        # One draw a stratum: the same mean as uniform draws, with less noise in the loss.
        spread = (torch.arange(count) + torch.rand(count, generator=random)) / count
        timesteps = (spread * noise.config.num_train_timesteps).long()
        said = (torch.rand(count, generator=random) >= recipe.caption_dropout).float()
        target = noise.get_velocity(latents, clean_noise, timesteps)
        unfused = sdpa_kernel(SDPBackend.MATH) if phase.latent <= _UNFUSED_UP_TO else contextlib.nullcontext()
        with unfused:
            predicted = model(
                noise.add_noise(latents, clean_noise, timesteps), timesteps, tokenize(tokenizer, captions), said, size
            )
            loss = F.mse_loss(predicted.float(), target)
            accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.step(model.parameters())
        return phase.batch, {"loss": float(loss.detach()), "norm": float(norm), "lr": rate}

    stage.run(sum(phase.images for phase in recipe.phases), step)
