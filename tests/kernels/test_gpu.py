"""What only a GPU can show: real sizes, CUDA graphs, and that the host never waits."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import atedm_kernels
from atedm_kernels.ops.gather_pair import gather_pair
from atedm_kernels.ops.sum_rows import sum_rows
from atedm_kernels.ops.token_drift import token_drift
from tests.helpers import oracle

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# B, H, N, D: SDXL's levels 2 and 3 with classifier-free guidance, an odd size bucket, and other models' head dims.
SHAPES = [(2, 10, 4096, 64), (2, 20, 1024, 64), (1, 10, 3952, 64), (1, 8, 4096, 40), (1, 8, 1024, 80), (1, 8, 256, 160)]


def problem(shape, dtype, std=4.0):
    batch, heads, tokens, head_dim = shape
    return oracle.attention_inputs(
        (batch, heads, tokens, tokens, head_dim), dtype, torch.device("cuda"), std=std, layout="tokens first"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_real_sizes(shape, dtype):
    q, k, lse = problem(shape, dtype)
    wide = q.double(), k.double(), lse.double()
    with atedm_kernels.backend("triton"):
        sums = atedm_kernels.attention_column_sums(q, k, lse)
        scores, iterations = atedm_kernels.weighted_page_rank(q, k, lse)
        warm, _ = atedm_kernels.weighted_page_rank(q, k, lse, max_iterations=2, initial=scores)
        index = atedm_kernels.select_tokens(scores, shape[2] * 3 // 8)
        source = atedm_kernels.similarity_source(q, k, lse, index)
    with atedm_kernels.backend("reference"):
        expected_sums = atedm_kernels.attention_column_sums(*wide)
        expected_scores, expected_iterations = atedm_kernels.weighted_page_rank(*wide)
        expected_warm, _ = atedm_kernels.weighted_page_rank(*wide, max_iterations=2, initial=scores.double())
        expected_index = atedm_kernels.select_tokens(expected_scores, index.shape[1])
    assert ((sums - expected_sums).abs() / expected_sums).max() < 2e-4
    for got, expected in ((scores, expected_scores), (warm, expected_warm)):
        assert ((got - expected).abs() / expected).max() < 2e-4
    assert (scores.double().sum(-1) - 1).abs().max() < 2e-5
    assert (iterations - expected_iterations).abs().max() <= 1
    for row, expected_row in zip(index.tolist(), expected_index.tolist(), strict=True):
        common = len(set(row) & set(expected_row))
        assert common / (2 * len(row) - common) >= 0.998
    for b in range(shape[0]):
        similarity = oracle.mean_similarity(q[b : b + 1], k[b : b + 1], lse[b : b + 1], index[b : b + 1])
        similarity[0, index[b]] = 0.0  # kept tokens take their own slot, checked below
        picked = similarity.gather(2, source[b : b + 1, :, None])[..., 0]
        assert (picked >= similarity.amax(-1) * (1 - 2e-4)).all()
        assert torch.equal(source[b, index[b]], torch.arange(index.shape[1], device="cuda"))


def test_fused_logsumexp():
    """The logsumexp of torch's fused kernels is the one that the ops expect: every row sums to 1."""
    for dtype in DTYPES:
        q, k, lse = problem((2, 10, 1000, 64), dtype)
        _, fused = atedm_kernels.attention_with_logsumexp(q, k, k)
        assert (fused - lse).abs().max() < 2e-3
        mass = atedm_kernels.attention_column_sums(q, k, fused).double().sum(-1)
        assert (mass - 1).abs().max() < 1e-3


