"""Stage 2: trains the text encoders only on captions, to predict from the embeddings what the caption says.

This is far cheaper than teaching them everything through the UNet's loss. They continue to learn with the UNet.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from atedm.files import whole_folder
from atedm_bench.scenes import COLORS, SHAPES, Scene
from atedm_bench.scenes.scene import BACKGROUND_COLORS, PLACES, RELATIONS
from atedm_bench.training.config import Config
from atedm_bench.training.data import batches, draw, tokenize
from atedm_bench.training.loop import Counter, Stage
from atedm_bench.training.models import build_text_encoders, build_tokenizer

_STAGE = 3
_MAX_OBJECTS = 3

# Facts and their values. Each fact has one more class that is not listed: "not mentioned".
_FACTS: dict[str, tuple[str, ...]] = {
    **{f"shape {n}": SHAPES for n in range(_MAX_OBJECTS)},
    **{f"color {n}": tuple(COLORS) for n in range(_MAX_OBJECTS)},
    "relation": RELATIONS,
    "place": tuple(PLACES),
    "background": tuple(BACKGROUND_COLORS),
}


class TextEncoders(nn.Module):
    """Both text encoders, as the pipeline uses them."""

    def __init__(self, first: CLIPTextModel, second: CLIPTextModelWithProjection) -> None:
        super().__init__()
        self.first = first
        self.second = second
        # The pipeline reads the state before the last layer, so it never uses these parts of the first encoder.
        body = getattr(first, "text_model", first)
        for part in (body.encoder.layers[-1], body.final_layer_norm):
            part.requires_grad_(False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encode int64 ``[B, T]`` to states ``[B, T, widths]`` and pooled ``[B, width of the second]``."""
        first = self.first(ids, output_hidden_states=True)
        second = self.second(ids, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


class _Reader(nn.Module):
    """Reads the facts from the pooled embedding and from the end token's states, with one linear map for each."""

    def __init__(self, encoders: TextEncoders, config: Config) -> None:
        super().__init__()
        self.encoders = encoders
        self.end = encoders.first.config.eos_token_id
        self.classes = [len(values) + 1 for values in _FACTS.values()]
        self.from_pooled = nn.Linear(config.text.widths[1], sum(self.classes))
        self.from_states = nn.Linear(sum(config.text.widths), sum(self.classes))

    def forward(self, ids: Tensor) -> list[list[Tensor]]:
        states, pooled = self.encoders(ids)
        last = (ids == self.end).int().argmax(dim=1)
        at_end = states[torch.arange(len(ids), device=ids.device), last]
        return [list(read.split(self.classes, 1)) for read in (self.from_pooled(pooled), self.from_states(at_end))]


def _facts(scene: Scene, caption: str) -> list[int]:
    said: dict[str, str] = {}
    for n, item in enumerate(scene.objects):
        said |= {f"shape {n}": item.shape, f"color {n}": item.color}
    if scene.relations:
        said["relation"] = scene.relations[0].name
    if scene.place is not None:
        said["place"] = scene.place
    if caption.endswith("background"):
        said["background"] = scene.background.color
    return [values.index(said[fact]) if fact in said else len(values) for fact, values in _FACTS.items()]


def train_text(config: Config, folder: Path, accelerator: Accelerator, workers: int = 0) -> None:
    """Train the encoders; save to ``folder/text_encoder``, ``folder/text_encoder_2`` and ``folder/tokenizer``."""
    recipe = config.text
    if accelerator.is_main_process:
        build_tokenizer(config, folder / "tokenizer")
    accelerator.wait_for_everyone()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    stage = Stage(accelerator, folder / "text-training", "text encoders")
    model = _Reader(TextEncoders(*build_text_encoders(config, tokenizer)), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=recipe.steps + 1)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    stage.resume()

    count = recipe.batch // accelerator.num_processes

    def make(rng: np.random.Generator, step: int) -> tuple[Tensor, Tensor]:
        found, captions = draw(rng, count)
        facts = torch.tensor([_facts(*pair) for pair in zip(found, captions, strict=True)])
        return tokenize(tokenizer, captions), facts

    source = batches(make, (config.seed, _STAGE), accelerator.process_index, stage.counter.step, workers)

    def step(counter: Counter) -> tuple[int, dict[str, Tensor]]:
        ids, facts = (x.to(accelerator.device) for x in next(source))
        read = model(ids)
        loss = sum(
            F.cross_entropy(logits.float(), facts[:, n]) for heads in read for n, logits in enumerate(heads)
        ) / len(read)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        right = torch.stack([logits.argmax(1) == facts[:, n] for n, logits in enumerate(read[0])])
        return count * accelerator.num_processes, {"loss": loss.detach(), "all_right": right.all(0).float().mean()}

    stage.run(recipe.steps * recipe.batch, step)
    if accelerator.is_main_process:
        encoders = accelerator.unwrap_model(model).encoders
        for name, encoder in (("text_encoder", encoders.first), ("text_encoder_2", encoders.second)):
            with whole_folder(folder / name) as partial:
                encoder.save_pretrained(partial)
