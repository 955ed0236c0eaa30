"""The training recipe as typed values. The default is ``config.yaml`` beside this file."""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

DEFAULT = Path(__file__).with_name("config.yaml")

# The largest number in a recipe: seeds and counts beyond it overflow in a library.
_MAX = 2**31 - 1


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


def _least(kind: type, name: str) -> int | None:
    """The least value of a number in a recipe; None if it may be negative."""
    if name == "unet.timestep_mean":
        return None
    return 0 if kind is float or name == "seed" else 1


def _value(kind: Any, name: str, value: Any) -> Any:
    """Return ``value`` as a ``kind``: a group of the recipe, a list or a number."""
    if is_dataclass(kind):
        return _group(kind, name, value)
    if get_origin(kind) is tuple:
        inner, *others = get_args(kind)
        count = None if others == [...] else 1 + len(others)
        if not isinstance(value, list) or not value or len(value) != (count or len(value)):
            raise ValueError(f"{name} is {value!r}; expected a list of {count or 'one or more'} values")
        return tuple(_value(inner, f"{name}[{n}]", each) for n, each in enumerate(value))
    least = _least(kind, name)
    is_number = isinstance(value, (int, kind)) and not isinstance(value, bool) and abs(value) <= _MAX
    if not is_number or (least is not None and value < least):
        expected = "a whole number" if kind is int else "a number such as 2.0e-3"
        lowest = "" if least is None else f", at least {least}"
        raise ValueError(f"{name} is {value!r}; expected {expected}{lowest}, at most {_MAX}")
    return value


def _group(kind: type, name: str, values: Any) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{name or 'the recipe'} is {values!r}; expected a mapping")
    kinds = get_type_hints(kind)
    wrong = sorted(kinds.keys() ^ values.keys(), key=str)
    if wrong:
        raise ValueError(
            f"{name or 'the recipe'} and the recipe's form differ in {', '.join(map(str, wrong))}; "
            f"expected {sorted(kinds)}"
        )
    return kind(**{key: _value(kinds[key], f"{name}.{key}".lstrip("."), value) for key, value in values.items()})


def load(path: Path = DEFAULT) -> Config:
    """Read a recipe.

    Raises:
        ValueError: a key is missing or unknown, or its value is no such number or list; the message names it.
    """
    return _group(Config, "", yaml.safe_load(Path(path).read_text(encoding="utf-8")))
