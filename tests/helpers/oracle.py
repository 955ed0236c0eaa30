"""The ops by their definition, with a dense attention map in float64 from the same rounded inputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention_inputs(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    std: float = 1.0,
    layout: str = "heads first",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``q [B, H, M, D]``, ``k [B, H, N, D]`` and their float32 logsumexp, for ``shape`` = B, H, M, N, D.

    ``std``: standard deviation of the logits. ``layout``: ``heads first`` is contiguous, ``tokens first`` is a
    transposed ``[B, N, H, D]``, and ``every second`` is a slice with a last stride of 2.
    """
    batch, heads, queries, keys, head_dim = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(tokens: int) -> Tensor:
        x = torch.randn(batch, heads, tokens, head_dim, generator=generator) * math.sqrt(std)
        x = x.to(device, dtype)
        if layout == "tokens first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "every second":
            return torch.stack([x, torch.full_like(x, float("nan"))], -1).flatten(-2)[..., ::2]
        return x

    q, k = draw(queries), draw(keys)
    return q, k, logits(q, k).logsumexp(-1).float()


def logits(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return scale * torch.einsum("bhmd,bhnd->bhmn", q.double(), k.double())


def attention_map(q: Tensor, k: Tensor, lse: Tensor, scale: float | None = None) -> Tensor:
    """Return the map that ``lse`` normalises. The rounding of ``lse`` is part of the input."""
    return torch.exp(logits(q, k, scale) - lse.double()[..., None])


def column_sums(q: Tensor, k: Tensor, lse: Tensor, weights: Tensor | None) -> Tensor:
    weights = torch.full_like(lse, 1.0 / lse.shape[-1]) if weights is None else weights
    return torch.einsum("bhm,bhmn->bhn", weights.double(), attention_map(q, k, lse))


def page_rank(
    q: Tensor, k: Tensor, lse: Tensor, iterations: Tensor, cross: bool = False, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return each head's scores after its number of iterations (``[B, H]``), and the L1 changes ``[steps, B, H]``."""
    log_map = logits(q, k) - lse.double()[..., None]
    a = log_map.exp()
    entropy = -(a * log_map).sum(-1)
    scores = torch.ones_like(lse, dtype=torch.float64) if initial is None else initial.double()
    scores = scores / scores.sum(-1, keepdim=True)
    changes = []
    for step in range(int(iterations.max())):
        new = torch.einsum("bhm,bhmn->bhn", scores, a)
        if cross:
            new = torch.einsum("bhmn,bhn->bhm", a, new) / entropy.clamp(min=1e-6)
        new = new / new.sum(-1, keepdim=True)
        changes.append((new - scores).abs().sum(-1))
        scores = torch.where((step < iterations)[..., None], new, scores)
    return scores, torch.stack(changes)


def joined_heads(scores: Tensor, reduction: str) -> Tensor:
    scores = scores.double()
    return scores.mean(1) if reduction == "mean" else scores.square().mean(1).sqrt()


def mean_similarity(q: Tensor, k: Tensor, lse: Tensor, index: Tensor) -> Tensor:
    """Return ``[B, N, K]``: the attention that each token gets from each kept token, averaged over the heads."""
    a = attention_map(q, k, lse).mean(1)
    return a.gather(1, index[:, :, None].expand(-1, -1, a.shape[2])).mT


def kept_tokens(batch: int, tokens: int, keep: int, device: torch.device) -> Tensor:
    """Return random kept tokens ``[B, K]``, ascending."""
    torch.manual_seed(keep)
    return torch.stack([torch.randperm(tokens)[:keep].sort().values for _ in range(batch)]).to(device)


def assert_sources(q, k, lse, index, source, tolerance: float) -> None:
    """Compare sources by the similarity that they pick, because two candidates may be equal up to rounding."""
    keep = index.shape[1]
    assert source.dtype == torch.int64 and source.shape == (q.shape[0], q.shape[2])
    assert (source >= 0).all() and (source < keep).all()
    slots = torch.arange(keep, device=q.device).expand_as(index)
    assert torch.equal(source.gather(1, index), slots)
    similarity = mean_similarity(q, k, lse, index)
    dropped = torch.ones_like(source, dtype=torch.bool).scatter_(1, index, False)
    picked = similarity.gather(2, source[..., None])[..., 0]
    assert (picked >= similarity.amax(-1) * (1 - tolerance))[dropped].all()


def assert_rounded_sum(out: Tensor, expected: Tensor, backend: str) -> None:
    assert out.dtype == expected.dtype
    if backend == "triton" and out.dtype == torch.bfloat16 and out.device.type == "cpu":
        # Triton's interpreter truncates to bfloat16; a GPU rounds to nearest.
        assert ((out.double() - expected.double()).abs() <= expected.double().abs() * 2**-7).all()
    else:
        assert torch.equal(out, expected)


def layouts_of_map(x: Tensor) -> list[Tensor]:
    """The feature map ``x`` ``[B, C, h, w]`` in other places of memory, with NaN in the gaps."""
    return [
        x,
        x.to(memory_format=torch.channels_last),
        torch.stack([x, torch.full_like(x, float("nan"))], -1).flatten(-2)[..., ::2],
        torch.nn.functional.pad(x, (0, 3), value=float("nan"))[..., : x.shape[3]],
        x.mT.contiguous().mT,
    ]


def update_inputs(
    shape: tuple[int, int, int, int], keep: int, x_dtype: torch.dtype, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``x, index, cache, residual`` for a residual of ``shape`` and ``dtype``."""
    batch, channels, height, width = shape
    generator = torch.Generator().manual_seed(keep)
    sizes = (batch, keep, channels), (batch, height * width, channels), shape
    x, cache, residual = (torch.randn(size, generator=generator) for size in sizes)
    index = kept_tokens(batch, height * width, keep, device)
    return x.to(device, x_dtype), index, cache.to(device, x_dtype), residual.to(device, dtype)


def updated(x: Tensor, index: Tensor, cache: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Return the updated cache, and its float64 sum with the residual, rounded once to the promoted dtype."""
    cache = cache.clone()
    for b in range(cache.shape[0]):
        cache[b, index[b]] = x[b]
    added = cache.double().transpose(1, 2).reshape(residual.shape)
    return cache, (residual.double() + added).to(torch.promote_types(x.dtype, residual.dtype))


# Invalid lists of kept tokens for a map of six, which the op's checks refuse; and the slot that each token gets.
_WILD = {
    (-1, 2, 2**40): (None, None, 1, None, None, None),
    (-(2**62), -5, 5, 6): (None, None, None, None, None, 2),
    (0, 0, 3, 3): (1, None, None, 3, None, None),
    (6,): (None,) * 6,
}


def assert_wild_updates_stay_inside(update, device: torch.device) -> None:
    """Check that ``update``, a backend's function below the op's checks, writes only into the cache."""
    x = torch.randn(1, 4, 24, generator=torch.Generator().manual_seed(0)).to(device)
    residual = torch.zeros(1, 24, 2, 3, device=device)
    for kept, slots in [*_WILD.items(), ((5, 0, 2**40, -1), None)]:
        memory = torch.full((3, 6, 24), 7.0, device=device)
        cache = memory[1:2]
        out = update(x[:, : len(kept)], torch.tensor([kept], device=device), cache, residual)
        assert torch.equal(out.flatten(2).mT, cache)
        assert (memory[::2] == 7).all()
        for token, row in enumerate(cache[0]):
            if slots is None:  # tokens out of order may be missed
                allowed = [row.new_full((24,), 7.0), *x[0, [slot for slot, other in enumerate(kept) if other == token]]]
                assert any(torch.equal(row, one) for one in allowed)
            else:
                slot = slots[token]
                assert torch.equal(row, row.new_full((24,), 7.0) if slot is None else x[0, slot])
