"""``update_feature_map``: the output, the cache that it writes in place, and what neither may depend on."""

from __future__ import annotations

import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import atedm_kernels as ak
from tests.helpers import oracle

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# B, C, h, w and how many tokens are kept. A tile of the Triton kernel is 64 tokens by 64 channels.
SHAPES = [
    ((1, 1, 1, 1), 1),
    ((2, 3, 1, 37), 11),
    ((3, 40, 67, 1), 67),
    ((2, 65, 5, 13), 1),
    ((1, 192, 3, 7), 8),
    ((3, 70, 9, 9), 30),
    ((2, 128, 8, 8), 64),
    ((2, 2, 10, 23), 131),
]
# Each shape takes every dtype in either place, and each pair meets tiles in both directions: the layouts and the tiles
# know no dtype. tests/native takes every pair to every shape.
CASES = [
    (*shape, DTYPES[n], DTYPES[(n + row) % len(DTYPES)]) for row, shape in enumerate(SHAPES) for n in range(len(DTYPES))
]


def layouts_of_tokens(x: torch.Tensor) -> list[torch.Tensor]:
    """The same values, each time in memory of their own."""
    return [
        x.clone(),
        x.mT.contiguous().mT,
        torch.stack([x, -x], -1).flatten(-2)[..., ::2],
        torch.nn.functional.pad(x, (1, 2, 1, 0))[:, 1:, 1:-2],
        x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    ]


