"""A record of what pruning did: the scores and the kept tokens of each block in each step."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

# The number of the run of a call that records gradients: such calls come between the steps of a run.
BESIDE = -1


@dataclass(frozen=True)
class Ranked:
    """The tokens that one call of an attention block kept, and the scores that chose them, in this call or earlier.

    Attributes:
        call: number of the UNet call since recording began, from 0.
        step: denoising step; None if not known.
        block: module path in the UNet. level: its resolution level.
        height, width: size of the feature map. tokens: ``height · width``.
        scores: float32 ``[B, tokens]`` on the CPU: the scores that chose the tokens, heads joined. NaN if a graph chose
            them before recording began.
        index: int64 ``[B, K]`` on the CPU, the kept tokens.
        iterations: int32 ``[B, H]`` on the CPU, of the power iteration; None if this call ran none.
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
        blocks: name, level and whether it is pruned, for every attention block of the UNet.
        ranked: the tokens that the blocks kept. tokens: whether ``ranked`` is collected.
        calls: the denoising step of each UNet call; None if not known.
        kinds: the kind of each UNet call, see :mod:`atedm.policy.schedule`.
        runs: a number for each UNet call, equal for all calls of one run; None if not known.
        memory_bytes: the most bytes remembered between two calls, for all pictures together.
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
        """The kinds of the last run, one for each step, as a fixed schedule for :func:`atedm.apply`.

        Steps that were not run, such as the first ones of image-to-image, are whole.

        Raises:
            ValueError: no recorded call has a known step.
        """
        if self._total is None:
            raise ValueError("no recorded call has a known step; expected calls with a scheduler's timesteps")
        kinds = ["whole"] * self._total
        # Calls that record gradients are beside a run, unless there are only those.
        last = ([run for run in self.runs if run != BESIDE] or self.runs)[-1]
        # If runs have no numbers, a run begins where the step falls.
        falls = [n for n in range(1, len(self.calls)) if (self.calls[n] or 0) < (self.calls[n - 1] or 0)]
        start = max(falls, default=0) if last in (None, BESIDE) else 0
        for step, kind, run in list(zip(self.calls, self.kinds, self.runs, strict=True))[start:]:
            if step is not None and step < self._total and run == last:
                kinds[step] = kind
        return kinds

    def step_of(self, call: int) -> int:
        """The denoising step of a UNet call; the number of the call if the step is not known."""
        step = self.calls[call] if call < len(self.calls) else None
        return call if step is None else step

    @property
    def steps(self) -> int:
        """Number of denoising steps up to the last recorded one, counted from the first of the schedule."""
        return max((self.step_of(call) + 1 for call in range(len(self.calls))), default=0)
