"""Stage 3: trains the UNet and the text encoders together, at growing sizes."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from atedm_bench.scenes import COLORS, SHAPES, Scene, render
from atedm_bench.training.config import Config, Phase, UnetRecipe
from atedm_bench.training.data import as_tensor, batches, draw, tokenize
from atedm_bench.training.loop import Counter, Stage, load_part, newest_checkpoint
from atedm_bench.training.models import build_unet, training_scheduler
from atedm_bench.training.text import TextEncoders

_STAGE = 4
_FOLDER = "unet-training"
# Steps of warm-up at the start of every phase.
_WARM_UP_STEPS = 100

# Below this timestep (of 1000), which is sigma 5, the noise no longer hides where objects are.
_PLACED_BELOW = 740

# Channels of a layout: the shapes and "none", then the colours and "none".
_LAYOUT = [len(SHAPES) + 1, len(COLORS) + 1]

# Up to this many latent elements per side, the backward of unfused attention is faster on a CPU.
_UNFUSED_UP_TO = 32


class Denoiser(nn.Module):
    """Maps captions and noisy latents to predictions: everything that learns, in one module.

    ``layout`` predicts, from the decoder's output at each of its two transformer levels, which shape and which colour
    cover each element of the clean picture. It exists only in training. From the squared error, the transformers learn
    little about shapes, and only mixed with everything else. The layout is known here, so it serves as a target. This
    is the idea of representation alignment (REPA), with the scene in place of another network's features.
    """

    def __init__(self, unet: UNet2DConditionModel, encoders: TextEncoders) -> None:
        super().__init__()
        self.unet = unet
        self.encoders = encoders
        _, *channels = unet.config.block_out_channels
        self.layout = nn.ModuleList(nn.Conv2d(count, len(SHAPES) + len(COLORS) + 2, 1) for count in reversed(channels))
        self._features: dict[int, Tensor] = {}
        for n in range(len(channels)):
            unet.up_blocks[n].register_forward_hook(functools.partial(self._keep, n))

    def _keep(self, n: int, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._features[n] = output

    def forward(
        self, noisy: Tensor, timesteps: Tensor, ids: Tensor, said: Tensor, size: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the prediction and, by level, the layout's logits ``[B, S + 1 + C + 1, h, w]``, shapes before colours.

        ``said``: float ``[B]``, 0 where the caption is dropped, as the pipeline drops it for guidance.
        """
        states, pooled = self.encoders(ids)
        time_ids = noisy.new_tensor([size, size, 0, 0, size, size]).expand(len(noisy), -1)
        predicted = self.unet(
            noisy,
            timesteps,
            encoder_hidden_states=states * said[:, None, None],
            added_cond_kwargs={"text_embeds": pooled * said[:, None], "time_ids": time_ids},
        ).sample
        return predicted, [head(self._features[n]) for n, head in enumerate(self.layout)]


def _layout(scene: Scene, owner: np.ndarray, cells: int) -> np.ndarray:
    """Return ``[S + C + 2, cells, cells]``: the fraction of a cell that each shape (or none) covers, then colours."""
    shapes = [SHAPES.index(item.shape) for item in scene.objects] + [len(SHAPES)]
    colors = [list(COLORS).index(item.color) for item in scene.objects] + [len(COLORS)]
    side = len(owner) // cells
    covered = np.zeros((len(SHAPES) + len(COLORS) + 2, cells, cells), np.float32)
    for n, (shape, color) in enumerate(zip(shapes, colors, strict=True)):
        # The last index of each stands for the background, whose owner is -1.
        part = (owner == (n if n < len(scene.objects) else -1)).reshape(cells, side, cells, side).mean((1, 3))
        covered[shape] += part
        covered[len(SHAPES) + 1 + color] += part
    return covered


def _reading_loss(logits: list[Tensor], covered: Tensor) -> Tensor:
    """Return the cross-entropy of the layout ``[B, S + C + 2, h, w]``, summed over levels, shapes and colours."""
    loss = covered.new_zeros(())
    for read in logits:
        there = F.adaptive_avg_pool2d(covered, read.shape[2:])
        for a, b in zip(read.float().split(_LAYOUT, 1), there.split(_LAYOUT, 1), strict=True):
            loss = loss + F.cross_entropy(a, b)
    return loss


def _weights(covered: Tensor, timesteps: Tensor, weight: float) -> Tensor:
    """Return loss weights ``[B, 1, h, w]`` of mean 1, ``weight`` times as high on and around the objects.

    With so much noise that it hides where the objects are, all weights are 1. Higher ones would mislead: the predicted
    mean would show more than is really there.
    """
    near = F.max_pool2d(1 - covered[:, len(SHAPES) : len(SHAPES) + 1], 3, stride=1, padding=1) > 0
    placed = (timesteps < _PLACED_BELOW)[:, None, None, None]
    weights = torch.where(near & placed, weight, 1.0)
    return weights / weights.mean()


def _timesteps(recipe: UnetRecipe, count: int, random: torch.Generator) -> Tensor:
    """Draw ``[count]`` timesteps in 0 … 1: logit-normal around where a picture takes shape, sometimes uniform."""
    # One draw per stratum: the same mean as independent draws, with less noise in the loss.
    spread = (torch.arange(count) + torch.rand(count, generator=random)) / count
    normal = torch.special.expit(recipe.timestep_mean + torch.special.ndtri(spread.clamp(1e-4, 1 - 1e-4)))
    uniform = torch.rand(count, generator=random)
    return torch.where(torch.rand(count, generator=random) < recipe.uniform_timesteps, uniform, normal)


