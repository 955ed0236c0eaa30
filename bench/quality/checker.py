"""The checker: a small convolutional network that finds the shapes in a picture, trained only on renders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from atedm.files import whole_file
from atedm_bench.scenes import COLORS, SHAPES

WEIGHTS = Path(__file__).with_name("checker.safetensors")

# The judge resizes every picture to this size.
SIZE = 64
STRIDE = 2
FEATURES = 64

# A peak of the heat map counts as an object above this probability.
THRESHOLD = 0.4


@dataclass(frozen=True)
class Found:
    """An object that the checker sees. ``x, y``: its centre as fractions of the picture's side."""

    shape: str
    color: str
    x: float
    y: float
    probability: float


class _Residual(nn.Module):
    def __init__(self, channels: int, dilation: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norms[1](self.second(F.relu(self.norms[0](self.first(F.relu(x))))))


class Checker(nn.Module):
    """Maps ``[B, 3, SIZE, SIZE]`` in -1 … 1 to logits ``[B, 1 + shapes + colours, SIZE / 2, SIZE / 2]``.

    The first channel is the heat map of object centres. Shape and colour are read at its peaks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.halved = nn.Sequential(
            nn.Conv2d(24, 48, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(48), _Residual(48)
        )
        self.quartered = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(48, FEATURES, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(FEATURES),
            _Residual(FEATURES),
            _Residual(FEATURES, 2),
        )
        self.up = nn.Conv2d(FEATURES, 48, 1)
        self.head = nn.Sequential(_Residual(48), nn.ReLU(), nn.Conv2d(48, 1 + len(SHAPES) + len(COLORS), 1))

    def stages(self, pictures: Tensor) -> list[Tensor]:
        """Return the features at full, half and quarter size."""
        stem = self.stem(pictures)
        half = self.halved(stem)
        return [stem, half, self.quartered(half)]

    def forward(self, pictures: Tensor) -> Tensor:
        _, half, quarter = self.stages(pictures)
        return self.head(half + F.interpolate(self.up(quarter), scale_factor=2, mode="nearest"))


def prepare(pixels: Tensor) -> Tensor:
    """Resize uint8 ``[B, 3, H, W]`` to float32 ``[B, 3, SIZE, SIZE]`` in -1 … 1."""
    return F.interpolate(pixels.float(), (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False) / 127.5 - 1


def load_checker(path: Path = WEIGHTS) -> Checker:
    """Load the trained checker, in evaluation mode."""
    model = Checker()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()}, strict=False)
    return model.eval().requires_grad_(False)


def save_checker(model: Checker, path: Path = WEIGHTS) -> None:
    """Write the weights in half precision."""
    state = {name: t.half().contiguous() for name, t in model.state_dict().items() if t.is_floating_point()}
    with whole_file(path) as partial:
        save_file(state, partial)


@torch.no_grad()
def detect(model: Checker, pixels: Tensor) -> list[list[Found]]:
    """Find the objects in each picture, most probable first. ``pixels``: uint8 ``[B, 3, H, W]``."""
    logits = model(prepare(pixels))
    heat = logits[:, 0].sigmoid()
    peaks = (heat == F.max_pool2d(heat[:, None], 5, stride=1, padding=2)[:, 0]) & (heat > THRESHOLD)
    shapes, colors = logits[:, 1:].split((len(SHAPES), len(COLORS)), dim=1)
    shapes, colors = shapes.argmax(1), colors.argmax(1)
    found: list[list[Found]] = [[] for _ in range(len(pixels))]
    for b, row, column in peaks.nonzero().tolist():
        found[b].append(
            Found(
                SHAPES[shapes[b, row, column]],
                list(COLORS)[colors[b, row, column]],
                (column + 0.5) * STRIDE / SIZE,
                (row + 0.5) * STRIDE / SIZE,
                float(heat[b, row, column]),
            )
        )
    return [sorted(objects, key=lambda item: -item.probability) for objects in found]