@pytest.mark.parametrize(
    "kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
)
@pytest.mark.parametrize("head_dim", [64, 20])
def test_gradients_of_attention(kernel, head_dim):
    """By the backward of each of torch's kernels, and by the reference where none serves."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, upstream = (
        torch.randn(2, n, 3, head_dim, generator=generator, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for n in (300, 77, 77, 300)
    )
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected = torch.softmax(exact[0] @ exact[1].mT * head_dim**-0.5, -1) @ exact[2]
    expected = torch.autograd.grad(expected, exact, upstream.double())
    given = [x.detach().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(kernel):
        out, _ = atedm_kernels.attention_with_logsumexp(*given)
        got = torch.autograd.grad(out, given, upstream)
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).norm() <= 0.03 * b.norm()


def prune_and_recover(q, k, lse, x, residual, cache):
    scores, iterations = atedm_kernels.weighted_page_rank(q, k, lse)
    cross, _ = atedm_kernels.weighted_page_rank_cross(q, k[:, :, :77], lse, max_iterations=2)
    index = atedm_kernels.select_tokens(scores, 384)
    source = atedm_kernels.similarity_source(q, k, lse, index)
    compact = atedm_kernels.gather_tokens(x, index)
    pair = gather_pair(x, residual.flatten(2).mT, index)
    tokens = atedm_kernels.recover_tokens(compact, source)
    return (
        scores,
        iterations,
        cross,
        index,
        source,
        *pair,
        tokens,
        sum_rows(tokens, source, 384),
        *token_drift(residual, x[0, :4].contiguous(), x.new_ones(x.shape[0], 4, x.shape[1])),
        atedm_kernels.recover_feature_map(compact, source, residual),
        atedm_kernels.update_feature_map(compact, index, cache, residual),
        cache,
    )


def block_inputs():
    q, k, lse = problem((2, 20, 1024, 64), torch.bfloat16)
    x = torch.randn(2, 1024, 1280, device="cuda", dtype=torch.bfloat16)
    residual = torch.randn(2, 1280, 32, 32, device="cuda", dtype=torch.bfloat16)
    return q, k, lse, x, residual, torch.randn_like(x)


def test_cuda_graph():
    arguments = block_inputs()
    expected = prune_and_recover(*arguments)  # also compiles the kernels, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = prune_and_recover(*arguments)
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


def test_a_stream_of_ones_own():
    """Kernels on any other stream would read what was there before the copy, which waits behind a long sleep."""
    arguments = block_inputs()
    expected = [out.clone() for out in prune_and_recover(*arguments)]
    late = [torch.full_like(x, float("nan")) for x in arguments]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        for x, argument in zip(late, arguments, strict=True):
            x.copy_(argument)
        got = prune_and_recover(*late)
    torch.cuda.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def far_apart(x, dim):
    """A copy of ``x`` whose neighbours along ``dim`` lie so far apart that offsets pass 2³¹ elements."""
    strides = list(x.stride())
    strides[dim] = (2**31 // (x.shape[dim] - 1)) + 64
    span = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    assert span > 2**31
    out = torch.empty(span + 1, dtype=x.dtype, device=x.device).as_strided(x.shape, strides)
    return out.copy_(x)


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "heads", "tokens"])
def test_strides_past_two_to_the_31(dim):
    q, k, lse = problem((2, 3, 200, 64), torch.bfloat16)
    x = torch.randn(2, 200, 192, device="cuda", dtype=torch.bfloat16)
    residual = torch.randn(2, 192, 10, 20, device="cuda", dtype=torch.bfloat16)
    far = [far_apart(tensor, dim) for tensor in (q, k)]
    wide = far_apart(x, 0 if dim == 0 else 1)
    scores, _ = atedm_kernels.weighted_page_rank(q, k, lse)
    index = atedm_kernels.select_tokens(scores, 75)
    source = atedm_kernels.similarity_source(q, k, lse, index)
    compact = atedm_kernels.gather_tokens(x, index)

    assert torch.allclose(atedm_kernels.weighted_page_rank(*far, lse)[0], scores, rtol=1e-4)
    cross = atedm_kernels.weighted_page_rank_cross(q, k, lse)[0]
    assert torch.allclose(atedm_kernels.weighted_page_rank_cross(*far, lse)[0], cross, rtol=1e-4)
    assert torch.equal(atedm_kernels.similarity_source(*far, lse, index), source)
    assert torch.equal(atedm_kernels.gather_tokens(wide, index), compact)
    assert all(torch.equal(out, compact) for out in gather_pair(wide, x, index))
    assert all(torch.equal(out, compact) for out in gather_pair(x, wide, index))
    expected = atedm_kernels.recover_feature_map(compact, source, residual)
    far_residual = far_apart(residual, 0 if dim == 0 else 1)
    assert torch.equal(atedm_kernels.recover_feature_map(compact, source, far_residual), expected)
    projection, seen = torch.ones(4, 192, device="cuda").bfloat16(), torch.zeros(2, 4, 200, device="cuda").bfloat16()
    for far_out, out in zip(
        token_drift(far_residual, projection, seen), token_drift(residual, projection, seen), strict=True
    ):
        assert torch.equal(far_out, out)


def test_host_never_waits():
    arguments = block_inputs()
    prune_and_recover(*arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        prune_and_recover(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_bit_for_bit(dtype):
    """A race between a store and a read of another thread shows as a difference in some of many runs."""
    q, k, lse = problem((2, 10, 4096, 64), dtype)
    x = torch.randn(2, 4096, 640, device="cuda", dtype=dtype)
    residual = torch.randn(2, 640, 64, 64, device="cuda", dtype=dtype)
    caches = [torch.randn_like(x)]
    caches += [caches[0].clone() for _ in range(20)]
    first, *others = (prune_and_recover(q, k, lse, x, residual, cache) for cache in caches)
    for again in others:
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)


def test_select_long_rows():
    torch.manual_seed(0)
    for tokens in (16384, 65536, 300001):
        scores = torch.rand(2, 10, tokens, device="cuda")
        with atedm_kernels.backend("triton"):
            got = atedm_kernels.select_tokens(scores, tokens // 3)
        importance = oracle.joined_heads(scores, "rms")
        threshold = importance.sort(-1, descending=True).values[:, tokens // 3 - 1 : tokens // 3]
        assert (importance.gather(1, got) >= threshold * (1 - 1e-6)).all()
        assert (got.diff(dim=-1) > 0).all()


def test_indices_out_of_range_stay_inside():
    """Without ``ATEDM_CHECK=1`` the GPU clamps instead of reading the values on the host."""
    x = torch.randn(1, 64, 640, device="cuda", dtype=torch.bfloat16)
    wild = torch.tensor([[-5, 2**40, 63, 64]], device="cuda")
    assert torch.equal(atedm_kernels.gather_tokens(x, wild), x[:, wild[0].clamp(0, 63)])