def _phase_at(config: Config, step: int) -> tuple[Phase, float, int]:
    """Return the phase of a step, the fraction of the phase that is done (0 … 1), and its number of earlier steps."""
    for phase in config.unet.phases:
        steps = -(-phase.images // phase.batch)
        if step < steps:
            return phase, step / steps, step
        step -= steps
    return config.unet.phases[-1], 1.0, step


def _optimizers(model: Denoiser, config: Config) -> list[torch.optim.Optimizer]:
    """Return Muon for the transformers' matrices and AdamW for the rest. The learning rate is set at each step."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inside = "transformer_blocks" in name or ".layers." in name
        (matrices if inside and parameter.ndim == 2 else others).append(parameter)
    return [
        # Three steps instead of five: on two cores, orthogonalising these many small matrices is a fifth of the time.
        torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw", ns_steps=3),
        torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _build(config: Config, folder: Path) -> Denoiser:
    encoders = TextEncoders(
        CLIPTextModel.from_pretrained(folder / "text_encoder"),
        CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"),
    )
    # If training starts from an exported pipeline, that has a UNet too.
    started = (folder / "unet").is_dir()
    unet = UNet2DConditionModel.from_pretrained(folder / "unet") if started else build_unet(config)
    # Exported weights are in half precision.
    return Denoiser(unet, encoders).float()


def _average(model: Denoiser, config: Config) -> EMAModel:
    return EMAModel(model.parameters(), decay=config.unet.ema_decay, use_ema_warmup=True, power=0.75)


def load_average(config: Config, folder: Path) -> tuple[Denoiser, Counter]:
    """Load the moving average of the newest checkpoint, and its training progress.

    Raises:
        FileNotFoundError: ``folder`` holds no checkpoint of the UNet.
    """
    checkpoint = newest_checkpoint(folder / _FOLDER)
    if checkpoint is None:
        raise FileNotFoundError(f"{folder / _FOLDER} holds no checkpoint; expected one of a training's UNet stage")
    model = _build(config, folder)
    average, counter = _average(model, config), Counter()
    # ``train_unet`` registers them in this order, and accelerate numbers what it saves.
    for n, part in enumerate((counter, average)):
        part.load_state_dict(load_part(checkpoint, n))
    average.copy_to(model.parameters())
    return model.eval(), counter


def train_unet(
    config: Config, folder: Path, accelerator: Accelerator, workers: int = 0, compiled: bool = False
) -> None:
    """Train from the encoders in ``folder``. The last checkpoint contains the result and its moving average."""
    recipe = config.unet
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval().requires_grad_(False).to(accelerator.device)
    stage = Stage(accelerator, folder / _FOLDER, "UNet")
    model = _build(config, folder)
    if compiled:
        # Compile one graph for the UNet, without the splits that data-parallel training uses to hide communication.
        torch._dynamo.config.optimize_ddp = False
        model.unet.compile(dynamic=False)
    average = _average(model, config)
    noise = training_scheduler()
    optimizers = _optimizers(model, config)
    factors = [recipe.matrix_learning_rate, 1.0]
    model, *optimizers = accelerator.prepare(model, *optimizers)
    average.to(accelerator.device)
    accelerator.register_for_checkpointing(average)
    stage.resume()
    device = accelerator.device

    def make(rng: np.random.Generator, step: int) -> tuple[Any, ...]:
        phase, _, _ = _phase_at(config, step)
        count = phase.batch // accelerator.num_processes
        found, captions = draw(rng, count)
        random = torch.Generator().manual_seed(int(rng.integers(2**62)))
        said = (torch.rand(count, generator=random) >= recipe.caption_dropout).float()
        clean_noise = torch.randn(count, 4, phase.latent, phase.latent, generator=random)
        timesteps = (_timesteps(recipe, count, random) * noise.config.num_train_timesteps).long()
        size = phase.latent * config.vae.scale
        painted = [render(scene, size) for scene in found]
        layout = np.stack(
            [_layout(scene, owner, phase.latent) for scene, (_, owner) in zip(found, painted, strict=True)]
        )
        pixels = as_tensor([picture for picture, _ in painted])
        return size, pixels, tokenize(tokenizer, captions), said, clean_noise, timesteps, torch.from_numpy(layout)

    source = batches(make, (config.seed, _STAGE), accelerator.process_index, stage.counter.step, workers)

    def step(counter: Counter) -> tuple[int, dict[str, Tensor | float]]:
        phase, done, steps = _phase_at(config, counter.step)
        start, end = phase.learning_rate
        rate = (start + (end - start) * done) * min(1.0, (steps + 1) / _WARM_UP_STEPS)
        for optimizer, factor in zip(optimizers, factors, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        size, *tensors = next(source)
        pixels, ids, said, clean_noise, timesteps, layout = (x.to(device) for x in tensors)
        with torch.no_grad(), accelerator.autocast():
            latents = vae.encode(pixels).latent_dist.mean.float() * vae.config.scaling_factor
        weights = _weights(layout, timesteps, recipe.object_weight)
        target = noise.get_velocity(latents, clean_noise, timesteps)
        unfused = device.type == "cpu" and phase.latent <= _UNFUSED_UP_TO
        with sdpa_kernel(SDPBackend.MATH) if unfused else contextlib.nullcontext():
            predicted, logits = model(noise.add_noise(latents, clean_noise, timesteps), timesteps, ids, said, size)
            loss = (F.mse_loss(predicted.float(), target, reduction="none") * weights).mean()
            reading = _reading_loss(logits, layout)
            accelerator.backward(loss + recipe.layout_weight * reading)
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.step(model.parameters())
        return len(latents) * accelerator.num_processes, {
            "loss": loss.detach(),
            "layout": reading.detach(),
            "norm": norm,
            "lr": rate,
        }

    stage.run(sum(phase.images for phase in recipe.phases), step)
