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


def test_arrows_of_the_authors(backend, device):
    """Kept tokens and arrows as in the figure on the project page; the map is made for this test.

    The kept tokens 3, 5 and 7 refill 1←7, 2←3, 4←3 and 6←7, counted from 1: each dropped token takes the largest entry
    in its column. The largest entries in its row, at the kept columns, would give 1←3, 2←5, 4←7 and 6←5.
    """
    percent = [
        [10, 10, 30, 10, 20, 10, 10],
        [10, 20, 10, 10, 30, 10, 10],
        [5, 30, 10, 25, 10, 10, 10],
        [10, 10, 10, 20, 10, 10, 30],
        [10, 10, 15, 5, 40, 15, 5],
        [10, 10, 10, 10, 20, 30, 10],
        [25, 5, 10, 10, 10, 30, 10],
    ]
    log_map = (torch.tensor(percent, device=device) / 100).log()
    q = torch.nn.functional.pad(log_map, (0, 1))[None, None]  # the least head dim is 8
    k = torch.eye(8, device=device)[None, None, :7]
    lse, index = torch.zeros(1, 1, 7, device=device), torch.tensor([[2, 4, 6]], device=device)
    with atedm_kernels.backend(backend):
        source = atedm_kernels.similarity_source(q, k, lse, index, scale=1.0)
    assert (1 + index[0][source[0]]).tolist() == [7, 3, 3, 3, 5, 7, 7]


@pytest.mark.parametrize("std", [10.0, 60.0])
def test_large_logits(backend, device, std):
    """Kept tokens attend to few others: what they attend to a dropped one may all but vanish."""
    q, k, lse = oracle.attention_inputs((1, 2, 150, 150, 64), torch.float32, device, std=std)
    index = oracle.kept_tokens(1, 150, 60, device)
    with atedm_kernels.backend(backend):
        source = atedm_kernels.similarity_source(q, k, lse, index)
    oracle.assert_sources(q, k, lse, index, source, 2e-4)


@pytest.mark.parametrize("keep", [3, 70])
def test_ties_go_to_the_lowest_slot(backend, device, keep):
    """Equal queries, also in different tiles: every dropped token takes slot 0."""
    _, k, _ = oracle.attention_inputs((1, 2, 100, 100, 16), torch.float16, device)
    # Whole numbers: the logits are exact in any order of additions, so ties are ties.
    q, k, lse = torch.ones_like(k), k.round(), torch.full(k.shape[:3], 4.0, device=device)
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


def with_special_values(device):
    """``q, k, lse, index``, the dropped tokens, and the slots that no dropped token may take."""
    q, k, lse = oracle.attention_inputs((1, 2, 70, 70, 32), torch.float32, device)
    index = oracle.kept_tokens(1, 70, 10, device)
    kept = index[0].tolist()
    q[:, 0, kept[0]] = float("nan")
    lse[:, 1, kept[7]] = float("nan")
    lse[:, :, kept[4]] = float("inf")  # attends to nothing
    dropped = [i for i in range(70) if i not in kept]
    # Nothing of these is in the definition.
    q[:, :, dropped], k[:, :, kept], lse[:, :, dropped] = float("nan"), float("nan"), float("nan")
    return q, k, lse, index, dropped, [0, 4, 7]


def test_nan_counts_as_least(backend, device):
    q, k, lse, index, dropped, never = with_special_values(device)
    others = [slot for slot in range(10) if slot not in never]
    similarity = oracle.mean_similarity(q, k, lse, index)[:, dropped]
    unknown = dropped[5]
    k[:, 1, unknown] = float("nan")  # every kept token attends to it by NaN
    with atedm_kernels.backend(backend):
        source = atedm_kernels.similarity_source(q, k, lse, index)
    assert torch.equal(source.gather(1, index), torch.arange(10, device=device)[None])
    assert source[0, unknown] == 0
    picked = similarity.gather(2, source[:, dropped, None])[..., 0]
    wanted = similarity[..., others].amax(-1) * (1 - 2e-5)
    known = [i for i, token in enumerate(dropped) if token != unknown]
    assert (picked >= wanted)[:, known].all()


def test_infinite_similarity(backend, device):
    """A logsumexp of −∞ makes a kept token attend to every other infinitely; the lowest such slot refills them all."""
    q, k, lse, index, dropped, _ = with_special_values(device)
    lse[:, :, index[0, [6, 9]]] = float("-inf")
    k[:, 1, dropped[5]] = float("nan")
    with atedm_kernels.backend(backend):
        source = atedm_kernels.similarity_source(q, k, lse, index)
    assert torch.equal(source.gather(1, index), torch.arange(10, device=device)[None])
    assert source[0, dropped].tolist() == [0 if i == 5 else 6 for i in range(len(dropped))]


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
def test_special_values_everywhere_stay_inside(backend, device, value):
    q, k, lse = oracle.attention_inputs((2, 2, 70, 70, 32), torch.float32, device)
    index = oracle.kept_tokens(2, 70, 10, device)
    lse[:] = value
    with atedm_kernels.backend(backend):
        source = atedm_kernels.similarity_source(q, k, lse, index)
    # Equally little or much attention by all: the lowest slot.
    expected = torch.zeros_like(source).scatter(1, index, torch.arange(10, device=device).expand(2, -1))
    assert torch.equal(source, expected)


def test_repeats_bit_for_bit(backend, device):
    q, k, lse = oracle.attention_inputs((1, 3, 200, 200, 64), torch.bfloat16, device)
    index = oracle.kept_tokens(1, 200, 130, device)
    with atedm_kernels.backend(backend):
        first, again = (atedm_kernels.similarity_source(q, k, lse, index) for _ in range(2))
    assert torch.equal(first, again)
