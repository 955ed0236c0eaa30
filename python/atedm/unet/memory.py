"""What is remembered from one call of the UNet to the next, and when it is forgotten: with its picture."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """The tokens that a block keeps.

    Attributes:
        index: int64 ``[B, K]``. scores: ``[B, H, N]``. size: height and width of the feature map.
        choice: which of the picture's choices it is; a block that was skipped when one was due has an older one.
    """

    index: Tensor
    scores: Tensor
    size: tuple[int, int]
    choice: int = 0


class RankingPeriod:
    """Tells in which calls of one picture tokens are chosen, where a choice serves ``every`` denoising steps.

    The first call chooses, and so does the first of each phase: a block that the light phase left whole has no choice.

    Attributes:
        is_shared: whether several contents have the timesteps of the picture: tiles, halves of guidance one by one,
            pictures in turn, threads. Then every call chooses, as a choice may be another's.
        choice: the number of the last choice.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.is_shared = False
        self.choice = -1
        self._last: tuple[int, bool] | None = None
        self._age = 0
        self._thread = threading.get_ident()

    def is_due(self, index: int, total: int, light: bool) -> bool:
        """Whether the call at step ``index`` of ``total`` chooses."""
        before = self._last
        self._last = (index, light)
        # A step that comes again, or an earlier one before the last: another content, or a run that was broken off.
        goes_back = before is not None and index <= before[0] != total - 1
        self.is_shared |= goes_back or threading.get_ident() != self._thread
        follows = before is not None and index == before[0] + 1 and light == before[1]
        self._age = self._age + 1 if follows else 0
        due = self.is_shared or self._age % self.every == 0
        self.choice += due
        return due


@dataclass
class Picture:
    """What belongs to one picture: when tokens are chosen, and each block's choice by its name."""

    period: RankingPeriod
    kept: dict[str, Kept] = field(default_factory=dict)


class Memory:
    """The pictures that are being made, each by the storage of its timesteps; a picture goes when that goes."""

    def __init__(self, rank_every: int) -> None:
        self._rank_every = rank_every
        self._pictures: dict[int, tuple[weakref.ref[torch.UntypedStorage], Picture]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_rank_every": self._rank_every, "_pictures": {}}  # a copy has made no picture yet

    def picture(self, storage: torch.UntypedStorage) -> Picture:
        """The picture with these timesteps; a new one where they are new."""
        address = id(storage)
        known = self._pictures.get(address)
        if known is not None and known[0]() is storage:
            return known[1]
        ref = weakref.ref(storage, lambda _: self._pictures.pop(address, None))
        picture = Picture(RankingPeriod(self._rank_every))
        self._pictures[address] = (ref, picture)
        return picture

    def forget(self) -> None:
        self._pictures.clear()

    def __len__(self) -> int:
        return len(self._pictures)
