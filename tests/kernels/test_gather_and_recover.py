"""``gather_tokens``, ``recover_tokens`` and ``recover_feature_map``."""

from __future__ import annotations

import pytest
import torch

import atedm_kernels
from atedm_kernels.ops.gather_pair import gather_pair
from tests.helpers import oracle

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def rows(batch: int, count: int, upper: int, device: torch.device) -> torch.Tensor:
    torch.manual_seed(count)
    return torch.randint(0, upper, (batch, count)).to(device)


@pytest.mark.parametrize("op", [atedm_kernels.gather_tokens, atedm_kernels.recover_tokens])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "tokens", "channels", "count"), [(1, 1, 1, 1), (2, 37, 20, 11), (2, 9, 130, 41), (2, 16, 256, 33)]
)
def test_rows(backend, device, op, dtype, batch, tokens, channels, count, poisoned_empty):
    torch.manual_seed(0)
    x = torch.randn(batch, tokens, channels).to(device, dtype)
    index = rows(batch, count, tokens, device)
    expected = torch.stack([x[b][index[b]] for b in range(batch)])
    for view in (x, x.mT.contiguous().mT, torch.stack([x, -x], -1).flatten(-2)[..., ::2]):
        with atedm_kernels.backend(backend):
            out = op(view, index)
            assert torch.equal(out, op(view, index.mT.contiguous().mT))
        assert out.is_contiguous() and torch.equal(out, expected)


@pytest.mark.parametrize(("x_dtype", "y_dtype"), [*zip(DTYPES, DTYPES, strict=True), (DTYPES[1], DTYPES[2])], ids=str)
@pytest.mark.parametrize(
    ("batch", "tokens", "channels", "others", "count"),
    [(1, 1, 1, 1, 1), (2, 37, 20, 20, 11), (2, 16, 130, 3, 33), (1, 9, 8, 256, 9)],
)
def test_a_pair_is_two_gathers(
    backend, device, x_dtype, y_dtype, batch, tokens, channels, others, count, poisoned_empty
):
    torch.manual_seed(0)
    x = torch.randn(batch, tokens, channels).to(device, x_dtype)
    y = torch.randn(batch, others, tokens).to(device, y_dtype).mT
    index = rows(batch, count, tokens, device)
    with atedm_kernels.backend(backend):
        out = gather_pair(x, y, index.mT.contiguous().mT)
    for one, given in zip(out, (x, y), strict=True):
        assert one.is_contiguous() and torch.equal(one, torch.stack([given[b][index[b]] for b in range(batch)]))


@pytest.mark.parametrize(
    ("message", "change"),
    {
        r"y has shape \[2, 4, 3\]; expected \[2, 5, 3\]": {"y": torch.zeros(2, 4, 3)},
        "index holds values from 0 to 5; expected 0 to 4": {"index": torch.tensor([[0, 5], [1, 2]])},
        "y has dtype torch.int64": {"y": torch.zeros(2, 5, 3, dtype=torch.int64)},
    }.items(),
    ids=str,
)
def test_what_is_no_pair_is_refused(message, change):
    good = {"x": torch.zeros(2, 5, 8), "y": torch.zeros(2, 5, 3), "index": torch.zeros(2, 2, dtype=torch.int64)}
    with pytest.raises((ValueError, TypeError), match=message):
        gather_pair(*{**good, **change}.values())


# Each shape takes every dtype in either place, and each pair meets several tiles: the tiles know no dtype.
# tests/native takes every pair to every shape.
MAPS = [
    (shape, DTYPES[n], DTYPES[(n + row) % len(DTYPES)])
    for row, shape in enumerate([(2, 3, 67, 1), (2, 70, 5, 13), (1, 65, 1, 70), (1, 1, 1, 1)])
    for n in range(len(DTYPES))
]


@pytest.mark.parametrize(("shape", "x_dtype", "dtype"), MAPS, ids=str)
def test_feature_map(backend, device, shape, x_dtype, dtype, poisoned_empty):
    batch, channels, height, width = shape
    torch.manual_seed(0)
    slots = max(1, height * width // 3)
    x = torch.randn(batch, slots, channels).to(device, x_dtype)
    residual = torch.randn(shape).to(device, dtype)
    source = rows(batch, height * width, slots, device)
    tokens = torch.stack([x[b][source[b]] for b in range(batch)])
    expected = residual + tokens.transpose(1, 2).reshape(shape)
    strided = torch.stack([residual, -residual], -1).flatten(-2)[..., ::2]
    padded_rows = torch.nn.functional.pad(residual, (0, 3))[..., :width]
    transposed = residual.mT.contiguous().mT
    with atedm_kernels.backend(backend):
        for view in (residual, strided, padded_rows, transposed):
            oracle.assert_rounded_sum(atedm_kernels.recover_feature_map(x, source, view), expected, backend)
        channels_last = residual.to(memory_format=torch.channels_last)
        out = atedm_kernels.recover_feature_map(x.mT.contiguous().mT, source, channels_last)
    oracle.assert_rounded_sum(out, expected, backend)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_indices_out_of_range_stay_inside(device):
    """The ops reject them where checking costs nothing; the kernels themselves clamp."""
    from atedm_kernels.ops.gather_tokens.triton_kernel import gather_rows_triton
    from atedm_kernels.ops.recover_feature_map.triton_kernel import recover_feature_map_triton
    from atedm_kernels.ops.similarity_source.triton_kernel import similarity_source_triton

    x = torch.randn(1, 4, 24).to(device)
    wild = torch.tensor([[-1, 2**40, 3, -(2**62), 4, 0]], device=device)
    clamped = wild.clamp(0, 3)
    assert torch.equal(gather_rows_triton(x, wild), x[:, clamped[0]])
    residual = torch.zeros(1, 24, 2, 3, device=device)
    out = recover_feature_map_triton(x, wild, residual)
    assert torch.equal(out.flatten(2).mT, x[:, clamped[0]])
    q = torch.randn(1, 2, 6, 16).to(device)
    source = similarity_source_triton(q, q, torch.zeros(1, 2, 6, device=device), wild, 0.25)
    assert (source >= 0).all() and (source < 6).all()
