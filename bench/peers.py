"""Other packages that make a UNet cheaper, used as their READMEs recommend, and what they cost."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from atedm.app.flops import Flops, UNetFlops, count_flops, solve_decreasing
from atedm.app.models import meta_unet

# The largest ratio that tomesd can merge with its 2 × 2 cells: one token in four is a destination and stays.
TOMESD_MAX_RATIO = 0.75


def apply_tomesd(unet: nn.Module, ratio: float) -> None:
    """Patch ``unet`` with tomesd for its largest savings on SDXL: at both levels, in all three parts of a layer.

    Raises:
        RuntimeError: tomesd is not installed.
    """
    try:
        import tomesd
    except ModuleNotFoundError as error:
        raise RuntimeError("tomesd is not installed; pip install 'atedm-kernels[bench]'") from error
    tomesd.apply_patch(unet, ratio=ratio, max_downsample=4, merge_attn=True, merge_crossattn=True, merge_mlp=True)


class TomesdFlops:
    """Counts calls patched by :func:`apply_tomesd`, on the UNet and inputs of ``counter``; caches each ratio."""

    def __init__(self, counter: UNetFlops) -> None:
        self._counter = weakref.proxy(counter)
        # Its own, since tomesd leaves attributes behind on what it patches.
        self._unet = meta_unet(counter.config)
        self._counted: dict[float, Flops] = {}

    def at(self, ratio: float) -> Flops:
        """FLOPs of a call at ``ratio``; token matching counts as ``scoring``."""
        if ratio not in self._counted:
            self._counted[ratio] = self._count(ratio)
        return self._counted[ratio]

    def _count(self, ratio: float) -> Flops:
        """As :class:`UNetFlops` does: one block of each kind tells by what a call differs from a whole one."""
        apply_tomesd(self._unet, ratio)
        # tomesd learns the size of the image from a hook of the UNet; nothing else of the call is wanted.
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
        """The ratio whose UNet FLOPs (without matching) are nearest to ``target`` FLOPs."""

        def count(ratio: float) -> float:
            return self.at(ratio).unet

        if count(TOMESD_MAX_RATIO) >= target:
            return TOMESD_MAX_RATIO
        if count(0.0) <= target:
            return 0.0
        return solve_decreasing(count, target, 0.0, TOMESD_MAX_RATIO)


_counters: weakref.WeakKeyDictionary[UNetFlops, TomesdFlops] = weakref.WeakKeyDictionary()


def tomesd_flops(counter: UNetFlops) -> TomesdFlops:
    """The one beside ``counter``, which keeps its counts."""
    if counter not in _counters:
        _counters[counter] = TomesdFlops(counter)
    return _counters[counter]


@contextlib.contextmanager
def _counting_matching() -> Iterator[list[int]]:
    """Collect the FLOPs of each token matching of tomesd, which runs inside the layers."""
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
