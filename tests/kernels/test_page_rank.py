"""``weighted_page_rank`` and ``weighted_page_rank_cross``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import atedm_kernels
from atedm_kernels import tiles
from atedm_kernels.ops.attention_column_sums import triton_kernel as column_sums
from atedm_kernels.ops.triton_power_iteration import empty_state
from atedm_kernels.ops.weighted_page_rank.triton_kernel import iteration_launches
from tests.helpers import oracle

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
OPS = {"self": atedm_kernels.weighted_page_rank, "cross": atedm_kernels.weighted_page_rank_cross}


def assert_ranking(
    q, k, lse, scores, iterations, cross: bool, max_iterations: int, tolerance: float, initial=None
) -> None:
    expected, changes = oracle.page_rank(q, k, lse, iterations.long(), cross, initial)
    assert scores.dtype == torch.float32 and iterations.dtype == torch.int32
    assert scores.shape == lse.shape and iterations.shape == lse.shape[:2]
    assert ((scores.double() - expected).abs() / expected).max() < 2e-4
    assert (scores.double().sum(-1) - 1).abs().max() < 2e-5
    # Each head stopped at the first change under the tolerance, and not before (except for rounding).
    steps = torch.arange(len(changes), device=q.device)[:, None, None]
    assert (changes[steps < iterations - 1] > tolerance - 1e-6).all()
    last = changes.gather(0, iterations.long()[None] - 1)[0]
    assert (last < tolerance + 1e-6)[iterations < max_iterations].all()


# The products take every dtype in every shape in the tests of the column sums.
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys", "head_dim", "layout", "dtype"),
    [
        (1, 1, 1, 1, 8, "heads first", torch.float16),
        *((2, 2, 67, 67, 40, "tokens first", dtype) for dtype in DTYPES),
        (1, 2, 130, 77, 64, "heads first", torch.bfloat16),
        (1, 1, 41, 1, 80, "every second", torch.float16),
        (1, 1, 50, 70, 160, "heads first", torch.float32),
    ],
    ids=str,
)
def test_ranking(backend, device, dtype, op, batch, heads, queries, keys, head_dim, layout, poisoned_empty):
    keys = queries if op == "self" else keys
    q, k, lse = oracle.attention_inputs((batch, heads, queries, keys, head_dim), dtype, device, layout=layout)
    if keys == 1 and queries > 1:
        # Every entropy is 0 up to the rounding of the logsumexp: the floor alone decides.
        lse = lse * 0
        q = q * 0
    with atedm_kernels.backend(backend):
        scores, iterations = OPS[op](q, k, lse, max_iterations=3, tolerance=1e-3)
    assert_ranking(q, k, lse, scores, iterations, op == "cross", 3, 1e-3)


@pytest.mark.parametrize("op", OPS)
def test_heads_stop_on_their_own(backend, device, op):
    """Heads of growing contrast need more and more iterations."""
    q, k, lse = oracle.attention_inputs((1, 3, 67, 67, 32), torch.float32, device)
    contrast = torch.tensor([0.0, 0.3, 1.0], device=device)[:, None, None]
    q = q * contrast
    lse = oracle.logits(q, k).logsumexp(-1).float()
    with atedm_kernels.backend(backend):
        scores, iterations = OPS[op](q, k, lse, max_iterations=8, tolerance=1e-4)
        longer, more = OPS[op](q, k, lse, max_iterations=10, tolerance=1e-4)
    assert iterations[:, 0].tolist() == [1]  # a uniform map is its own fixed point
    assert len(iterations.unique()) >= 3 and iterations.max() < 8
    assert_ranking(q, k, lse, scores, iterations, op == "cross", 8, 1e-4)
    # A converged head is frozen: more iterations change nothing.
    assert torch.equal(scores, longer) and torch.equal(iterations, more)


@pytest.mark.parametrize("op", OPS)
def test_tolerance_0_runs_every_iteration(backend, device, op):
    q, k, lse = oracle.attention_inputs((1, 2, 33, 33, 16), torch.float16, device)
    with atedm_kernels.backend(backend):
        scores, iterations = OPS[op](q, k, lse, max_iterations=7, tolerance=0.0)
    assert (iterations <= 7).all()
    assert_ranking(q, k, lse, scores, iterations, op == "cross", 7, 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(backend, device, dtype):
    q, k, lse = oracle.attention_inputs((1, 2, 131, 131, 64), dtype, device, std=10.0)
    with atedm_kernels.backend(backend):
        scores, _ = atedm_kernels.weighted_page_rank(q, k, lse, max_iterations=3, tolerance=0.0)
    expected, _ = oracle.page_rank(q, k, lse, torch.full((1, 2), 3, device=device))
    assert ((scores.double() - expected).abs() / expected.clamp(min=1e-9)).max() < 2e-4


def test_a_pass_ends_in_its_own_kernel_or_in_one_more(device, monkeypatch, poisoned_empty):
    """On AMD in one more."""
    monkeypatch.setattr(column_sums, "_SCRATCH_OF_MAP", 1.0)  # so few queries are not split otherwise
    q, k, lse = oracle.attention_inputs((1, 1, 130, 130, 16), torch.float32, device)
    tile = replace(tiles.tile_for(column_sums.OP, q), block_m=16, block_n=32, programs=100)
    found = {}
    for architecture, launches in (("sm_90", 1), ("gfx942", 2)):
        with tiles.assume(architecture=architecture, attention_column_sums=tile), atedm_kernels.backend("triton"):
            assert column_sums.query_splits(q, k)[0] == 2
            assert len(iteration_launches(q, k, lse, empty_state(lse), 0.25, 1e-3)) == launches
            found[architecture] = atedm_kernels.weighted_page_rank(q, k, lse, max_iterations=2, tolerance=1e-3)
    for one, other in zip(*found.values(), strict=True):
        assert torch.equal(one, other)
    assert_ranking(q, k, lse, *found["sm_90"], False, 2, 1e-3)


@pytest.mark.parametrize("op", OPS)
def test_repeats_bit_for_bit(backend, device, op):
    q, k, lse = oracle.attention_inputs((1, 2, 150, 150, 64), torch.bfloat16, device)
    with atedm_kernels.backend(backend):
        first, again = (OPS[op](q, k, lse, max_iterations=3)[0] for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "iterations", "layout", "dtype"),
    [
        *((1, 1, 1, 1, "contiguous", dtype) for dtype in DTYPES),
        *((2, 3, 67, 1, "tokens first", dtype) for dtype in DTYPES),
        *((2, 2, 41, 3, "expanded", dtype) for dtype in DTYPES),
        # More than the 1024 that a head's scores are started and normalised by, which are float32 whatever q is.
        (1, 1, 1030, 2, "contiguous", torch.float16),
    ],
    ids=str,
)
def test_initial_scores(backend, device, op, batch, heads, tokens, iterations, layout, dtype, poisoned_empty):
    keys = tokens if op == "self" else min(tokens, 77)
    q, k, lse = oracle.attention_inputs((batch, heads, tokens, keys, 16), dtype, device)
    initial = torch.rand(batch, heads, tokens, generator=torch.Generator().manual_seed(1)).to(device) * 40
    initial[..., ::3] = 0  # a head of one token aside, where the sum would be 0
    initial[..., -1] = 100.0
    if layout == "tokens first":
        initial = initial.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "expanded":
        initial = initial[:, :1].expand(-1, heads, -1)
    before = initial.clone()
    with atedm_kernels.backend(backend):
        arguments = {"max_iterations": iterations, "tolerance": 0.0, "initial": initial}
        scores, counts = OPS[op](q, k, lse, **arguments)
    assert (counts <= iterations).all()
    assert_ranking(q, k, lse, scores, counts, op == "cross", iterations, 0.0, initial)
    assert torch.equal(initial, before)


@pytest.mark.parametrize("op", OPS)
def test_going_on_from_scores_is_as_never_having_stopped(backend, device, op):
    q, k, lse = oracle.attention_inputs((1, 2, 67, 67, 40), torch.float16, device, std=1.5)
    fixed_point, _ = oracle.page_rank(q, k, lse, torch.full((1, 2), 100, device=device), op == "cross")
    fixed_point = fixed_point.float() * 7
    with atedm_kernels.backend(backend):
        at_once, _ = OPS[op](q, k, lse, max_iterations=4, tolerance=0.0)
        part, _ = OPS[op](q, k, lse, max_iterations=2, tolerance=0.0)
        on, counts = OPS[op](q, k, lse, max_iterations=2, tolerance=0.0, initial=part)
        _, converged = OPS[op](q, k, lse, max_iterations=5, tolerance=1e-2, initial=fixed_point)
    torch.testing.assert_close(on, at_once, rtol=1e-4, atol=1e-7)
    assert (counts == 2).all()
    assert (converged == 1).all()


@pytest.mark.parametrize("tokens", [400, 576, 1024, 4096])
def test_scratch_is_a_hundredth_of_the_map(tokens):
    """What a ranking allocates besides its results: a bias and partial sums."""
    from atedm_kernels.ops.attention_column_sums.triton_kernel import empty_partial_sums

    for batch, heads in ((1, 1), (2, 20), (8, 10)):
        q = torch.empty(batch, heads, tokens, 64, dtype=torch.bfloat16, device="meta")
        scratch = empty_partial_sums(q, q).numel() + batch * heads * tokens
        assert 4 * scratch <= 0.01 * 2 * batch * heads * tokens**2
