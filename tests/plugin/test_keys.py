"""Ranking and recovery by keys, on every backend that a CPU has, against float64."""

import pytest
import torch

import atedm_kernels
from atedm.policy.attention_map import AttentionMap
from atedm.policy.ranking import KeyRanking
from atedm.policy.recovery import KeyCopy
from atedm_kernels import native

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(native.why_not() is not None, reason="no library")),
]


def of(k):
    """A map with these keys; by keys, nothing else of it is read."""
    return AttentionMap(k, k, None, None)


def keys(dtype, batch=2, heads=3, tokens=150, head_dim=40):
    generator = torch.Generator().manual_seed(0)
    # Clusters, as tokens of one background are.
    centres = torch.randn(batch, heads, 7, head_dim, generator=generator)
    of = torch.randint(7, (tokens,), generator=generator)
    return (centres[:, :, of] + 0.3 * torch.randn(batch, heads, tokens, head_dim, generator=generator)).to(dtype)


def likeness(k):
    k = k.double()
    k = k / k.square().sum(-1, keepdim=True).sqrt()
    return (k @ k.transpose(2, 3)).exp()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_scores_and_sources(backend, dtype, tolerance):
    k = keys(dtype)
    exact = likeness(k)
    with atedm_kernels.backend(backend):
        scores = KeyRanking().scores(of(k), None)[0]
        index = atedm_kernels.select_tokens(scores, 40)
        source = KeyCopy().source(of(k), index)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), 1 / exact.mean(2), rtol=tolerance, atol=0)
    alike = exact.sum(1).gather(2, index[:, None].expand(-1, exact.shape[2], -1))  # [B, N, K]
    chosen = alike.gather(2, source[..., None])[..., 0]
    assert (chosen >= alike.amax(2) * (1 - tolerance)).all()
    assert torch.equal(source.gather(1, index), torch.arange(40).expand(2, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_key_of_zeros_is_like_none(dtype):
    k = keys(dtype)
    k[:, :, 5] = 0
    scores = KeyRanking().scores(of(k), None)[0]
    assert scores.isfinite().all()
    torch.testing.assert_close(scores[:, :, 5], torch.ones(2, 3))  # exp(0) with every other


def test_scores_are_the_larger_the_fewer_are_alike():
    k = torch.ones(1, 1, 10, 8)
    k[:, :, 9, :4] = -1.0
    scores = KeyRanking().scores(of(k), None)[0][0, 0]
    assert scores.argmax() == 9
    assert atedm_kernels.select_tokens(scores[None, None], 2).tolist() == [[0, 9]]
