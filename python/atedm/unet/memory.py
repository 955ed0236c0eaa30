"""What is remembered of a picture from one call of the UNet to the next, and forgotten with the picture."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from atedm.policy.schedule import computed_steps
from atedm.policy.staleness import State


@dataclass
class BlockMemory:
    """What a block remembers of one picture, in tensors that keep their addresses. None for what it does not need.

    Attributes:
        size: batch, height and width of the block's feature map.
        index: int64 ``[B, K]``, the tokens of the last choice. update: ``[B, N, C]``, what the block last added to its
            input, token by token. staleness: the state that tells how out of date ``update`` is.
        ranks: float32 ``[B, H, N]``, the last scores of the ranking, from which the next one starts; uniform at first.
        choice: the step of the choice in ``index``. scores: ``[B, H, N]``, the scores of that choice; None if a graph
            made it.
        has_chosen: whether the running call has written ``index``. serves: whether ``index`` is the choice that the
            running call uses. is_filled: whether ``update`` is this picture's.
    """

    size: tuple[int, int, int]
    index: Tensor | None = None
    update: Tensor | None = None
    staleness: State = field(default_factory=dict)
    ranks: Tensor | None = None
    choice: int | None = None
    scores: Tensor | None = None
    has_chosen: bool = False
    serves: bool = False
    is_filled: bool = False

    def tensors(self) -> Iterator[Tensor]:
        yield from (x for x in (self.index, self.update, self.ranks, *self.staleness.values()) if x is not None)

    def forget(self) -> None:
        """Forget what the first whole call of the next picture does not overwrite."""
        self.choice = self.scores = None
        self.has_chosen = self.is_filled = False
        if self.ranks is not None:
            self.ranks.fill_(1.0)


@dataclass
class Slot:
    """Room for what is remembered of one picture of one shape.

    Attributes:
        key: shape, dtype and device of the UNet's sample. blocks: the memory of each block, by name.
        feature: ``[B, C, h, w]``, the input of the last layer in the last computed step. change: float32 scalar, how
            much ``feature`` changed between the last two computed steps, relative to its norm. Both are None without
            ``reused`` steps.
        owner: the picture that has the slot, if pictures take turns.
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
    """The state of one picture.

    Attributes:
        kinds: the kind of each step that has run, by step. slot: what is remembered of the picture. is_filled: whether
            a whole call has written ``slot``.
        is_shared: whether several contents share the picture's timesteps, such as tiles, the two halves of guidance in
            separate calls, pictures that take turns, or threads. What is remembered may then belong to another one.
        chosen: the step of the last choice of tokens. ranked: the kinds of the steps that have ranked tokens.
        run: a number that no other run has; several runs may use the same timesteps. first: the step it began at.
        recorded: the steps since the last finished run at which a call outside of a backward has recorded gradients.

    A call adds to what is remembered only after it has finished.
    """

    def __init__(self) -> None:
        self.is_shared = False
        self.is_over = False
        self._last: int | None = None
        self._stride = 1
        self.recorded: set[int | None] = set()
        self._thread = threading.get_ident()
        self.first = 0
        self.restart()

    def restart(self) -> None:
        """Forget what has been computed of the picture."""
        self.kinds: dict[int, str] = {}
        self.slot: Slot | None = None
        self.is_filled = False
        self.chosen: int | None = None
        self.ranked: set[str] = set()
        self.rates: dict[int, float] = {}

    def begin(self, step: int, total: int) -> bool:
        """Note that a call at ``step`` of ``total`` begins.

        Return whether it skips steps that the run so far would not have skipped. It may then belong to another picture,
        which begins late, after the last one was interrupted.
        """
        skips = bool(self.kinds) and self._stride_to(step) not in (1, self._stride)
        if self._last is None or (step <= self._last and self.is_over) or skips:
            if self.is_over:
                self.recorded.clear()
            self.restart()  # the same timesteps may serve another run
            self.run, self.first = next(_runs), step
        elif step <= self._last:
            # The step comes again or goes back, and the last one has not run: another content, or an interrupted run.
            self.is_shared = True
        self.is_shared |= threading.get_ident() != self._thread
        self._stride = self._stride_to(step)
        self._last, self.is_over = step, step == total - 1
        if self.is_shared:
            self.restart()
        return skips

    def _stride_to(self, step: int) -> int:
        """Number of steps from the last call to ``step``, without those that recorded gradients; at least 1."""
        last = step - 1 if self._last is None else self._last
        return 1 + sum(skipped not in self.recorded for skipped in range(last + 1, step))

    def end(self, step: int, kind: str, choice: int | None, ranks: bool) -> None:
        """Note that a call of ``kind`` at ``step`` has ended.

        Args:
            choice: the step whose choice of tokens it used. ranks: whether it has chosen tokens.
        """
        self.kinds[step] = kind
        self.is_filled = True  # only read with settings that make a picture's first call whole
        if ranks:
            self.chosen = step
            self.ranked.add(kind)
        for block in self.slot.blocks.values():
            if block.has_chosen:
                block.choice, block.has_chosen = choice, False

    def look_up(self, choice: int | None) -> None:
        """Note for each block whether ``index`` is the choice of step ``choice``, which the next call uses."""
        for block in self.slot.blocks.values():
            block.serves = block.choice == choice

    def break_off(self) -> None:
        """Forget what is remembered, because a call did not finish and may have written one part and not another."""
        self.restart()
        self.is_over = True  # another try may use the same timesteps

    def is_choice_due(self, step: int, kind: str, every: int) -> bool:
        """Whether tokens are chosen at ``step``, if each choice lasts for ``every`` steps of one kind."""
        return self.chosen is None or step - self.chosen >= every or self.kinds.get(self.chosen) != kind

    def has_ranks_for(self, kind: str) -> bool:
        """Whether every block that ranks in a step of ``kind`` has ranked before. Light steps rank in fewer blocks."""
        return kind in self.ranked or (kind == "light" and "pruned" in self.ranked)

    def rate(self) -> float | None:
        """The change of the feature per step between the last two computed steps; None until there are two.

        Kept in ``rates``, by the later of the two.
        """
        computed = computed_steps(self.kinds)
        if len(computed) < 2 or self.slot is None or self.slot.change is None:
            return None
        if computed[-1] not in self.rates:
            self.rates[computed[-1]] = float(self.slot.change) / (computed[-1] - computed[-2])
        return self.rates[computed[-1]]


