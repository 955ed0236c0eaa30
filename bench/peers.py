"""Runs other packages that make a UNet cheaper, as their READMEs recommend, and counts their FLOPs."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from diffusers import EulerDiscreteScheduler
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from atedm.app.flops import Flops, UNetFlops, count_flops, mean_flops, solve_decreasing
from atedm.app.models import meta_unet

# The largest ratio that tomesd can merge with its 2 × 2 cells: one token in four is a destination and stays.
TOMESD_MAX_RATIO = 0.75


def apply_tomesd(unet: nn.Module, ratio: float) -> None:
    """Patch ``unet`` with tomesd so that it saves most on SDXL: at both levels, in all three parts of a layer.

    Raises:
        RuntimeError: tomesd is not installed.
    """
    try:
        import tomesd
    except ModuleNotFoundError as error:
        raise RuntimeError("tomesd is not installed; pip install 'atedm-kernels[bench]'") from error
    tomesd.apply_patch(unet, ratio=ratio, max_downsample=4, merge_attn=True, merge_crossattn=True, merge_mlp=True)


class TomesdFlops:
    """Counts the FLOPs of calls patched by :func:`apply_tomesd`, on the UNet and inputs of ``counter``; each once."""

    def __init__(self, counter: UNetFlops) -> None:
        self._counter = weakref.proxy(counter)
        # A separate UNet, because tomesd leaves attributes behind on what it patches.
        self._unet = meta_unet(counter.config)
        self._counted: dict[tuple[int, ...], Flops] = {}  # by the tokens merged in each kind of block

    def at(self, ratio: float) -> Flops:
        """Return the FLOPs of a call at ``ratio``; token matching counts as ``scoring``."""
        sizes = (math.prod(args[0].shape[-2:]) for _, _, args, _, _ in self._counter.blocks())
        merged = tuple(int(tokens * ratio) for tokens in sizes)
        if merged not in self._counted:
            self._counted[merged] = self._count(ratio)
        return self._counted[merged]

    def _count(self, ratio: float) -> Flops:
        """Count as :class:`UNetFlops` does: one block of each kind shows how a merged call differs from a whole one."""
        apply_tomesd(self._unet, ratio)
        # tomesd learns the image's size in a hook of the UNet. The rest of this call is not needed.
        self._unet.forward = lambda *args, **kwargs: None
        self._counter.call(self._unet)
        del self._unet.forward
        found = self._counter.full()
        merged: dict[tuple, Flops] = {}
        for block, kind, args, kwargs, whole in self._counter.blocks():
            if kind not in merged:
                module = self._unet.get_submodule(block.name)
                with _counting_matching() as matching:
                    total = count_flops(lambda module=module, args=args, kwargs=kwargs: module(*args, **kwargs))
                merged[kind] = Flops(total.unet - sum(matching), sum(matching))
            found += merged[kind] - whole
        return found

    def nearest_ratio(self, target: int) -> float:
        """Return the ratio whose UNet FLOPs (without matching) are nearest to ``target`` FLOPs."""

        def count(ratio: float) -> float:
            return self.at(ratio).unet

        if count(TOMESD_MAX_RATIO) >= target:
            return TOMESD_MAX_RATIO
        if count(0.0) <= target:
            return 0.0
        return solve_decreasing(count, target, 0.0, TOMESD_MAX_RATIO)


# The peers' counters for each UNet's own counter, by class.
_counters: weakref.WeakKeyDictionary[UNetFlops, dict[type, Any]] = weakref.WeakKeyDictionary()


def _beside(counter: UNetFlops, kind: type) -> Any:
    kept = _counters.setdefault(counter, {})
    if kind not in kept:
        kept[kind] = kind(counter)
    return kept[kind]


def tomesd_flops(counter: UNetFlops) -> TomesdFlops:
    """Return tomesd's counter for the UNet of ``counter``. It is created once, and keeps its counts."""
    return _beside(counter, TomesdFlops)


def _deepcache_helper(pipe: Any, interval: int) -> Any:
    try:
        from DeepCache import DeepCacheSDHelper
    except ModuleNotFoundError as error:
        raise RuntimeError("DeepCache is not installed; pip install 'atedm-kernels[quality]'") from error
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    return helper


@contextlib.contextmanager
def deepcache(pipe: Any, interval: int) -> Iterator[None]:
    """Run ``pipe`` with DeepCache, which computes every ``interval``-th step and caches at its shallowest branch.

    Raises:
        RuntimeError: DeepCache is not installed.
    """
    helper = _deepcache_helper(pipe, interval)
    untouched = [module for module in pipe.unet.modules() if "forward" not in module.__dict__]
    helper.enable()
    try:
        yield
    finally:
        helper.disable()
        for module in untouched:
            module.__dict__.pop("forward", None)  # DeepCache leaves the module's own forward behind, as an attribute


class DeepCacheFlops:
    """Counts the FLOPs of calls that DeepCache has wrapped, on the UNet and inputs of ``counter``; each kind once."""

    def __init__(self, counter: UNetFlops) -> None:
        self._counter = weakref.proxy(counter)
        self._counted: dict[str, Flops] = {}

    def kinds(self, interval: int, timesteps: Tensor) -> list[str]:
        """Return ``"whole"`` or ``"reused"`` for each of a run's ``timesteps``, as DeepCache's wrapped blocks do."""
        helper = _deepcache_helper(None, interval)
        helper.reset_states()
        values = timesteps.tolist()
        kinds = []
        for value in values:
            helper.cur_timestep = values.index(value)  # DeepCache finds the step so: the first of equal timesteps
            kinds.append("reused" if helper.is_skip_step(0, 0, "mid") else "whole")
        return kinds

    def mean(self, kinds: Sequence[str]) -> Flops:
        """Return the FLOPs of the mean call of a run whose steps have these ``kinds``."""
        if not self._counted:
            self._counted = self._count()
        return mean_flops(self._counted.__getitem__, kinds)

    def _count(self) -> dict[str, Flops]:
        unet = meta_unet(self._counter.config)
        scheduler = EulerDiscreteScheduler()
        scheduler.set_timesteps(2)
        with deepcache(SimpleNamespace(unet=unet, scheduler=scheduler), interval=2):
            return {
                kind: count_flops(lambda step=step: self._counter.call(unet, scheduler.timesteps[step]))
                for step, kind in enumerate(("whole", "reused"))
            }


def deepcache_flops(counter: UNetFlops) -> DeepCacheFlops:
    """Return DeepCache's counter for the UNet of ``counter``. It is created once, and keeps its counts."""
    return _beside(counter, DeepCacheFlops)


@contextlib.contextmanager
def _counting_matching() -> Iterator[list[int]]:
    """Collect the FLOPs of each of tomesd's token matchings, which run inside the layers."""
    from tomesd import merge

    original = merge.bipartite_soft_matching_random2d
    counted: list[int] = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        with FlopCounterMode(display=False) as mode:
            found = original(*args, **kwargs)
        counted.append(mode.get_total_flops())
        return found

    merge.bipartite_soft_matching_random2d = counting
    try:
        yield counted
    finally:
        merge.bipartite_soft_matching_random2d = original
