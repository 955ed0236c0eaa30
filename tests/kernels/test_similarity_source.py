from __future__ import annotations

import pytest
import torch

import atedm_kernels
from tests.helpers import oracle

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "keep", "head_dim", "layout"),
    [
        (1, 1, 1, 1, 8, "heads first"),
        (2, 3, 131, 67, 64, "tokens first"),
        (1, 2, 70, 1, 40, "tokens first"),
        (1, 2, 67, 67, 20, "every second"),
        (1, 1, 40, 33, 80, "heads first"),
        (1, 1, 40, 33, 128, "heads first"),
        (1, 2, 90, 70, 160, "heads first"),
        (1, 1, 33, 20, 256, "heads first"),
    ],
)
def test_sources(backend, device, dtype, batch, heads, tokens, keep, head_dim, layout, poisoned_empty):
    q, k, lse = oracle.attention_inputs((batch, heads, tokens, tokens, head_dim), dtype, device, layout=layout)
    index = oracle.kept_tokens(batch, tokens, keep, device)
    with atedm_kernels.backend(backend):
        source = atedm_kernels.similarity_source(q, k, lse, index)
        assert torch.equal(source, atedm_kernels.similarity_source(q, k, lse.mT.contiguous().mT, index))
    oracle.assert_sources(q, k, lse, index, source, 2e-5)


@pytest.mark.parametrize("std", [10.0, 60.0])
def test_large_logits(backend, device, std):
    """Some dropped tokens attend to no kept one at all: their similarities may vanish together."""
    q, k, lse = oracle.attention_inputs((1, 2, 150, 150, 64), torch.float32, device, std=std)
    index = oracle.kept_tokens(1, 150, 60, device)
    with atedm_kernels.backend(backend):
        source = atedm_kernels.similarity_source(q, k, lse, index)
    oracle.assert_sources(q, k, lse, index, source, 2e-4)


@pytest.mark.parametrize("keep", [3, 70])
def test_ties_go_to_the_lowest_slot(backend, device, keep):
    """Equal keys, also in different tiles: every dropped token takes slot 0."""
    q, _, _ = oracle.attention_inputs((1, 2, 100, 100, 16), torch.float16, device)
    k = torch.ones_like(q)
    lse = oracle.logits(q, k).logsumexp(-1).float()
    index = torch.arange(100 - keep, 100, device=device)[None]
    with atedm_kernels.backend(backend):
        source = atedm_kernels.similarity_source(q, k, lse, index)
    assert not source[:, : 100 - keep].any()
    assert torch.equal(source[0, 100 - keep :], torch.arange(keep, device=device))


def test_unsorted_index(backend, device):
    q, k, lse = oracle.attention_inputs((1, 2, 90, 90, 32), torch.float16, device)
    index = oracle.kept_tokens(1, 90, 40, device).flip(-1)
    with atedm_kernels.backend(backend):
        source = atedm_kernels.similarity_source(q, k, lse, index)
    oracle.assert_sources(q, k, lse, index, source, 2e-5)


def test_nan_rows_stay_inside(backend, device):
    q, k, lse = oracle.attention_inputs((1, 2, 70, 70, 32), torch.float32, device)
    q[:, 0, 3] = float("nan")
    lse[:, 1, 7] = float("nan")
    lse[:, :, 20:40] = float("-inf")  # infinite similarity to every kept token
    index = oracle.kept_tokens(1, 70, 10, device)
    with atedm_kernels.backend(backend):
        source = atedm_kernels.similarity_source(q, k, lse, index)
    assert (source >= 0).all() and (source < 10).all()
    assert torch.equal(source.gather(1, index), torch.arange(10, device=device)[None])


def test_repeats_bit_for_bit(backend, device):
    q, k, lse = oracle.attention_inputs((1, 3, 200, 200, 64), torch.bfloat16, device)
    index = oracle.kept_tokens(1, 200, 130, device)
    with atedm_kernels.backend(backend):
        first, again = (atedm_kernels.similarity_source(q, k, lse, index) for _ in range(2))
    assert torch.equal(first, again)