class Memory:
    """The pictures that are being made, by the storage of their timesteps. A picture is freed with that storage.

    Graphs read fixed addresses, so all pictures of one shape share one slot of the graphs, one after the other.
    """

    def __init__(self) -> None:
        self._pictures: dict[int, tuple[weakref.ref[torch.UntypedStorage], Picture]] = {}
        self._of_graphs: dict[tuple[Any, ...], Slot] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_pictures": {}, "_of_graphs": {}}  # a copy has made no picture yet

    def picture(self, storage: torch.UntypedStorage) -> Picture:
        """The picture with these timesteps; a new one if they are new."""
        address = id(storage)
        known = self._pictures.get(address)
        if known is not None and known[0]() is storage:
            return known[1]
        ref = weakref.ref(storage, lambda _: self._pictures.pop(address, None))
        picture = Picture()
        self._pictures[address] = (ref, picture)
        return picture

    def slot(self, picture: Picture, key: tuple[Any, ...], make: Callable[[], Slot]) -> Slot:
        """The slot of ``picture``; a new, empty one if the key has changed."""
        if picture.slot is None or picture.slot.key != key:
            picture.restart()
            picture.slot = make()
        return picture.slot

    def slot_of_graphs(self, picture: Picture, key: tuple[Any, ...], make: Callable[[], Slot]) -> Slot | None:
        """The slot that graphs of this shape read; None while another, unfinished picture has it."""
        if key not in self._of_graphs:
            slot = self._of_graphs[key] = make()
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
