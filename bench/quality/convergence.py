"""Studies the power iteration on real maps: when it converges, and how soon the kept set stops changing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

import atedm
from atedm.app.prompts import PromptCase, Sampling
from atedm.policy.options import PUBLISHED, Options
from atedm.policy.selection import kept_tokens
from atedm.unet.blocks import attention_blocks
from atedm_bench.quality.images import run_without_decoding
from atedm_kernels import DEFAULT_MAX_ITERATIONS

TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4)

# The kept sets after these numbers of iterations are compared with the set after LIMIT.
ITERATIONS = (1, 2, 3, 4, 5, 6, 8, 10, 15)
LIMIT = 60

# Numbers of iterations from the scores of the block's previous ranking. A picture's first ranking begins at uniform
# scores.
WARM_ITERATIONS = (1, 2, 3, 5)

# With these limits on the iterations, the study measures what stopping at each tolerance costs in overlap and saves.
STOP_LIMITS = (3, 5, 10)


@dataclass
class _Seen:
    """What was seen of one block at one step.

    ``iterations``: by tolerance, the iterations until the scores change by less, per head. ``jaccard``: by number of
    iterations, the Jaccard index with the converged kept set, per batch row. ``stopped``: by (tolerance, limit), the
    iterations (per head) and the Jaccard index (per batch row). ``warm``: like ``jaccard``, but from the scores of the
    previous ranking; empty at a picture's first ranking.
    """

    tokens: int = 0
    iterations: dict[float, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    jaccard: dict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    stopped: dict[tuple[float, int], list[tuple[Tensor, Tensor]]] = field(default_factory=lambda: defaultdict(list))
    warm: dict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))


def _kept(scores: Tensor, keep: int) -> Tensor:
    """Return the mask ``[B, N]`` of the kept tokens; the root mean square combines the heads."""
    joined = scores.square().mean(1)
    return torch.zeros_like(joined, dtype=torch.bool).scatter_(1, joined.topk(keep, dim=1).indices, True)


def _overlap(mask: Tensor, last: Tensor) -> Tensor:
    """Return the Jaccard index of the two kept sets, per batch row: ``[B]``."""
    return ((mask & last).sum(1) / (mask | last).sum(1)).cpu()


def _iterate(scores: Tensor, attention: Tensor, times: int = 1) -> Tensor:
    for _ in range(times):
        scores = (scores[:, :, None] @ attention)[:, :, 0]
        scores = scores / scores.sum(2, keepdim=True)
    return scores


def _observe(q: Tensor, k: Tensor, lse: Tensor, keep: int, seen: _Seen, before: dict[int, Tensor]) -> Tensor:
    """Iterate in float64 on the stored map, note in ``seen`` what happens, and return the converged scores.

    Args:
        before: by number of :data:`WARM_ITERATIONS`, the scores of the block's previous ranking; they are replaced by
            the new ones. Empty at a picture's first ranking.
    """
    scale = q.shape[3] ** -0.5
    attention = torch.exp(q.double() @ k.double().transpose(2, 3) * scale - lse.double()[..., None])
    scores = torch.full(q.shape[:3], 1 / q.shape[2], dtype=torch.float64, device=q.device)
    reached = {tolerance: torch.full(q.shape[:2], LIMIT) for tolerance in TOLERANCES}
    masks, history = {}, [scores]
    for iteration in range(1, LIMIT + 1):
        previous, scores = scores, _iterate(scores, attention)
        change = (scores - previous).abs().sum(2).cpu()
        for tolerance, found in reached.items():
            found[(change < tolerance) & (found == LIMIT)] = iteration
        if iteration <= max(STOP_LIMITS):
            history.append(scores)
        if iteration in ITERATIONS:
            masks[iteration] = _kept(scores, keep)
    last = _kept(scores, keep)
    seen.tokens = q.shape[2]
    for tolerance, found in reached.items():
        seen.iterations[tolerance].append(found.flatten())
    for iteration, mask in masks.items():
        seen.jaccard[iteration].append(_overlap(mask, last))
    for times in WARM_ITERATIONS:
        if times in before:
            before[times] = _iterate(before[times], attention, times)
            seen.warm[times].append(_overlap(_kept(before[times], keep), last))
        else:
            before[times] = history[DEFAULT_MAX_ITERATIONS]
    series = torch.stack(history)  # [iterations + 1, B, H, N]
    for tolerance, found in reached.items():
        for limit in STOP_LIMITS:
            # Each head stops on its own, as in weighted_page_rank.
            taken = found.clamp(max=limit)
            at = taken.to(series.device)[None, :, :, None].expand(1, *series.shape[1:])
            kept = _kept(series.gather(0, at)[0], keep)
            seen.stopped[tolerance, limit].append((taken.flatten(), _overlap(kept, last)))
    return scores.float()


def _row(name: str, seen: Sequence[_Seen]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "tokens": max(s.tokens for s in seen)}
    for tolerance in TOLERANCES:
        found = torch.cat([x for s in seen for x in s.iterations[tolerance]]).double()
        row[f"iterations_to_{tolerance:g}"] = float(found.mean())
        row[f"iterations_to_{tolerance:g}_max"] = int(found.max())
    for iteration in ITERATIONS:
        found = torch.cat([x for s in seen for x in s.jaccard[iteration]]).double()
        row[f"jaccard_{iteration}"] = float(found.mean())
        row[f"jaccard_{iteration}_min"] = float(found.min())
    for times in WARM_ITERATIONS:
        found = [x for s in seen for x in s.warm[times]]
        row[f"jaccard_warm_{times}"] = float(torch.cat(found).double().mean()) if found else None
    for tolerance in TOLERANCES:
        for limit in STOP_LIMITS:
            pairs = [pair for s in seen for pair in s.stopped[tolerance, limit]]
            taken, overlap = (torch.cat(part).double() for part in zip(*pairs, strict=True))
            name = f"stopped_{tolerance:g}_of_{limit}"
            row |= {f"{name}_iterations": float(taken.mean()), f"{name}_jaccard": float(overlap.mean())}
    return row


class RunningBlock:
    """Tracks which attention block of ``unet`` is running, inside a ``with`` block."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet
        self.name = ""

    def __enter__(self) -> RunningBlock:
        self._handles = [
            block.module.register_forward_pre_hook(self._watch(block.name)) for block in attention_blocks(self.unet)
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _watch(self, name: str) -> Callable[..., None]:
        def remember(*_: object) -> None:
            self.name = name

        return remember


# The runs to watch, by which steps rank tokens. In the first, a block ranks at every step.
RUNS: dict[str, Options] = {"published, every step": replace(PUBLISHED, schedule=None), "default": Options()}


def study(pipe: Any, cases: Sequence[PromptCase], ratio: float, sampling: Sampling) -> list[dict[str, Any]]:
    """Make the pictures of ``cases``, pruned at ``ratio``, in each of :data:`RUNS`, and watch every ranking.

    Returns:
        Flat rows, ``run`` by ``run``: one per block (its ``step`` is None), then one per block and step.
        ``iterations_to_T``: iterations until the scores change by less than ``T``, mean over heads (60: never).
        ``jaccard_n``: overlap between the sets kept after n and after 60 iterations, mean over pictures. ``_max`` and
        ``_min`` are the worst cases. ``jaccard_warm_n``: the same after n iterations from the scores of the previous
        ranking, which began in the same way; None at a picture's first ranking. ``stopped_T_of_n``: the iterations
        taken and the overlap with tolerance ``T`` and at most n iterations.
    """
    return [
        {**row, "run": name}
        for name, options in RUNS.items()
        for row in _study(pipe, cases, replace(options, ratio=ratio), sampling)
    ]


def _study(pipe: Any, cases: Sequence[PromptCase], options: Options, sampling: Sampling) -> list[dict[str, Any]]:
    seen: dict[tuple[str, int], _Seen] = defaultdict(_Seen)
    before: dict[str, dict[int, Tensor]] = defaultdict(dict)
    step = 0

    def advance(*_: Any) -> dict[str, Any]:
        nonlocal step
        step += 1
        return _[-1]

    with RunningBlock(pipe.unet) as running:

        def ranking(q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
            keep = kept_tokens(q.shape[2], options.ratio)
            return _observe(q, k, lse, keep, seen[running.name, step], before[running.name])

        with atedm.applied(pipe, options, ranking=ranking):
            run_without_decoding(pipe, cases, sampling, callback_on_step_end=advance)
    names = list(dict.fromkeys(name for name, _ in seen))
    rows = [{**_row(name, [s for (block, _), s in seen.items() if block == name]), "step": None} for name in names]
    return rows + [{**_row(name, [found]), "step": at} for (name, at), found in seen.items()]
