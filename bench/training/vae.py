"""Stage 1: trains the autoencoder on crops of pictures in several sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from atedm.files import whole_folder
from atedm_bench.scenes import render
from atedm_bench.scenes.scene import Scene
from atedm_bench.training.config import Config
from atedm_bench.training.data import batches, draw, generator, pictures
from atedm_bench.training.loop import Counter, Stage
from atedm_bench.training.models import build_vae

_STAGE = 2


class _Autoencoder(nn.Module):
    """Computes reconstruction and divergence in one call, so that data-parallel training sees one forward."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(pixels).latent_dist
        divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return self.vae.decode(posterior.sample()).sample, divergence


def _crops(found: list[Scene], rng: np.random.Generator, size: int, crop: int) -> Tensor:
    out = []
    for scene in found:
        x, y = (int(rng.integers(size - crop + 1)) for _ in range(2))
        out.append(render(scene, size)[0][y : y + crop, x : x + crop])
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(config: Config, folder: Path, accelerator: Accelerator, workers: int = 0) -> None:
    """Train the autoencoder; save to ``folder/vae``, with the scaling factor that gives its latents unit variance."""
    recipe = config.vae
    stage = Stage(accelerator, folder / "vae-training", "autoencoder")
    model = _Autoencoder(build_vae(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=recipe.steps + 1)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    stage.resume()

    count = recipe.batch // accelerator.num_processes

    def make(rng: np.random.Generator, step: int) -> Tensor:
        found, _ = draw(rng, count)
        return _crops(found, rng, recipe.sizes[step % len(recipe.sizes)], recipe.crop)

    source = batches(make, (config.seed, _STAGE), accelerator.process_index, stage.counter.step, workers)

    def step(counter: Counter) -> tuple[int, dict[str, Tensor]]:
        pixels = next(source).to(accelerator.device)
        decoded, divergence = model(pixels)
        error = F.l1_loss(decoded.float(), pixels) + F.mse_loss(decoded.float(), pixels)
        accelerator.backward(error + recipe.kl_weight * divergence.float())
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return count * accelerator.num_processes, {"error": error.detach(), "divergence": divergence.detach()}

    stage.run(recipe.steps * recipe.batch, step)
    if accelerator.is_main_process:
        vae = accelerator.unwrap_model(model).vae.eval().cpu()
        vae.register_to_config(scaling_factor=1 / _latent_std(vae, config))
        with whole_folder(folder / "vae") as partial:
            vae.save_pretrained(partial)


@torch.no_grad()
def _latent_std(vae: AutoencoderKL, config: Config) -> float:
    found, _ = draw(generator(config.seed, _STAGE, 2**30), 64)
    return float(vae.encode(pictures(found, 2 * config.vae.crop)).latent_dist.mean.std())
