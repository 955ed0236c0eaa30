"""The shapes with which SDXL's UNet calls the ops, and what each op must compute and move for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# A level-2 token covers 2 × 2 latent elements, a level-3 token 4 × 4; an element covers 8 × 8 pixels.
_PIXELS_PER_TOKEN = {2: 16, 3: 32}
_HEADS = {2: 10, 3: 20}
HEAD_DIM = 64
TEXT_TOKENS = 77


@dataclass(frozen=True)
class Shape:
    """The attention of one level: ``height`` × ``width`` tokens, of which ``keep`` are kept."""

    size: str
    level: int
    batch: int
    height: int
    width: int
    keep: int

    @property
    def heads(self) -> int:
        return _HEADS[self.level]

    @property
    def tokens(self) -> int:
        return self.height * self.width

    @property
    def channels(self) -> int:
        return self.heads * HEAD_DIM

    def __str__(self) -> str:
        return f"B{self.batch} H{self.heads} N{self.tokens} D{HEAD_DIM}"


def shape_of(width: int, height: int, level: int, batch: int, ratio: float) -> Shape:
    """Return the shape at ``level`` (2 or 3) for ``width`` × ``height`` pixels, dropping ``ratio`` of the tokens."""
    from atedm.policy.selection import kept_tokens

    pixels = _PIXELS_PER_TOKEN[level]
    tokens = (width // pixels) * (height // pixels)
    return Shape(f"{width}x{height}", level, batch, height // pixels, width // pixels, kept_tokens(tokens, ratio))


@dataclass(frozen=True)
class Work:
    """The minimum work of an op: FLOPs by its own formula, exponentials, bytes read and written once."""

    flops: float = 0.0
    exponentials: float = 0.0
    bytes: float = 0.0


def attention_work(flops: int, shape: Shape, dtype: torch.dtype) -> Work:
    """Return the work of a forward of fused attention, which moves queries, keys, values and output."""
    pairs = shape.batch * shape.heads
    return Work(flops, pairs * shape.tokens**2, 4 * pairs * shape.tokens * HEAD_DIM * dtype.itemsize)


def map_work(flops: int, shape: Shape, dtype: torch.dtype, rows: int, columns: int, passes: int = 1) -> Work:
    """Return the work for ``rows`` × ``columns`` elements of every head's map, which each pass computes again."""
    pairs = shape.batch * shape.heads
    operands = pairs * (rows + columns) * HEAD_DIM * dtype.itemsize
    # Reads the logsumexp of each row, writes the sum of each column.
    sums = 4 * pairs * (rows + columns)
    return Work(flops, passes * pairs * rows * columns, passes * (operands + sums))


def selection_work(shape: Shape) -> Work:
    return Work(bytes=4 * shape.batch * shape.heads * shape.tokens + 8 * shape.batch * shape.keep)


def rows_work(shape: Shape, dtype: torch.dtype, read: int, written: int, indices: int) -> Work:
    """Return the work of reading and writing rows of all channels in each image, and of reading 8-byte indices."""
    return Work(bytes=shape.batch * ((read + written) * shape.channels * dtype.itemsize + 8 * indices))
