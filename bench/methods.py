"""The methods that the benchmarks compare. Each one can apply itself to a pipeline and count its FLOPs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

import atedm
from atedm.app.flops import Flops, UNetFlops
from atedm.policy.options import Options
from atedm_bench.peers import apply_tomesd, deepcache, deepcache_flops, tomesd_flops
from atedm_bench.rankings import RandomRanking, no_ranking

# What a method yields while it is applied: a function to call before each batch, with a number that seeds random draws.
StartBatch = Callable[[int], object]


@dataclass(frozen=True)
class Costs:
    """What a method needs to count its FLOPs: a UNet's counter, and the timesteps of a run."""

    counter: UNetFlops
    timesteps: Tensor

    @property
    def steps(self) -> int:
        return len(self.timesteps)


@dataclass(frozen=True)
class Method:
    """The full UNet, and the base class of the other methods.

    Attributes:
        line: the method's line in the plot of quality over FLOPs.
        records: whether the kinds of its steps are known only from a recording.
    """

    line = "full"
    records = False

    def described(self) -> dict[str, Any]:
        """Return everything that the method's pictures depend on, as JSON values."""
        return {"method": type(self).__name__, **asdict(self)}

    @contextlib.contextmanager
    def in_force(self, pipe: Any) -> Iterator[StartBatch]:
        yield lambda seed: None

    def kinds(self, costs: Costs) -> list[str]:
        """Return the kinds of a run's steps. Not called if the method records."""
        return ["whole"] * costs.steps

    def flops(self, costs: Costs, kinds: Sequence[str]) -> Flops:
        """Return the FLOPs of the mean call of a run whose steps have these ``kinds``, for one image."""
        return costs.counter.full()


@dataclass(frozen=True)
class Ours(Method):
    """:func:`atedm.apply` with ``options``."""

    options: Options
    records = True

    @property
    def line(self) -> str:
        options = self.options
        if "reused" in options.steps.kinds:
            return "both" if options.prunes else "reuse alone"
        copies = (options.ranking, options.recovery, options.staleness) == ("self", "similarity", None)
        return "published" if copies else "tokens alone"

    def described(self) -> dict[str, Any]:
        # All options, because a default may change between two versions.
        return {"method": type(self).__name__, "options": self.options.to_dict()}

    @contextlib.contextmanager
    def in_force(self, pipe: Any) -> Iterator[StartBatch]:
        with atedm.applied(pipe, self.options):
            yield lambda seed: None

    def flops(self, costs: Costs, kinds: Sequence[str]) -> Flops:
        return costs.counter.mean(self.options, kinds)


@dataclass(frozen=True)
class RandomTokens(Ours):
    """Ours with ``options``, but each call chooses its tokens at random."""

    line = "random"

    @contextlib.contextmanager
    def in_force(self, pipe: Any) -> Iterator[StartBatch]:
        ranking = RandomRanking()
        with atedm.applied(pipe, self.options, ranking=ranking):
            yield ranking.restart

    def flops(self, costs: Costs, kinds: Sequence[str]) -> Flops:
        return costs.counter.mean(replace(self.options, ranking=no_ranking), kinds)


@dataclass(frozen=True)
class ToMe(Method):
    """tomesd, which merges this part of the tokens."""

    ratio: float
    line = "tomesd"

    @contextlib.contextmanager
    def in_force(self, pipe: Any) -> Iterator[StartBatch]:
        import tomesd

        def start(seed: int) -> None:
            # tomesd draws from a fork of the global generator. It keeps the fork, and makes one if it has none.
            torch.manual_seed(seed)
            pipe.unet._tome_info["args"]["generator"] = None

        apply_tomesd(pipe.unet, self.ratio)
        try:
            yield start
        finally:
            tomesd.remove_patch(pipe.unet)

    def kinds(self, costs: Costs) -> list[str]:
        return ["merged"] * costs.steps

    def flops(self, costs: Costs, kinds: Sequence[str]) -> Flops:
        return tomesd_flops(costs.counter).at(self.ratio)


@dataclass(frozen=True)
class DeepCache(Method):
    """DeepCache, which computes every ``interval``-th step."""

    interval: int
    line = "DeepCache"

    @contextlib.contextmanager
    def in_force(self, pipe: Any) -> Iterator[StartBatch]:
        with deepcache(pipe, self.interval):
            yield lambda seed: None

    def kinds(self, costs: Costs) -> list[str]:
        return deepcache_flops(costs.counter).kinds(self.interval, costs.timesteps)

    def flops(self, costs: Costs, kinds: Sequence[str]) -> Flops:
        return deepcache_flops(costs.counter).mean(kinds)