@pytest.mark.parametrize(("shape", "keep", "x_dtype", "dtype"), CASES, ids=str)
def test_output_and_cache(backend, device, shape, keep, x_dtype, dtype, poisoned_empty):
    x, index, cache, residual = oracle.update_inputs(shape, keep, x_dtype, dtype, device)
    written, expected = oracle.updated(x, index, cache, residual)
    views = zip(layouts_of_tokens(x), layouts_of_tokens(cache)[::-1], oracle.layouts_of_map(residual), strict=True)
    with ak.backend(backend):
        for new, into, added in views:
            out = ak.update_feature_map(new, index.mT.contiguous().mT, into, added)
            oracle.assert_rounded_sum(out, expected, backend)
            assert torch.equal(into, written)
            last = added.is_contiguous(memory_format=torch.channels_last) and not added.is_contiguous()
            assert out.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def test_dropped_tokens_keep_their_bits_and_kept_ones_take_those_of_x(backend, device):
    """NaN with a payload, minus zero, denormals; cache and x are parts of one larger tensor, apart from each other."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**15), 2**15, (2, 3, 50, 72), generator=generator).to(torch.int16)
    # Quiet NaN: torch's own gather, which the reference uses, quiets the others.
    bits = torch.where(bits.view(torch.float16).isnan(), bits | 0x200, bits).to(device)
    memory = bits.clone()
    cache, x = memory[0, :, :, 4:68].view(torch.float16), memory[1, :, :20, 4:68].view(torch.float16)
    index = oracle.kept_tokens(3, 50, 20, device)
    with ak.backend(backend):
        ak.update_feature_map(x, index, cache, torch.zeros(3, 64, 5, 10, device=device, dtype=torch.float16))
    for b in range(3):
        bits[0, b, index[b], 4:68] = bits[1, b, :20, 4:68]
    assert torch.equal(memory, bits)


def test_repeats_bit_for_bit(backend, device):
    x, index, cache, residual = oracle.update_inputs((2, 130, 13, 11), 60, torch.bfloat16, torch.float16, device)
    with ak.backend(backend):
        first = ak.update_feature_map(x, index, cache, residual)
        for _ in range(3):
            assert torch.equal(ak.update_feature_map(x, index, cache, residual), first)


def test_float64_is_served_by_the_reference(device):
    x, index, cache, residual = oracle.update_inputs((2, 5, 3, 4), 7, torch.float64, torch.float32, device)
    written, expected = oracle.updated(x, index, cache, residual)
    assert torch.equal(ak.update_feature_map(x, index, cache, residual), expected) and torch.equal(cache, written)


REFUSED = {
    "index holds values": lambda x, index, cache, residual: (x, index + 11, cache, residual),
    "index holds .* after": lambda x, index, cache, residual: (x, index.flip(1), cache, residual),
    "x shares memory": lambda x, index, cache, residual: (cache[:, 1:8], index, cache, residual),
    "cache has dtype": lambda x, index, cache, residual: (x.half(), index, cache, residual),
    "cache has shape": lambda x, index, cache, residual: (x, index, cache, residual[..., :3]),
    "residual is on meta": lambda x, index, cache, residual: (x, index, cache, residual.to("meta")),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_call_that_is_refused_writes_nothing(backend, device, monkeypatch, message):
    monkeypatch.setenv("ATEDM_CHECK", "1")
    arguments = oracle.update_inputs((2, 5, 3, 4), 7, torch.float32, torch.float32, device)
    cache = arguments[2]
    before, version = cache.clone(), cache._version
    with ak.backend(backend), pytest.raises((ValueError, TypeError), match=message):
        ak.update_feature_map(*REFUSED[message](*arguments))
    assert torch.equal(cache, before) and cache._version == version


def test_autograd_and_the_version_of_the_cache(backend, device):
    x, index, cache, residual = oracle.update_inputs((2, 5, 3, 4), 7, torch.float32, torch.float32, device)
    version = cache._version
    with ak.backend(backend):
        out = ak.update_feature_map(x.requires_grad_(), index, cache, residual.requires_grad_())
        assert not out.requires_grad and not cache.requires_grad and cache._version > version
        with pytest.raises(ValueError, match="cache requires a gradient"):
            ak.update_feature_map(x, index, cache.clone().requires_grad_(), residual)
        with torch.inference_mode():
            inside = cache.clone()
            assert torch.equal(ak.update_feature_map(x * 2, index, inside, residual), residual + inside_map(inside, 3))


def inside_map(cache: torch.Tensor, height: int) -> torch.Tensor:
    return cache.mT.unflatten(2, (height, -1))


def test_wild_indices_stay_inside(device):
    """The op rejects them where checking costs nothing; the kernels themselves stay inside."""
    from atedm_kernels.ops.update_feature_map.reference import update_feature_map_reference
    from atedm_kernels.ops.update_feature_map.triton_kernel import update_feature_map_triton

    for update in (update_feature_map_reference, update_feature_map_triton):
        oracle.assert_wild_updates_stay_inside(update, device)


class Updating(torch.nn.Module):
    """A block with a cache of its own: what it returns is computed from the output and from the cache."""

    def __init__(self, cache: torch.Tensor) -> None:
        super().__init__()
        torch._dynamo.mark_static_address(cache)
        self.cache = cache

    def forward(self, x, index, residual):
        return ak.update_feature_map(x * 2, index, self.cache, residual + 1) * 3


def updating(x, index, cache, residual):
    return ak.update_feature_map(x * 2, index, cache, residual + 1) * 3


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["input", "attribute"])
def test_compiled_it_writes_the_cache_itself(backend, device, compiler, kind):
    """The cache of a graph is the caller's, written where it lies: no copy of it is made before, none afterwards."""
    shape = (2, 21, 6, 7)
    inputs = [oracle.update_inputs(shape, keep, torch.float32, torch.float32, device) for keep in (9, 9, 13)]
    cache = inputs[0][2].clone()
    address, expected_cache = cache.data_ptr(), cache
    torch._dynamo.reset()
    module = Updating(cache)
    function = module if kind == "attribute" else updating
    compiled = torch.compile(function, fullgraph=True, backend=compiler, dynamic=False)
    with ak.backend(backend), torch.no_grad():
        for n, (x, index, _, residual) in enumerate(inputs):
            x = x + n  # other values at the same tokens, then at others
            expected_cache, expected = oracle.updated(x * 2, index, expected_cache, residual + 1)
            arguments = (x, index, residual) if kind == "attribute" else (x, index, cache, residual)
            if n == 0:
                out, code = run_and_get_code(compiled, *arguments)
            else:
                out = compiled(*arguments)
            assert torch.equal(out, expected * 3) and torch.equal(cache, expected_cache)
    assert cache.data_ptr() == address
    if compiler == "inductor":
        (text,) = code
        assert re.search(r"update_feature_map\.default\(\w+, \w+, (arg|primals)\w+, \w+\)", text), text
        # No buffer as large as the cache, and no copy into it.
        assert not re.search(r"empty_strided\w*\(\(2, 42, 21\)|copy_", text[text.index("def call") :]), text
