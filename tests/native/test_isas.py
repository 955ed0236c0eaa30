"""Every op with every ISA, against float64."""

from __future__ import annotations

import pytest
import torch

import atedm_kernels as ak
from atedm_kernels import native
from tests.helpers import oracle

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
CPU = torch.device("cpu")
# B, H, queries, keys, head dim, layout
SHAPES = [
    (1, 1, 1, 1, 8, "heads first"),
    (2, 3, 67, 67, 64, "tokens first"),
    (1, 2, 131, 77, 40, "tokens first"),
    (1, 1, 64, 257, 20, "heads first"),
    (2, 1, 307, 5, 80, "every second"),
    (1, 2, 33, 130, 128, "tokens first"),
    (1, 1, 70, 65, 160, "heads first"),
    (1, 1, 35, 40, 256, "heads first"),
    (1, 2, 50, 300, 13, "tokens first"),
]
# Of feature maps: B, C, h, w
MAPS = [(1, 1, 1, 1), (2, 70, 5, 13), (1, 65, 1, 70), (2, 3, 67, 1), (1, 129, 9, 9), (2, 33, 13, 11)]
EVERYTHING = 1 << 40
# The largest map of a head, in bytes, kept in float32 and in 16 bits, and the promised accuracy.
ROUTES = {"float32": (EVERYTHING, 0, 2e-4), "16 bits": (0, EVERYTHING, 1e-3), "computed again": (0, 0, 2e-4)}


@pytest.fixture(autouse=True)
def native_serves():
    with ak.backend("native"):
        yield


def relative(value: torch.Tensor, exact: torch.Tensor) -> float:
    assert torch.isfinite(value).all()
    return ((value.double() - exact).abs() / exact).max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_column_sums(isa, dtype):
    for *shape, layout in SHAPES:
        q, k, lse = oracle.attention_inputs(tuple(shape), dtype, CPU, layout=layout)
        sums = ak.attention_column_sums(q, k, lse)
        assert relative(sums, oracle.column_sums(q, k, lse, None)) < 2e-5
        assert (sums.double().sum(-1) - 1).abs().max() < 2e-5
        weights = torch.rand(lse.shape[::-1], generator=torch.Generator().manual_seed(1)).permute(2, 1, 0)
        assert relative(ak.attention_column_sums(q, k, lse, weights), oracle.column_sums(q, k, lse, weights)) < 2e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_page_rank(isa, dtype, route):
    *limits, tolerance = ROUTES[route]
    with native.map_limits(*limits):
        for batch, heads, tokens, _, head_dim, layout in SHAPES:
            q, k, lse = oracle.attention_inputs((batch, heads, tokens, tokens, head_dim), dtype, CPU, layout=layout)
            scores, iterations = ak.weighted_page_rank(q, k, lse, max_iterations=4, tolerance=0.0)
            assert iterations.dtype == torch.int32 and (iterations == 4).all()
            assert relative(scores, oracle.page_rank(q, k, lse, iterations.long())[0]) < tolerance
            assert (scores.double().sum(-1) - 1).abs().max() < 2e-5
            initial = scores.square()
            for count in (1, 3):
                warm, iterations = ak.weighted_page_rank(
                    q, k, lse, max_iterations=count, tolerance=0.0, initial=initial
                )
                exact = oracle.page_rank(q, k, lse, iterations.long(), initial=initial)[0]
                assert relative(warm, exact) < tolerance


@pytest.mark.parametrize("first", [None, "uniform"])
def test_a_map_of_16_bits_is_corrected_in_every_iteration(isa, first):
    """Every row alike, half of the columns just below what 16 bits hold: without a correction 4.8e-4 remain."""
    tokens = 1024
    shares = torch.where(torch.arange(tokens) % 2 == 0, 1 + 0.99 * 2**-10, 1 - 0.99 * 2**-10).double() / tokens
    q, k = (torch.zeros(1, 1, tokens, 64) for _ in range(2))
    q[..., 0], k[..., 0] = 8, shares.log()
    lse = torch.zeros(1, 1, tokens)
    initial = None if first is None else torch.ones(1, 1, tokens)
    with native.map_limits(0, EVERYTHING):
        for count in (2, 3, 5):
            scores, _ = ak.weighted_page_rank(q, k, lse, max_iterations=count, tolerance=0.0, initial=initial)
            assert relative(scores, shares.expand(1, 1, -1)) < 5e-5


