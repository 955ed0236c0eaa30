"""How out of date a token's cached update is (ours): a factor on the scores, which raises the most outdated tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from atedm_kernels.ops.token_drift import token_drift

# Numbers per token that represent its input: the smallest width that keeps pictures as well as all 48 or 96 channels do
# on the embedded model (docs/quality.md).
DRIFT_WIDTH = 4

# What is remembered of a block's tokens, by name.
State = dict[str, Tensor]


class Staleness(Protocol):
    """``observed`` is what it reads from a block's input ``[B, C, h, w]``; ``state`` is what it remembers.

    Attributes:
        measures: what it measures of a token, in words.
    """

    measures: ClassVar[str]

    def start(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> State:
        """A state for ``shape`` = (B, N, C): tensors that keep their addresses."""
        ...

    def observe(self, x: Tensor, state: State) -> Any: ...

    def scores(self, observed: Any, state: State) -> Tensor:
        """float32 ``[B, 1, N]``, not negative: the higher, the more out of date."""
        ...

    def computed(self, observed: Any, state: State, index: Tensor | None) -> None:
        """Note that the tokens ``index`` ``[B, K]`` have been computed now; None means all tokens."""
        ...


class Drift:
    """How far a token's input has moved since the token was computed: ``‖(x_i − x̂_i) R‖₂``.

    ``R`` is a fixed random projection to ``DRIFT_WIDTH`` numbers. It preserves distances well enough for ranking
    (Johnson and Lindenstrauss, 1984).
    """

    measures: ClassVar[str] = "how far their input has moved since they were last computed"

    def __init__(self, width: int = DRIFT_WIDTH) -> None:
        self.width = width
        self._projections: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def start(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> State:
        batch, tokens, channels = shape
        seen = torch.zeros(batch, self.width, tokens, dtype=dtype, device=device)
        return {"projection": self._projection(channels, dtype, device), "seen": seen}

    def _projection(self, channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """``[width, C]``. Cached: the numbers are drawn on the CPU, equal for all devices, and copying them waits."""
        key = channels, dtype, device
        if key not in self._projections:
            generator = torch.Generator().manual_seed(0)
            projection = torch.randn(self.width, channels, generator=generator) / self.width**0.5
            self._projections[key] = projection.to(device, dtype)
        return self._projections[key]

    def observe(self, x: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """The projected tokens ``[B, width, N]``, and how far they have moved, float32 ``[B, 1, N]``."""
        return token_drift(x, state["projection"], state["seen"])

    def scores(self, observed: tuple[Tensor, Tensor], state: State) -> Tensor:
        return observed[1]

    def computed(self, observed: tuple[Tensor, Tensor], state: State, index: Tensor | None) -> None:
        projected, seen = observed[0], state["seen"]
        if index is None:
            seen.copy_(projected)
        else:
            index = index[:, None].expand(-1, self.width, -1)
            seen.scatter_(2, index, projected.gather(2, index))


class StepsSince:
    """How many calls of the block ago a token was last computed."""

    measures: ClassVar[str] = "how long they have not been computed"

    def start(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> State:
        return {"age": torch.zeros(shape[0], 1, shape[1], device=device)}

    def observe(self, x: Tensor, state: State) -> None:
        return None

    def scores(self, observed: None, state: State) -> Tensor:
        return state["age"] + 1

    def computed(self, observed: None, state: State, index: Tensor | None) -> None:
        age = state["age"]
        if index is None:
            age.zero_()
        else:
            age.add_(1).scatter_(2, index[:, None], 0.0)


# By the name that atedm.apply takes.
STALENESS: dict[str, Callable[[], Staleness]] = {"drift": Drift, "steps": StepsSince}
