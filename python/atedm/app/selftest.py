"""A numerical test of every op on this machine, against dense float64 on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import atedm_kernels as kernels
from atedm_kernels import native

# The contract is 2e-4 for sums and scores. Attention itself is torch's; its limit is the rounding of its output.
_LIMITS = {torch.float32: 2e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
_SCORE_LIMIT = 2e-4


@dataclass(frozen=True)
class Check:
    """The outcome for one op. ``error``: relative error, or the fraction of wrong entries. ``limit``: allowed error."""

    op: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # False for NaN


@dataclass(frozen=True)
class _Problem:
    """A small self-attention and cross-attention with an odd number of tokens, and their maps in float64."""

    q: Tensor
    k: Tensor
    v: Tensor
    text: Tensor

    @property
    def map(self) -> Tensor:
        return self._softmax(self.k)

    @property
    def cross_map(self) -> Tensor:
        return self._softmax(self.text)

    def _softmax(self, k: Tensor) -> Tensor:
        return torch.softmax(self._logits(k), dim=-1)

    def _logits(self, k: Tensor) -> Tensor:
        return self.q.cpu().double() @ k.cpu().double().transpose(-1, -2) / math.sqrt(self.q.shape[-1])

    def lse(self, k: Tensor) -> Tensor:
        return torch.logsumexp(self._logits(k), dim=-1)


def _problem(device: torch.device, dtype: torch.dtype) -> _Problem:
    generator = torch.Generator().manual_seed(0)
    batch, heads, tokens, words, head_dim = 2, 3, 97, 11, 40

    def normal(length: int) -> Tensor:
        x = torch.randn(batch, length, heads, head_dim, generator=generator)
        return (1.5 * x).to(device, dtype).transpose(1, 2)  # strided, as diffusers passes it

    return _Problem(normal(tokens), normal(tokens), normal(tokens), normal(words))


def _relative(value: Tensor, exact: Tensor) -> float:
    return float(((value.cpu().double() - exact).abs() / exact.abs().amax(dim=-1, keepdim=True)).max())


def _differing(value: Tensor, exact: Tensor) -> float:
    return float((value.cpu() != exact).double().mean())


def _iterate(step: Callable[[Tensor], Tensor], start: Tensor, iterations: int) -> Tensor:
    for _ in range(iterations):
        start = step(start)
        start = start / start.sum(dim=-1, keepdim=True)
    return start


def native_library() -> dict[str, Any]:
    """Whether the native CPU library is in use, or why not; and for each instruction set why it cannot run here."""
    try:
        return {"library": native.describe(), "isas": native.isas()}
    except ValueError as error:  # ATEDM_CPU
        return {"library": f"not in use: {error}", "isas": native.isas()}


def check_ops(device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """Run every op once on ``device`` with inputs of ``dtype`` (fp16, bf16 or fp32) and yield its error."""
    p = _problem(device, dtype)
    yield from _check_maps(p, device, _LIMITS[dtype])
    yield from _check_choices(p, device, dtype)


def _check_maps(p: _Problem, device: torch.device, limit: float) -> Iterator[Check]:
    """Check attention, column sums and both rankings."""
    full, cross = p.map, p.cross_map
    tokens = full.shape[-1]
    settings = {"max_iterations": 4, "tolerance": 0.0}

    out, lse = kernels.attention_with_logsumexp(p.q, p.k, p.v)
    error = max(_relative(out, full @ p.v.cpu().double()), _relative(lse, p.lse(p.k)))
    yield Check("attention_with_logsumexp", error, limit)

    exact_lse = p.lse(p.k).float().to(device)
    sums = kernels.attention_column_sums(p.q, p.k, exact_lse)
    yield Check("attention_column_sums", _relative(sums, full.mean(dim=2)), _SCORE_LIMIT)

    scores, _ = kernels.weighted_page_rank(p.q, p.k, exact_lse, **settings)
    uniform = torch.full(full.shape[:3], 1.0 / tokens, dtype=torch.float64)
    exact = _iterate(lambda s: (s[..., None, :] @ full)[..., 0, :], uniform, 4)
    yield Check("weighted_page_rank", _relative(scores, exact), _SCORE_LIMIT)

    cross_lse = p.lse(p.text).float().to(device)
    cross_scores, _ = kernels.weighted_page_rank_cross(p.q, p.text, cross_lse, **settings)
    entropy = -(cross * cross.log()).sum(dim=-1)
    exact_cross = _iterate(
        lambda s: (cross @ (s[..., None, :] @ cross).transpose(-1, -2))[..., 0] / entropy, uniform, 4
    )
    yield Check("weighted_page_rank_cross", _relative(cross_scores, exact_cross), _SCORE_LIMIT)


def _check_choices(p: _Problem, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """Check selection, gathering, the source map and the recoveries, each on the results of the one before."""
    full, exact_lse = p.map, p.lse(p.k).float().to(device)
    tokens = full.shape[-1]

    # With whole numbers the joined scores are exact, so ties are ties on every device.
    marks = torch.arange(tokens).remainder(7).expand(*full.shape[:2], -1)
    index = kernels.select_tokens(marks.float().to(device), 40)
    best = sorted(sorted(range(tokens), key=lambda i: (-(i % 7), i))[:40])
    expected_index = torch.tensor(best).expand(full.shape[0], -1)
    yield Check("select_tokens", _differing(index, expected_index), 0.0)

    index = expected_index.contiguous().to(device)
    x = torch.arange(full.shape[0] * tokens * 8).remainder(251).reshape(full.shape[0], tokens, 8).to(device, dtype)
    compact = kernels.gather_tokens(x, index)
    yield Check("gather_tokens", _differing(compact, x.cpu()[:, best]), 0.0)

    source = kernels.similarity_source(p.q, p.k, exact_lse, index).cpu()
    similarity = full.mean(dim=1)[:, best].mT  # [B, N, 40]: how much each kept token attends to each token
    # Judged by the similarity of the chosen token, because rounding may change a choice between equals.
    lost = 1 - similarity.gather(2, source[..., None])[..., 0] / similarity.amax(dim=-1)
    slot = torch.full((tokens,), -1)
    slot[best] = torch.arange(40)
    kept = slot >= 0
    misplaced = _differing(source[:, kept], slot[kept].expand(full.shape[0], -1))
    yield Check("similarity_source", max(float(lost[:, ~kept].max()), misplaced), _SCORE_LIMIT)

    source = source.to(device)
    recovered = kernels.recover_tokens(compact, source)
    exact_recovered = torch.stack([rows[where] for rows, where in zip(compact.cpu(), source.cpu(), strict=True)])
    yield Check("recover_tokens", _differing(recovered, exact_recovered), 0.0)

    residual = torch.arange(full.shape[0] * 8 * tokens).remainder(4).reshape(full.shape[0], 8, 1, tokens)
    residual = residual.to(device, dtype)
    feature_map = kernels.recover_feature_map(compact, source, residual)
    exact_map = residual.cpu() + exact_recovered.transpose(1, 2)[:, :, None]
    yield Check("recover_feature_map", _differing(feature_map, exact_map), 0.0)

    cache = x.flip(1)
    exact_cache = cache.cpu().clone()
    exact_cache[:, best] = compact.cpu()
    feature_map = kernels.update_feature_map(compact, index, cache, residual)
    exact_map = residual.cpu() + exact_cache.transpose(1, 2)[:, :, None]
    error = max(_differing(feature_map, exact_map), _differing(cache, exact_cache))
    yield Check("update_feature_map", error, 0.0)
