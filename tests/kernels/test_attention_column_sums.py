from __future__ import annotations

import pytest
import torch

import atedm_kernels
from tests.helpers import oracle

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# B, H, M, N, D
SHAPES = [
    (1, 1, 1, 1, 8),
    (2, 3, 67, 67, 64),
    (1, 2, 131, 77, 40),
    (1, 1, 64, 257, 20),
    (2, 1, 300, 5, 80),
    (1, 2, 33, 130, 128),
    (1, 1, 70, 65, 160),
    (1, 1, 35, 40, 256),
]


def assert_sums(got: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor, tolerance: float) -> None:
    """Error relative to ``scale``, the sum of absolute terms: with weights of both signs the sum itself may vanish."""
    assert got.dtype == torch.float32 and got.shape == expected.shape
    assert torch.isfinite(got).all()
    assert ((got.double() - expected).abs() / scale).max() < tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_uniform_weights(backend, device, dtype, shape, poisoned_empty):
    q, k, lse = oracle.attention_inputs(shape, dtype, device)
    with atedm_kernels.backend(backend):
        sums = atedm_kernels.attention_column_sums(q, k, lse)
    expected = oracle.column_sums(q, k, lse, None)
    assert_sums(sums, expected, expected, 1e-5 if dtype == torch.float32 else 2e-4)
    assert (sums.double().sum(-1) - 1).abs().max() < 2e-5


def weights_of(kind: str, lse: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)
    if kind == "one-hot":
        return torch.zeros_like(lse).index_fill_(-1, torch.tensor([lse.shape[-1] - 1], device=lse.device), 1.0)
    if kind == "zero":
        return torch.zeros_like(lse)
    if kind == "strided":
        return torch.rand(*lse.shape[::-1]).to(lse.device).permute(2, 1, 0)
    return torch.randn(lse.shape).to(lse.device)


@pytest.mark.parametrize("kind", ["both signs", "zero", "one-hot", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights(backend, device, dtype, kind):
    q, k, lse = oracle.attention_inputs((2, 2, 75, 90, 48), dtype, device)
    weights = weights_of(kind, lse)
    with atedm_kernels.backend(backend):
        sums = atedm_kernels.attention_column_sums(q, k, lse, weights)
    scale = oracle.column_sums(q, k, lse, weights.abs()).clamp(min=1e-30)
    assert_sums(sums, oracle.column_sums(q, k, lse, weights), scale, 2e-4)
    if kind == "zero":
        assert not sums.any()


@pytest.mark.parametrize("layout", ["tokens first", "every second"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [40, 64])
def test_strides(backend, device, dtype, layout, head_dim):
    q, k, lse = oracle.attention_inputs((2, 3, 70, 50, head_dim), dtype, device, layout=layout)
    with atedm_kernels.backend(backend):
        sums = atedm_kernels.attention_column_sums(q, k, lse)
        assert torch.equal(
            sums, atedm_kernels.attention_column_sums(q.contiguous(), k.contiguous(), lse.mT.contiguous().mT)
        )
    expected = oracle.column_sums(q, k, lse, None)
    assert_sums(sums, expected, expected, 2e-4)


@pytest.mark.parametrize("std", [10.0, 40.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(backend, device, dtype, std):
    """Most weights underflow; those that count keep their accuracy."""
    q, k, lse = oracle.attention_inputs((1, 2, 200, 150, 64), dtype, device, std=std)
    with atedm_kernels.backend(backend):
        sums = atedm_kernels.attention_column_sums(q, k, lse)
    expected = oracle.column_sums(q, k, lse, None)
    assert_sums(sums, expected, expected.clamp(min=1e-12), 2e-4)
    assert (sums.double().sum(-1) - 1).abs().max() < 2e-5


@pytest.mark.parametrize("scale", [0.5, 0.0, -0.25])
def test_scale(backend, device, scale):
    q, k, _ = oracle.attention_inputs((1, 2, 70, 60, 32), torch.float16, device)
    lse = oracle.logits(q, k, scale).logsumexp(-1).float()
    with atedm_kernels.backend(backend):
        sums = atedm_kernels.attention_column_sums(q, k, lse, scale=scale)
    expected = oracle.attention_map(q, k, lse, scale).mean(-2)
    assert_sums(sums, expected, expected, 2e-4)


def test_repeats_bit_for_bit(backend, device):
    q, k, lse = oracle.attention_inputs((1, 2, 600, 70, 64), torch.bfloat16, device)
    weights = weights_of("both signs", lse)
    with atedm_kernels.backend(backend):
        first = atedm_kernels.attention_column_sums(q, k, lse, weights)
        assert all(torch.equal(first, atedm_kernels.attention_column_sums(q, k, lse, weights)) for _ in range(3))


def test_splits_cover_the_queries_once(device):
    """With few keys, the queries are split into parts; the last one is short or has one row."""
    from atedm_kernels.ops.attention_column_sums.triton_kernel import query_splits

    for queries in (1025, 1280, 1500):
        q, k, lse = oracle.attention_inputs((1, 1, queries, 9, 16), torch.float16, device)
        splits, per_split = query_splits(q, k)
        assert splits > 1 and (splits - 1) * per_split < queries <= splits * per_split
        with atedm_kernels.backend("triton"):
            sums = atedm_kernels.attention_column_sums(q, k, lse)
        expected = oracle.column_sums(q, k, lse, None)
        assert_sums(sums, expected, expected, 2e-4)
