"""What is remembered from one call of the UNet to the next, and when it is forgotten: with its picture."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from atedm.policy.staleness import State


@dataclass
class BlockMemory:
    """What a block remembers of one picture, in tensors that keep their addresses. None where it needs no such.

    Attributes:
        size: batch, height and width of the block's feature map.
        index: int64 ``[B, K]``, the tokens of the last choice. update: ``[B, N, C]``, what the block last added to its
            input, token by token. staleness: what tells how out of date that is.
        ranks: float32 ``[B, H, N]``, the scores that the ranking last came to, where the next begins; uniform before.
        choice: the step of the choice in ``index``. scores: ``[B, H, N]``, what it was made by; None of a graph's.
        has_chosen: whether the call that runs has written ``index``. is_filled: whether ``update`` is this picture's.
    """

    size: tuple[int, int, int]
    index: Tensor | None = None
    update: Tensor | None = None
    staleness: State = field(default_factory=dict)
    ranks: Tensor | None = None
    choice: int | None = None
    scores: Tensor | None = None
    has_chosen: bool = False
    is_filled: bool = False

    def tensors(self) -> Iterator[Tensor]:
        yield from (x for x in (self.index, self.update, self.ranks, *self.staleness.values()) if x is not None)

    def forget(self) -> None:
        """Forget what the first whole call of the next picture does not write over."""
        self.choice = self.scores = None
        self.has_chosen = self.is_filled = False
        if self.ranks is not None:
            self.ranks.fill_(1.0)


@dataclass
class Slot:
    """Room for what is remembered of one picture of one shape.

    Attributes:
        key: shape, dtype and device of the UNet's sample. blocks: by name.
        feature: ``[B, C, h, w]``, what entered the last layer in the last computed step. change: float32 scalar, its
            change there since the computed step before, as a part of its norm. None without ``reused`` steps.
        owner: the picture that has the slot, where pictures take turns.
    """

    key: tuple[Any, ...]
    blocks: dict[str, BlockMemory] = field(default_factory=dict)
    feature: Tensor | None = None
    change: Tensor | None = None
    owner: weakref.ref[Picture] | None = None

    def tensors(self) -> Iterator[Tensor]:
        for block in self.blocks.values():
            yield from block.tensors()
        yield from (x for x in (self.feature, self.change) if x is not None)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors())


_runs = itertools.count()


class Picture:
    """What belongs to one picture.

    Attributes:
        kinds: those of the steps that it has run, by step. slot: what is remembered of it. is_filled: whether a whole
            call has written ``slot``.
        is_shared: whether several contents have its timesteps: tiles, halves of guidance one by one, pictures in turn,
            threads. Then what is remembered may be another's.
        chosen: the step of the last choice of tokens. ranked: the kinds of the steps that have ranked tokens.
        run: no other run has this number: the same timesteps may serve several. first: the step that it began at.

    A call changes this only after it has finished.
    """

    def __init__(self) -> None:
        self.is_shared = False
        self.is_over = False
        self._last: int | None = None
        self._thread = threading.get_ident()
        self.first = 0
        self.restart()

    def restart(self) -> None:
        """Forget what has been computed."""
        self.kinds: dict[int, str] = {}
        self.slot: Slot | None = None
        self.is_filled = False
        self.chosen: int | None = None
        self.ranked: set[str] = set()
        self._rate: float | None = None

    def begin(self, step: int, total: int) -> None:
        """Note that a call at ``step`` of ``total`` begins."""
        if self._last is None or (step <= self._last and self.is_over):
            self.restart()  # the same timesteps may serve another run
            self.run, self.first = next(_runs), step
        elif step <= self._last:
            # A step that comes again, or an earlier one before the last: another content, or a run broken off.
            self.is_shared = True
        self.is_shared |= threading.get_ident() != self._thread
        self._last, self.is_over = step, step == total - 1
        if self.is_shared:
            self.restart()

    def end(self, step: int, kind: str, choice: int | None, ranks: bool) -> None:
        """Note that a call of ``kind`` at ``step`` has ended.

        Args:
            choice: the step of the choice that it went by. ranks: it has chosen tokens.
        """
        self.kinds[step] = kind
        self.is_filled = True  # every call before the first whole one is whole
        if kind != "reused":
            self._rate = None
        if ranks:
            self.chosen = step
            self.ranked.add(kind)
        for block in self.slot.blocks.values():
            if block.has_chosen:
                block.choice, block.has_chosen = choice, False

    def break_off(self) -> None:
        """Forget what a call has left that raised: it may have written one part and not another."""
        self.restart()
        self.is_over = True  # the same timesteps may serve another try

    def is_choice_due(self, step: int, kind: str, every: int) -> bool:
        """Whether tokens are chosen at ``step``, where a choice serves ``every`` steps of one kind."""
        return self.chosen is None or step - self.chosen >= every or self.kinds.get(self.chosen) != kind

    def has_ranks_for(self, kind: str) -> bool:
        """Whether every block that ranks in a step of ``kind`` has done so before: some are whole in light ones."""
        return kind in self.ranked or (kind == "light" and "pruned" in self.ranked)

    def rate(self) -> float | None:
        """The change of the feature per step between the last two computed steps; None before there were two."""
        computed = [step for step, kind in self.kinds.items() if kind != "reused"]
        if self._rate is None and len(computed) > 1 and self.slot is not None and self.slot.change is not None:
            self._rate = float(self.slot.change) / (computed[-1] - computed[-2])
        return self._rate


class Memory:
    """The pictures that are being made, each by the storage of its timesteps; a picture goes when that goes.

    Graphs read fixed addresses, so all pictures of one shape share a slot there, one after the other.
    """

    def __init__(self) -> None:
        self._pictures: dict[int, tuple[weakref.ref[torch.UntypedStorage], Picture]] = {}
        self._of_graphs: dict[tuple[Any, ...], Slot] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_pictures": {}, "_of_graphs": {}}  # a copy has made no picture yet

    def picture(self, storage: torch.UntypedStorage) -> Picture:
        """The picture with these timesteps; a new one where they are new."""
        address = id(storage)
        known = self._pictures.get(address)
        if known is not None and known[0]() is storage:
            return known[1]
        ref = weakref.ref(storage, lambda _: self._pictures.pop(address, None))
        picture = Picture()
        self._pictures[address] = (ref, picture)
        return picture

    def slot(self, picture: Picture, key: tuple[Any, ...], make: Callable[[tuple[Any, ...]], Slot]) -> Slot:
        """The slot of ``picture``; a new one, which nothing has filled, where the shape is another than before."""
        if picture.slot is None or picture.slot.key != key:
            picture.restart()
            picture.slot = make(key)
        return picture.slot

    def slot_of_graphs(
        self, picture: Picture, key: tuple[Any, ...], make: Callable[[tuple[Any, ...]], Slot]
    ) -> Slot | None:
        """The slot that graphs of this shape read; None while another picture has it that is still being made."""
        if key not in self._of_graphs:
            slot = self._of_graphs[key] = make(key)
            for tensor in slot.tensors():
                torch._dynamo.mark_static_address(tensor)
        slot = self._of_graphs[key]
        owner = None if slot.owner is None else slot.owner()
        if picture.slot is slot and owner is picture:
            return slot
        if owner is not None and owner is not picture and owner.slot is slot and not owner.is_over:
            return None
        picture.restart()
        picture.slot, slot.owner = slot, weakref.ref(picture)
        for block in slot.blocks.values():
            block.forget()
        return slot

    @property
    def nbytes(self) -> int:
        slots = {id(p.slot): p.slot for _, p in [*self._pictures.values()] if p.slot is not None}
        slots |= {id(slot): slot for slot in self._of_graphs.values()}
        return sum(slot.nbytes for slot in slots.values())

    def __len__(self) -> int:
        return len(self._pictures)
