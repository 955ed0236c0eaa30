"""Measures what a pruned call costs the host: the plug-in's own work, without any kernel.

A GPU hides the host's work as long as its own work takes longer. With small pictures or a fast GPU it does not. Here
the pruned and the whole UNet both run on the CPU, with few channels. What computes returns empty tensors: atedm's ops,
and the torch functions that take most of the time. What is left is Python and torch's dispatch.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import EulerDiscreteScheduler
from torch import Tensor, nn

import atedm
from atedm.app.models import meta_unet, unet_inputs
from atedm_kernels.registry import Op

# A group norm refuses fewer channels than it has groups.
_CHANNELS, _PIXELS, _TOKENS = 32, 128, 8

# Steps of a run. The first one does not count: it is whole, since there is nothing yet to recover dropped tokens from.
STEPS = 10
MIN_ROUNDS, MAX_ROUNDS = 10, 30


def host_seconds(config: Mapping[str, Any], ratio: float, rounds: int) -> dict[str, Any]:
    """Return the fields of a row: CPU seconds of the calling thread in a pruned call, minus those in a whole call.

    ``seconds`` is the mean over the pruned steps of a run; each step is the median over ``rounds``.

    Args:
        config: the UNet's configuration. Its blocks and layers are kept, its channels are not.
    """
    whole, pruned = (_small(config) for _ in range(2))
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    # No default schedule: it asks how much features change, and here they are uninitialised.
    atedm.apply(pruned, ratio=ratio, scheduler=scheduler, schedule=None)
    (sample, _, text), kwargs = unet_inputs(whole, width=_PIXELS, height=_PIXELS, tokens=_TOKENS)

    def seconds(unet: nn.Module, timestep: Tensor) -> float:
        start = time.thread_time()
        unet(sample, timestep, text, **kwargs)
        return time.thread_time() - start

    taken: list[list[tuple[float, float]]] = []
    with torch.inference_mode(), without_kernels():
        for n in range(rounds + 1):
            taken.append([])
            for timestep in scheduler.timesteps:
                # The two take turns at being first, so that neither always finds the caches as the other left them.
                order = (whole, pruned) if (n + len(taken[-1])) % 2 else (pruned, whole)
                found = {unet is pruned: seconds(unet, timestep) for unet in order}
                taken[-1].append((found[False], found[True]))
    taken = [calls[1:] for calls in taken[1:]]  # without the warm-up round, and without each round's whole step
    by_step = [statistics.median(there - here for here, there in calls) for calls in zip(*taken, strict=True)]
    by_round = [statistics.fmean(there - here for here, there in calls) for calls in taken]
    return {
        "seconds": statistics.fmean(by_step),
        "seconds_low": min(by_round),
        "seconds_high": max(by_round),
        "repeats": rounds,
        "steps": STEPS,
        "full_host_seconds": statistics.median(here for calls in taken for here, _ in calls),
        "derived": False,
    }


def _small(config: Mapping[str, Any]) -> nn.Module:
    """Build a UNet with the same blocks and layers but few channels; its weights are never read."""
    channels = (_CHANNELS,) * len(config["block_out_channels"])
    small = {**config, "block_out_channels": channels, "attention_head_dim": 1, "num_attention_heads": None}
    return meta_unet(small).to_empty(device="cpu")


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Make atedm's ops and torch's layer functions return empty tensors of the right shape; indices are 0."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Op, "__call__", lambda op, *arguments: _in_range(op.fake(*arguments))))
        for name, function in _EMPTY.items():
            stack.enter_context(mock.patch.object(F, name, function))
        yield


def _in_range(out: Any) -> Any:
    """Zero the token indices in ``out``: torch's own functions read and check them."""
    for x in out if isinstance(out, tuple) else (out,):
        if x.dtype == torch.int64:
            x.zero_()
    return out


def _empty_like(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(x)


def _empty_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _empty_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    *_: Any,
) -> Tensor:
    height, width = (
        (side + 2 * around - kernel) // step + 1
        for side, kernel, step, around in zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True)
    )
    return x.new_empty((x.shape[0], weight.shape[0], height, width))


_EMPTY = {
    "linear": _empty_linear,
    "conv2d": _empty_conv2d,
    **dict.fromkeys(("scaled_dot_product_attention", "layer_norm", "group_norm", "silu", "gelu"), _empty_like),
}