@pytest.mark.parametrize("route", ROUTES)
def test_page_rank_of_peaked_maps(isa, route):
    """Logits of SDXL's spread and beyond: few entries decide each sum, so little averages out."""
    *limits, tolerance = ROUTES[route]
    for std in (2.5, 10.0):
        q, k, lse = oracle.attention_inputs((1, 2, 401, 401, 64), torch.bfloat16, CPU, std=std)
        with native.map_limits(*limits):
            scores, iterations = ak.weighted_page_rank(q, k, lse, max_iterations=5, tolerance=0.0)
        exact = oracle.page_rank(q, k, lse, iterations.long())[0]
        assert ((scores.double() - exact).abs() / exact.clamp(min=1e-9)).max() < tolerance


@pytest.mark.parametrize("route", ROUTES)
def test_heads_stop_on_their_own(isa, route):
    q, k, _ = oracle.attention_inputs((2, 4, 90, 90, 32), torch.float32, CPU)
    q = q * torch.tensor([0.0, 0.3, 1.0, 2.0])[:, None, None]
    lse = oracle.logits(q, k).logsumexp(-1).float()
    with native.map_limits(*ROUTES[route][:2]):
        scores, iterations = ak.weighted_page_rank(q, k, lse, max_iterations=30, tolerance=1e-4)
        again, same = ak.weighted_page_rank(q, k, lse, max_iterations=40, tolerance=1e-4)
    assert iterations[:, 0].tolist() == [1, 1] and len(iterations.unique()) >= 3 and iterations.max() < 30
    assert torch.equal(scores, again) and torch.equal(iterations, same)


def test_entries_that_16_bits_cannot_hold(isa):
    """A logsumexp that is too small makes entries of 2 and more: such a head is recomputed."""
    q, k, lse = oracle.attention_inputs((1, 3, 90, 90, 32), torch.float32, CPU)
    lse[0, 1, 40] -= 9.0
    with native.map_limits(0, EVERYTHING):
        scores, iterations = ak.weighted_page_rank(q, k, lse, max_iterations=4, tolerance=0.0)
        warm, _ = ak.weighted_page_rank(q, k, lse, max_iterations=4, tolerance=0.0, initial=scores + 1.0)
    assert relative(scores, oracle.page_rank(q, k, lse, iterations.long())[0]) < 1e-3
    assert relative(warm, oracle.page_rank(q, k, lse, iterations.long(), initial=scores + 1.0)[0]) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", [True, False])
def test_page_rank_cross(isa, dtype, kept):
    with native.map_limits(EVERYTHING, EVERYTHING if kept else 0):
        for *shape, layout in SHAPES:
            if shape[3] < 2:
                continue  # entropies of 0 consist of rounding: see tests/kernels
            q, k, lse = oracle.attention_inputs(tuple(shape), dtype, CPU, layout=layout)
            scores, iterations = ak.weighted_page_rank_cross(q, k, lse, max_iterations=3, tolerance=0.0)
            assert relative(scores, oracle.page_rank(q, k, lse, iterations.long(), cross=True)[0]) < 2e-4
            assert (scores.double().sum(-1) - 1).abs().max() < 2e-5


def test_cross_in_chunks(isa):
    """More rows and keys than one chunk or block holds."""
    for kept in (0, EVERYTHING):
        q, k, lse = oracle.attention_inputs((1, 2, 1100, 600, 16), torch.bfloat16, CPU)
        with native.map_limits(0, kept):
            scores, iterations = ak.weighted_page_rank_cross(q, k, lse, max_iterations=2, tolerance=0.0)
        assert relative(scores, oracle.page_rank(q, k, lse, iterations.long(), cross=True)[0]) < 2e-4


@pytest.mark.parametrize("std", [10.0, 40.0])
def test_large_logits(isa, std):
    for dtype in DTYPES:
        q, k, lse = oracle.attention_inputs((1, 2, 200, 150, 64), dtype, CPU, std=std)
        sums = ak.attention_column_sums(q, k, lse)
        exact = oracle.column_sums(q, k, lse, None)
        assert ((sums.double() - exact).abs() / exact.clamp(min=1e-12)).max() < 2e-4


