"""The paper's method in plain PyTorch, with the map stored. The ops are compared with it, eager and compiled."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_map(q: Tensor, k: Tensor) -> Tensor:
    """Return the map ``[B, H, M, N]``, in the dtype of ``q``."""
    return torch.softmax(q @ k.transpose(2, 3) * q.shape[3] ** -0.5, dim=-1)


def column_sums(q: Tensor, k: Tensor) -> Tensor:
    return attention_map(q, k).mean(dim=2)


def weighted_column_sums(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    return (weights[:, :, None].to(q.dtype) @ attention_map(q, k))[:, :, 0]


def page_rank(q: Tensor, k: Tensor, iterations: int, initial: Tensor | None = None) -> Tensor:
    a = attention_map(q, k)
    scores = a.new_ones(a.shape[:3])[:, :, None] if initial is None else initial[:, :, None]
    scores = (scores / scores.sum(dim=-1, keepdim=True)).to(a.dtype)
    for _ in range(iterations):
        scores = scores @ a
        scores = scores / scores.sum(dim=-1, keepdim=True)
    return scores[:, :, 0]


def page_rank_cross(q: Tensor, k: Tensor, iterations: int) -> Tensor:
    a = attention_map(q, k)
    entropy = torch.special.entr(a).sum(dim=-1).clamp_min(1e-6)
    scores = a.new_full((*a.shape[:2], 1, a.shape[2]), 1 / a.shape[2])
    for _ in range(iterations):
        scores = (a @ (scores @ a).transpose(2, 3)).transpose(2, 3) / entropy[:, :, None]
        scores = scores / scores.sum(dim=-1, keepdim=True)
    return scores[:, :, 0]


def select(scores: Tensor, keep: int) -> Tensor:
    return scores.square().mean(dim=1).sqrt().topk(keep, dim=-1).indices.sort(dim=-1).values


def source(q: Tensor, k: Tensor, index: Tensor) -> Tensor:
    similarity = attention_map(q, k).mean(dim=1)
    tokens = similarity.shape[2]
    found = similarity.gather(1, index[:, :, None].expand(-1, -1, tokens)).argmax(dim=1)
    slots = torch.arange(index.shape[1], device=index.device).expand_as(index)
    return found.scatter(1, index, slots)


def gather(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def update_feature_map(x: Tensor, index: Tensor, cache: Tensor, residual: Tensor) -> Tensor:
    cache.scatter_(1, index[:, :, None].expand_as(x), x)
    return residual + cache.transpose(1, 2).reshape(residual.shape)


def recover_feature_map(x: Tensor, source: Tensor, residual: Tensor) -> Tensor:
    return residual + gather(x, source).transpose(1, 2).reshape(residual.shape)
