"""The training recipe as typed values. The default is ``config.yaml`` beside this file."""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

DEFAULT = Path(__file__).with_name("config.yaml")

# The largest number in a recipe: seeds and counts beyond it overflow in a library.
_MAX = 2**31 - 1

# Channels of a head of the text encoders, and groups of the autoencoder's norms.
TEXT_HEAD_DIM, VAE_NORM_GROUPS = 32, 8

# Latent elements per side that become one token per side at the UNet's lowest level.
_UNET_SCALE = 4


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


def _check_multiple(name: str, value: int | tuple[int, ...], of: int, meaning: str) -> None:
    if any(each % of for each in (value if isinstance(value, tuple) else (value,))):
        value = list(value) if isinstance(value, tuple) else value
        raise ValueError(f"{name} is {value}; expected multiples of {of}, {meaning}")


def _check(config: Config) -> None:
    """Raise ValueError if values contradict each other, or are no fractions, before hours of training find out."""
    text, vae, unet = config.text, config.vae, config.unet
    _check_multiple("text.widths", text.widths, TEXT_HEAD_DIM, "the channels of a head")
    _check_multiple("vae.channels", vae.channels, VAE_NORM_GROUPS, "the groups of its norms")
    _check_multiple("vae.crop", vae.crop, vae.scale, "the pixels of a latent element")
    if min(vae.sizes) < vae.crop:
        raise ValueError(f"vae.sizes is {list(vae.sizes)}; expected at least vae.crop, {vae.crop}")
    _check_multiple("unet.channels", unet.channels, unet.norm_groups, "unet.norm_groups")
    _check_multiple("unet.channels[1:]", unet.channels[1:], unet.head_dim, "unet.head_dim")
    _check_multiple("unet.sample_size", unet.sample_size, _UNET_SCALE, "for a UNet of three levels")
    for n, phase in enumerate(unet.phases):
        _check_multiple(f"unet.phases[{n}].latent", phase.latent, _UNET_SCALE, "for a UNet of three levels")
    for name in ("caption_dropout", "uniform_timesteps"):
        if getattr(unet, name) > 1:
            raise ValueError(f"unet.{name} is {getattr(unet, name)}; expected a fraction, at most 1")
    if unet.ema_decay >= 1:
        raise ValueError(f"unet.ema_decay is {unet.ema_decay}; expected below 1")


def load(path: Path = DEFAULT) -> Config:
    """Read a recipe.

    Raises:
        ValueError: a key is missing or unknown, its value is no such number or list, or two values contradict each
            other; the message names it.
    """
    config = _group(Config, "", yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    _check(config)
    return config
