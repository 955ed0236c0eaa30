"""The training recipe as typed values. The default is ``config.yaml`` beside this file."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

DEFAULT = Path(__file__).with_name("config.yaml")


@dataclass(frozen=True)
class Tokenizer:
    max_tokens: int
    vocabulary: int
    captions: int


@dataclass(frozen=True)
class Text:
    widths: tuple[int, int]
    layers: tuple[int, int]
    steps: int
    batch: int
    learning_rate: float


@dataclass(frozen=True)
class Vae:
    channels: tuple[int, ...]
    crop: int
    sizes: tuple[int, ...]
    steps: int
    batch: int
    learning_rate: float
    kl_weight: float

    @property
    def scale(self) -> int:
        """Pixels per latent element, along each side."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class Phase:
    """Training at one size. ``latent``: elements per side. ``learning_rate``: at the start and at the end."""

    latent: int
    images: int
    batch: int
    learning_rate: tuple[float, float]


@dataclass(frozen=True)
class UnetRecipe:
    channels: tuple[int, int, int]
    depth: tuple[int, int, int]
    head_dim: int
    norm_groups: int
    sample_size: int
    caption_dropout: float
    ema_decay: float
    matrix_learning_rate: float
    timestep_mean: float
    uniform_timesteps: float
    object_weight: float
    layout_weight: float
    phases: tuple[Phase, ...]


@dataclass(frozen=True)
class Config:
    seed: int
    tokenizer: Tokenizer
    text: Text
    vae: Vae
    unet: UnetRecipe


def _build(kind: type, name: str, values: Any) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{name} is {values!r}; expected a mapping")
    known = {f.name for f in fields(kind)}
    wrong = sorted(known ^ set(values))
    if wrong:
        raise ValueError(f"{name} and the recipe's form differ in {', '.join(wrong)}; expected {sorted(known)}")
    return kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


def load(path: Path = DEFAULT) -> Config:
    """Read a recipe.

    Raises:
        ValueError: a key is missing or unknown; the message names it.
    """
    raw = yaml.safe_load(Path(path).read_text())
    unet = dict(raw["unet"])
    unet["phases"] = [_build(Phase, f"unet.phases[{n}]", phase) for n, phase in enumerate(unet["phases"])]
    return _build(
        Config,
        "recipe",
        {
            **raw,
            "tokenizer": _build(Tokenizer, "tokenizer", raw["tokenizer"]),
            "text": _build(Text, "text", raw["text"]),
            "vae": _build(Vae, "vae", raw["vae"]),
            "unet": _build(UnetRecipe, "unet", unet),
        },
    )
