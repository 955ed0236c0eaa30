from __future__ import annotations

import pytest
import torch

import atedm_kernels
from tests.helpers import oracle


def select(backend: str, scores: torch.Tensor, keep: int, reduction: str = "rms") -> torch.Tensor:
    with atedm_kernels.backend(backend):
        index = atedm_kernels.select_tokens(scores, keep, reduction=reduction)
    assert index.dtype == torch.int64 and index.shape == (scores.shape[0], keep)
    assert (index >= 0).all() and (index < scores.shape[2]).all()
    assert (index.diff(dim=-1) > 0).all()
    return index


@pytest.mark.parametrize("reduction", ["rms", "mean"])
@pytest.mark.parametrize(("heads", "tokens"), [(1, 1), (3, 7), (10, 257), (2, 1000), (4, 4099), (1, 9001)])
def test_best_tokens(backend, device, heads, tokens, reduction, poisoned_empty):
    torch.manual_seed(tokens)
    scores = torch.rand(2, heads, tokens).to(device) ** 4
    scores /= scores.sum(-1, keepdim=True)
    importance = oracle.joined_heads(scores, reduction)
    for keep in sorted({1, max(1, tokens // 3), tokens}):
        index = select(backend, scores, keep, reduction)
        chosen = torch.zeros_like(importance, dtype=torch.bool).scatter_(1, index, True)
        threshold = importance.sort(-1, descending=True).values[:, keep - 1 : keep]
        assert (importance[chosen].view(2, -1) >= threshold * (1 - 1e-6)).all()
        assert (importance[~chosen].view(2, -1) <= threshold * (1 + 1e-6)).all()


@pytest.mark.parametrize("reduction", ["rms", "mean"])
def test_ties_go_to_the_lower_index(backend, device, reduction):
    torch.manual_seed(0)
    values = torch.randint(0, 4, (3, 1, 500)).float().to(device)
    scores = values.expand(3, 4, 500)
    order = torch.sort(values[:, 0], descending=True, stable=True).indices
    for keep in (1, 100, 130, 377, 499):
        assert torch.equal(select(backend, scores, keep, reduction), order[:, :keep].sort(-1).values)
    assert select(backend, torch.zeros(1, 2, 50, device=device), 3, reduction).tolist() == [[0, 1, 2]]


def test_signs_and_zeros(backend, device):
    """Order of negative numbers, -0.0 equal to 0.0, infinities at the ends."""
    inf = float("inf")
    scores = torch.tensor([[[-0.0, 0.0, -1.0, 1.0, -inf, inf, -2.0, 1e-45, -1e-45]]], device=device)
    expected = [5, 3, 7, 0, 1, 8, 2, 6, 4]
    for keep in range(1, 10):
        assert select(backend, scores, keep, "mean").tolist() == [sorted(expected[:keep])]


@pytest.mark.parametrize("factor", [1e-30, 1e-42, 1e30, 3e38])
@pytest.mark.parametrize("reduction", ["rms", "mean"])
def test_extreme_scores(backend, device, factor, reduction):
    """Squares and sums that would overflow or vanish in float32."""
    values = torch.tensor([0.2, 0.9, 0.5, 1.0, 0.7], device=device)
    scores = (values * factor).expand(1, 6, 5)
    assert select(backend, scores, 3, reduction).tolist() == [[1, 3, 4]]


def test_strided_scores(backend, device):
    torch.manual_seed(0)
    scores = torch.rand(300, 3, 2, 2).to(device)[..., 0].permute(2, 1, 0)
    assert torch.equal(select(backend, scores, 40), select(backend, scores.contiguous(), 40))


@pytest.mark.parametrize("tokens", [20, 5000, 9000])
def test_nan_counts_least(device, tokens):
    """The op rejects NaN where checking costs nothing; the kernel itself has to survive it."""
    from atedm_kernels.ops.select_tokens.reference import select_tokens_reference
    from atedm_kernels.ops.select_tokens.triton_kernel import select_tokens_triton

    torch.manual_seed(0)
    scores = torch.rand(2, 3, tokens).to(device)
    scores[0, 1, ::3] = float("nan")
    scores[1] = float("nan")
    for keep in (1, tokens // 2, tokens - 1):
        got = select_tokens_triton(scores, keep, "rms")
        assert torch.equal(got, select_tokens_reference(scores, keep, "rms"))
        assert got[1].tolist() == list(range(keep))


def test_rows_of_millions_take_one_bit_a_step():
    from atedm_kernels.ops.select_tokens.triton_kernel import select_launch

    for tokens, bits in (((1 << 21) - 1, 2), (1 << 21, 1)):
        scores = torch.empty(1, 1, tokens, device="meta")
        importance = torch.empty(1, tokens, dtype=torch.uint32, device="meta")
        out = torch.empty(1, 5, dtype=torch.int64, device="meta")
        constants = select_launch(scores, importance, out, "rms").constants
        assert constants["BITS"] == bits
        assert tokens < 2 ** constants["COUNT_BITS"] and constants["COUNT_BITS"] * (2**bits - 1) < 64
