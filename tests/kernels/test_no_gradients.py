"""Choices, of which no gradient is recorded, and arguments of the wrong Python type."""

import numpy as np
import pytest
import torch

import atedm_kernels as ak


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 17, 16, generator=generator) for _ in range(3))
    return q, k, v, ak.attention_with_logsumexp(q, k, v)[1]


def choices(q, k, lse, x, compact, residual, index, scores):
    ops = torch.ops.atedm
    return {
        ops.attention_column_sums: (q, k, lse, None, None),
        ops.weighted_page_rank: (q, k, lse, None, 3, 0.0),
        ops.weighted_page_rank_cross: (q, k, lse, None, 3, 0.0),
        ops.select_tokens: (scores, 5),
        ops.similarity_source: (q, k, lse, index),
        ops.update_feature_map: (compact, index, x.detach().clone(), residual),
    }


def test_gradients_of_choices_are_neither_recorded_nor_in_the_way(problem):
    q, k, _, lse = problem
    scores, _ = ak.weighted_page_rank(q, k, lse)
    index = ak.select_tokens(scores, 5)
    x, compact, residual = torch.randn(2, 17, 8), torch.randn(2, 5, 8), torch.randn(2, 8, 1, 17)
    floats = [tensor.clone().requires_grad_() for tensor in (q, k, lse, x, compact, residual)]
    for op, arguments in choices(*floats, index, scores.clone().requires_grad_()).items():
        torch.library.opcheck(op.default, arguments)
        out = op(*arguments)
        assert not any(tensor.requires_grad for tensor in (out if isinstance(out, tuple) else (out,)))


def test_statistics_have_the_dtype_of_the_scores(problem):
    q, k, _, lse = problem
    with pytest.raises(TypeError, match=r"lse has dtype torch.float64; expected torch.float32"):
        ak.attention_column_sums(q, k, lse.double())
    with pytest.raises(TypeError, match="weights has dtype"):
        ak.attention_column_sums(q, k, lse, lse.double())


def test_wrong_python_types_are_named(problem):
    q, k, v, lse = problem
    x, index = torch.randn(2, 17, 8), torch.zeros(2, 5, dtype=torch.int64)
    wrong = {
        "q is a ndarray": lambda: ak.attention_with_logsumexp(np.zeros((2, 3, 17, 16)), k, v),
        "k is a list": lambda: ak.attention_column_sums(q, [1.0], lse),
        "weights is a float": lambda: ak.attention_column_sums(q, k, lse, 0.5),
        "lse is a NoneType": lambda: ak.weighted_page_rank(q, k, None),
        "scores is a list": lambda: ak.select_tokens([1.0], 1),
        "index is a list": lambda: ak.gather_tokens(x, [[1]]),
        "source is a list": lambda: ak.recover_tokens(x, [[1]]),
        "residual is a str": lambda: ak.recover_feature_map(x, index, "r"),
        "cache is a list": lambda: ak.update_feature_map(x, index, [1.0], torch.zeros(2, 8, 1, 17)),
        "scale is 'a'": lambda: ak.attention_with_logsumexp(q, k, v, scale="a"),
        "max_iterations is 2.5": lambda: ak.weighted_page_rank(q, k, lse, max_iterations=2.5),
        "tolerance is 'x'": lambda: ak.weighted_page_rank_cross(q, k, lse, tolerance="x"),
        "keep is '3'": lambda: ak.select_tokens(lse, "3"),
    }
    for message, call in wrong.items():
        with pytest.raises(TypeError, match=message):
            call()
    with pytest.raises(ValueError, match="reduction is None"):
        ak.select_tokens(lse, 3, reduction=None)


def test_a_slice_of_a_channels_last_map_stays_channels_last():
    residual = torch.randn(2, 16, 3, 4).to(memory_format=torch.channels_last)[:, :8]
    compact, source = torch.randn(2, 5, 8), torch.randint(0, 5, (2, 12))
    out = ak.recover_feature_map(compact, source, residual)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.atedm.recover_feature_map.default, (compact, source, residual))
