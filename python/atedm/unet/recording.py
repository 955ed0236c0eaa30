"""A record of what pruning did: the scores and the kept tokens of each block and step."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Ranked:
    """What one call of an attention block kept, and by which ranking, its own or an earlier call's.

    Attributes:
        call: which UNet call since recording began, from 0.
        step: denoising step, where the scheduler tells it.
        block: module path in the UNet. level: its resolution level.
        height, width: of the feature map. tokens: ``height · width``.
        scores: float32 ``[B, tokens]`` on the CPU: what the tokens were chosen by, heads joined. NaN where a graph had
            chosen them before recording began.
        index: int64 ``[B, K]`` on the CPU, the kept tokens.
        iterations: int32 ``[B, H]`` on the CPU, of the power iteration; None where this call ran none.
    """

    call: int
    step: int | None
    block: str
    level: int
    height: int
    width: int
    scores: Tensor
    index: Tensor
    iterations: Tensor | None

    @property
    def tokens(self) -> int:
        return self.height * self.width

    def mask(self) -> Tensor:
        """bool ``[B, height, width]``, True where a token was kept."""
        full = self.index.new_zeros(self.index.shape[0], self.tokens, dtype=bool)
        return full.scatter(1, self.index, True).view(-1, self.height, self.width)


@dataclass
class Recording:
    """What :func:`atedm.record` collects, in the order in which it happened.

    Attributes:
        blocks: name, level and whether it is pruned, of every attention block of the UNet.
        tokens: whether it holds ``ranked``, what was chosen.
        calls: the denoising step of each UNet call, None where no scheduler tells it.
        kinds: the kind of each UNet call, see :mod:`atedm.policy.schedule`.
        runs: a number for each UNet call, the same for those of one run; None where that is not known.
        memory_bytes: the most that was remembered between two calls, of all pictures.
    """

    blocks: list[tuple[str, int, bool]] = field(default_factory=list)
    ranked: list[Ranked] = field(default_factory=list)
    calls: list[int | None] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    runs: list[int | None] = field(default_factory=list)
    memory_bytes: int = 0
    tokens: bool = True
    _total: int | None = None

    def note(self, step: int | None, total: int | None, kind: str, memory_bytes: int, run: int | None = None) -> None:
        """Add a UNet call at ``step`` of ``total``."""
        self.calls.append(step)
        self.kinds.append(kind)
        self.runs.append(run)
        self._total = total
        self.memory_bytes = max(self.memory_bytes, memory_bytes)

    def schedule(self) -> list[str]:
        """The kinds that were run, one for each step of the last run: a fixed schedule for :func:`atedm.apply`.

        Steps that were not run, as the first ones of image-to-image, are whole.

        Raises:
            ValueError: no call was recorded whose step is known.
        """
        if self._total is None:
            raise ValueError("no recorded call has a known step; expected calls with a scheduler's timesteps")
        kinds = ["whole"] * self._total
        # Where runs have no numbers, the step falls where one begins.
        falls = [n for n in range(1, len(self.calls)) if (self.calls[n] or 0) < (self.calls[n - 1] or 0)]
        start = max(falls, default=0) if self.runs[-1] is None else 0
        for step, kind, run in list(zip(self.calls, self.kinds, self.runs, strict=True))[start:]:
            if step is not None and step < self._total and run == self.runs[-1]:
                kinds[step] = kind
        return kinds

    def step_of(self, call: int) -> int:
        """The denoising step of a UNet call; the call itself where that is not known."""
        step = self.calls[call] if call < len(self.calls) else None
        return call if step is None else step

    @property
    def steps(self) -> int:
        """How many denoising steps were recorded, counted from the first of the schedule."""
        return max((self.step_of(call) + 1 for call in range(len(self.calls))), default=0)
