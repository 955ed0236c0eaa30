"""``_token_drift``: the projected tokens and how far they are from earlier ones, against float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import atedm_kernels as ak
from atedm_kernels.ops.token_drift import token_drift
from tests.helpers import oracle

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# B, C, h, w and the width of the projection. A tile of the Triton kernel is 32 tokens by 64 channels.
SHAPES = [
    ((1, 1, 1, 1), 1),
    ((2, 3, 1, 37), 4),
    ((1, 65, 5, 13), 3),
    ((3, 64, 67, 1), 4),
    ((2, 130, 8, 8), 4),
]
ROUNDING = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-20}


def inputs(shape, width, x_dtype, dtype, device):
    batch, channels, height, columns = shape
    generator = torch.Generator().manual_seed(channels)
    sizes = shape, (width, channels), (batch, width, height * columns)
    x, projection, seen = (torch.randn(size, generator=generator).to(device) for size in sizes)
    return x.to(x_dtype), projection.to(dtype), seen.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "width"), SHAPES, ids=str)
def test_against_float64(backend, device, shape, width, dtype, poisoned_empty):
    x, projection, seen = inputs(shape, width, dtype, dtype, device)
    expected = projection.double() @ x.double().flatten(2)
    size = projection.double().abs() @ x.double().abs().flatten(2)
    for view, before in zip(oracle.layouts_of_map(x), [seen, seen.mT.contiguous().mT, seen, seen, seen], strict=True):
        with ak.backend(backend):
            observed, drift = token_drift(view, projection, before)
        assert observed.dtype == dtype and drift.dtype == torch.float32
        assert observed.is_contiguous() and drift.is_contiguous()
        assert ((observed.double() - expected).abs() <= 2 * ROUNDING[dtype] * size).all()
        moved = (observed.double() - seen.double()).norm(dim=1, keepdim=True)
        # The difference is rounded to the dtype, as torch's is.
        assert (
            (drift.double() - moved).abs() <= 2 * ROUNDING[dtype] * (moved + seen.double().norm(dim=1)[:, None])
        ).all()


def test_what_has_not_moved_has_no_drift(backend, device):
    x, projection, seen = inputs((2, 70, 6, 7), 4, torch.bfloat16, torch.bfloat16, device)
    with ak.backend(backend):
        observed, _ = token_drift(x, projection, seen)
        x[1, :, 2, 3] += 1
        _, drift = token_drift(x, projection, observed)
    assert drift[1, 0, 2 * 7 + 3] > 0 and drift.count_nonzero() == 1


def test_repeats_bit_for_bit(backend, device):
    arguments = inputs((2, 130, 13, 11), 4, torch.bfloat16, torch.float32, device)
    with ak.backend(backend):
        first = token_drift(*arguments)
        for _ in range(3):
            for again, before in zip(token_drift(*arguments), first, strict=True):
                assert torch.equal(again, before)


def test_float64_is_served_by_the_reference(device):
    x, projection, seen = inputs((2, 5, 3, 4), 4, torch.float64, torch.float64, device)
    observed, drift = token_drift(x, projection, seen)
    torch.testing.assert_close(observed, projection @ x.flatten(2))
    torch.testing.assert_close(drift, (observed - seen).norm(dim=1, keepdim=True).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck(backend, device, dtype):
    arguments = inputs((2, 5, 3, 4), 4, dtype, dtype, device)
    with ak.backend(backend):
        torch.library.opcheck(torch.ops.atedm._token_drift.default, arguments)


def test_its_flops_are_those_of_the_projection(device):
    arguments = inputs((2, 5, 3, 4), 4, torch.float32, torch.float32, device)
    with FlopCounterMode(display=False) as counter:
        token_drift(*arguments)
    assert counter.get_total_flops() == 2 * 2 * 4 * 12 * 5


REFUSED = {
    "x has shape": lambda x, projection, seen: (x[0], projection, seen),
    r"projection has shape \[4, 4\]; expected \[4, 5\]": lambda x, projection, seen: (x, projection[:, :4], seen),
    r"seen has shape \[2, 4, 11\]; expected \[2, 4, 12\]": lambda x, projection, seen: (x, projection, seen[..., :11]),
    "seen has dtype": lambda x, projection, seen: (x, projection, seen.half()),
    "projection is on meta": lambda x, projection, seen: (x, projection.to("meta"), seen),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused(backend, device, message):
    arguments = inputs((2, 5, 3, 4), 4, torch.float32, torch.float32, device)
    with ak.backend(backend), pytest.raises((ValueError, TypeError), match=message):
        token_drift(*REFUSED[message](*arguments))