def test_one_hot_rows(isa):
    """Every token attends to one other and to nothing else: a permutation, whose ranking stays uniform."""
    tokens = 61
    q = torch.eye(64)[:tokens][None, None] * 60
    permutation = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
    k = (torch.eye(64)[:tokens] * 60)[permutation][None, None]
    lse = oracle.logits(q, k).logsumexp(-1).float()
    for limits in ((EVERYTHING, 0), (0, EVERYTHING), (0, 0)):
        with native.map_limits(*limits):
            scores, iterations = ak.weighted_page_rank(q, k, lse, tolerance=1e-4)
        assert (iterations == 1).all() and relative(scores, torch.full_like(scores, 1 / tokens).double()) < 1e-4
    source = ak.similarity_source(q, k, lse, torch.arange(10)[None])
    by = permutation.tolist()  # the token that attends to each
    assert source[0].tolist() == [i if i < 10 else by[i] if by[i] < 10 else 0 for i in range(tokens)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_similarity_source(isa, dtype):
    for batch, heads, tokens, keep, head_dim, layout in [
        (1, 1, 1, 1, 8, "heads first"),
        (2, 3, 131, 67, 64, "tokens first"),
        (1, 2, 70, 1, 40, "tokens first"),
        (1, 2, 67, 67, 20, "every second"),
        (1, 1, 139, 33, 80, "heads first"),
        (1, 2, 190, 70, 160, "heads first"),
        (1, 1, 33, 20, 256, "heads first"),
    ]:
        q, k, lse = oracle.attention_inputs((batch, heads, tokens, tokens, head_dim), dtype, CPU, layout=layout)
        index = oracle.kept_tokens(batch, tokens, keep, CPU)
        oracle.assert_sources(q, k, lse, index, ak.similarity_source(q, k, lse, index), 2e-5)
        oracle.assert_sources(q, k, lse, index.flip(-1), ak.similarity_source(q, k, lse, index.flip(-1)), 2e-5)


def test_ties_go_to_the_lowest_slot(isa):
    _, k, _ = oracle.attention_inputs((1, 2, 300, 300, 16), torch.float16, CPU)
    # Whole numbers: the logits are exact in any order of additions, so ties are ties.
    q, k, lse = torch.ones_like(k), k.round(), torch.full(k.shape[:3], 4.0)
    for keep in (3, 140):
        index = torch.arange(300 - keep, 300)[None]
        source = ak.similarity_source(q, k, lse, index)
        assert not source[:, : 300 - keep].any() and torch.equal(source[0, 300 - keep :], torch.arange(keep))


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_recover_feature_map(isa, x_dtype, dtype):
    generator = torch.Generator().manual_seed(0)
    for batch, channels, height, width in MAPS:
        x = torch.randn(batch, 7, channels, generator=generator).to(x_dtype)
        residual = torch.randn(batch, channels, height, width, generator=generator).to(dtype)
        source = torch.randint(0, 7, (batch, height * width), generator=generator)
        tokens = torch.stack([x[b][source[b]] for b in range(batch)])
        expected = residual + tokens.transpose(1, 2).reshape(residual.shape)
        for view in (residual, residual.mT.contiguous().mT, residual.to(memory_format=torch.channels_last)):
            assert torch.equal(ak.recover_feature_map(x, source, view), expected)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_feature_map(isa, x_dtype, dtype):
    for shape in MAPS:
        tokens = shape[2] * shape[3]
        for keep in {1, (tokens + 2) // 3, tokens}:
            x, index, cache, residual = oracle.update_inputs(shape, keep, x_dtype, dtype, CPU)
            written, expected = oracle.updated(x, index, cache, residual)
            for view in (residual, residual.mT.contiguous().mT, residual.to(memory_format=torch.channels_last)):
                again = cache.clone()
                assert torch.equal(ak.update_feature_map(x, index, again, view), expected)
                assert torch.equal(again, written)


def test_every_float16(isa):
    """Convert every value, in and out, through a sum with zeros."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    x, source = torch.zeros(1, 1, 1), torch.zeros(1, 2**16, dtype=torch.int64)
    widened = ak.recover_feature_map(x, source, values.view(1, 1, 256, 256))
    assert torch.equal(widened.flatten().nan_to_num(123.0), values.float().nan_to_num(123.0))
    for dtype in (torch.float16, torch.bfloat16):
        numbers = values if dtype == torch.float16 else values.view(torch.int16).view(torch.bfloat16)
        zeros = torch.zeros(1, 1, 1, dtype=dtype)
        out = ak.recover_feature_map(zeros, source, numbers.view(1, 1, 256, 256)).flatten()
        assert torch.equal(out.nan_to_num(123.0), (numbers + 0.0).nan_to_num(123.0))


def test_rounding_to_16_bits(isa):
    """Halfway cases, denormals and overflow round as torch's own sums do."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16):
        bits = torch.randint(-(2**15), 2**15, (2, 4096), generator=generator).to(torch.int16)
        a, b = bits.view(dtype)
        out = ak.recover_feature_map(a.view(1, 4096, 1), torch.arange(4096)[None], b.view(1, 1, 64, 64)).flatten()
        assert torch.equal(out.nan_to_num(123.0), (a + b).nan_to_num(123.0))
