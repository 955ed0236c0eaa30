"""Gradients of the ops, against torch's autograd through plain float64 operations."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch.autograd import forward_ad

import atedm_kernels as ak
from atedm_kernels.ops.gather_pair import gather_pair
from atedm_kernels.ops.sum_rows import sum_rows

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
ops = torch.ops.atedm


def whole_numbers(*shape: int) -> torch.Tensor:
    """From −4 to 4: their sums are exact in every dtype, so that results must be equal, not close."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(math.prod(shape))).double()


def rows(batch: int, count: int, upper: int) -> torch.Tensor:
    """Rows that are named several times; some are not."""
    return torch.randint(0, upper, (batch, count), generator=torch.Generator().manual_seed(count))


def slow_recover(x: torch.Tensor, source: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    tokens = torch.stack([x[b][source[b]] for b in range(x.shape[0])])
    return residual + tokens.transpose(1, 2).reshape(residual.shape)


def slow_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return torch.stack([x[b][index[b]] for b in range(x.shape[0])])


def slow_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.softmax(scale * torch.einsum("bhmd,bhnd->bhmn", q, k), -1) @ v


def gradients(function, upstream: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of ``(function(*inputs) · upstream).sum()`` by every input."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    out = function(*inputs)
    return torch.autograd.grad(out, inputs, upstream.to(out.device, out.dtype).expand(out.shape))


@pytest.mark.parametrize("op", [ak.gather_tokens, ak.recover_tokens])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "tokens", "channels", "count"), [(1, 1, 1, 1), (2, 37, 20, 11), (2, 9, 130, 41), (2, 16, 256, 33)]
)
def test_of_rows(backend, device, op, dtype, batch, tokens, channels, count, poisoned_empty):
    x, index = whole_numbers(batch, tokens, channels), rows(batch, count, tokens)
    upstream = whole_numbers(batch, count, channels)
    (expected,) = gradients(lambda x: slow_rows(x, index), upstream, x)
    for strided in (upstream, upstream.mT.contiguous().mT):
        with ak.backend(backend):
            (got,) = gradients(lambda x: op(x, index.to(device)), strided, x.to(device, dtype))
        assert got.dtype == dtype and torch.equal(got.double().cpu(), expected)


@pytest.mark.parametrize("shape", [(2, 3, 67, 1), (2, 70, 5, 13), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize(
    ("x_dtype", "dtype"), [*zip(DTYPES, DTYPES, strict=True), (torch.bfloat16, torch.float32)], ids=str
)
def test_of_a_feature_map(backend, device, shape, x_dtype, dtype, poisoned_empty):
    batch, channels, height, width = shape
    slots = max(1, height * width // 3)
    x, residual, source = (
        whole_numbers(batch, slots, channels),
        whole_numbers(*shape),
        rows(batch, height * width, slots),
    )
    upstream = whole_numbers(*shape) + 1
    expected = gradients(lambda x, residual: slow_recover(x, source, residual), upstream, x, residual)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        given = x.to(device, x_dtype), residual.to(device, dtype, memory_format=memory_format)
        with ak.backend(backend):
            got = gradients(
                lambda x, residual: ak.recover_feature_map(x, source.to(device), residual), upstream, *given
            )
        assert [each.dtype for each in got] == [x_dtype, dtype]
        assert all(torch.equal(a.double().cpu(), b) for a, b in zip(got, expected, strict=True))


def test_of_a_pair_of_rows(backend, device):
    """Of both, and of either alone."""
    x, y, index = whole_numbers(2, 9, 20), whole_numbers(2, 9, 5), rows(2, 12, 9)
    of_x, of_y = whole_numbers(2, 12, 20), whole_numbers(2, 12, 5)
    (expected_x,), (expected_y,) = (
        gradients(lambda one: slow_rows(one, index), upstream, one) for one, upstream in ((x, of_x), (y, of_y))
    )
    x, y = x.to(device, torch.bfloat16), y.to(device, torch.float32)
    index, of_x, of_y = index.to(device), of_x.to(device, x.dtype), of_y.to(device, y.dtype)
    for needed in ((True, True), (True, False), (False, True)):
        given = [one.detach().requires_grad_(asked) for one, asked in zip((x, y), needed, strict=True)]
        with ak.backend(backend):
            out = gather_pair(*given, index)
            assert tuple(one.requires_grad for one in out) == (True, True)
            torch.autograd.backward(out, (of_x, of_y))
        for one, expected in zip(given, (expected_x, expected_y), strict=True):
            assert one.grad is None if not one.requires_grad else torch.equal(one.grad.double().cpu(), expected)


def test_of_several_gradients_at_once(backend, device):
    """As ``torch.autograd.functional.jacobian(vectorize=True)`` asks for them."""
    x, residual, index, source = (
        whole_numbers(2, 6, 32),
        whole_numbers(2, 32, 3, 4),
        rows(2, 4, 6).to(device),
        rows(2, 12, 6).to(device),
    )
    x, residual = (each.float().to(device).requires_grad_() for each in (x, residual))
    with ak.backend(backend):
        for out in (
            ak.gather_tokens(x, index),
            gather_pair(x, x, index)[0],
            ak.recover_tokens(x, source),
            ak.recover_feature_map(x, source, residual),
            ak.attention_with_logsumexp(x[:, None], x[:, None], x[:, None])[0],
        ):
            upstream = torch.randn(3, *out.shape, device=device)
            (together,) = torch.autograd.grad(out, x, upstream, is_grads_batched=True, retain_graph=True)
            for got, one in zip(together, upstream, strict=True):
                torch.testing.assert_close(got, *torch.autograd.grad(out, x, one, retain_graph=True))


def test_only_what_is_asked_for_is_computed(monkeypatch):
    from atedm_kernels.ops.recover_feature_map import op

    x, residual, source = whole_numbers(1, 2, 3), whole_numbers(1, 3, 2, 2).requires_grad_(), rows(1, 4, 2)
    monkeypatch.setattr(op, "sum_rows", None)
    ak.recover_feature_map(x, source, residual).sum().backward()
    assert torch.equal(residual.grad, torch.ones_like(residual))


def test_sums_are_rounded_once(backend, device):
    """In bfloat16, 4096 + 16 is 4096."""
    for dtype in DTYPES:
        x = torch.ones(1, 513, 3, device=device, dtype=dtype)
        x[:, 0] = 4096
        with ak.backend(backend):
            out = sum_rows(x, torch.zeros(1, 513, dtype=torch.int64, device=device), 2)
        assert out.tolist() == [[[4608.0] * 3, [0.0] * 3]]


def test_sums_are_right_whatever_dtype_is_the_default(backend, device):
    x, source = whole_numbers(1, 6, 3).float().to(device), rows(1, 6, 2).to(device)
    expected = torch.zeros(1, 2, 3, device=device).index_add_(1, source[0], x)
    default = torch.get_default_dtype()
    for other in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(other)
        try:
            with ak.backend(backend):
                out = sum_rows(x, source, 2)
        finally:
            torch.set_default_dtype(default)
        assert out.dtype == torch.float32 and torch.equal(out, expected)


def test_the_order_of_a_sum_is_fixed(backend, device):
    x = torch.randn(2, 300, 40, generator=torch.Generator().manual_seed(0)).to(device)
    source = rows(2, 300, 5).to(device)
    with ak.backend(backend):
        first = sum_rows(x, source, 5)
        assert all(torch.equal(sum_rows(x, source, 5), first) for _ in range(3))
    if backend != "triton":  # there block by block
        one_by_one = torch.zeros(2, 5, 40, device=device)
        for b in range(2):
            for n in range(300):
                one_by_one[b, source[b, n]] += x[b, n]
        assert torch.equal(first, one_by_one)


def test_sources_out_of_range_stay_inside(device):
    from atedm_kernels.ops.sum_rows.triton_kernel import sum_rows_triton

    x = whole_numbers(1, 6, 24).float().to(device)
    wild = torch.tensor([[-1, 2**40, 3, -(2**62), 4, 0]], device=device)
    assert torch.equal(sum_rows_triton(x, wild, 4), sum_rows_triton(x, wild.clamp(0, 3), 4))


def test_sums_of_rows_check_their_arguments():
    x, source = torch.randn(2, 5, 3), torch.zeros(2, 5, dtype=torch.int64)
    for message, wrong in {
        r"source has shape \[2, 4\]; expected \[2, 5\]": (x, source[:, :4], 3),
        "slots is 0; expected at least 1": (x, source, 0),
        "source holds values from 3 to 3; expected 0 to 2": (x, source + 3, 3),
    }.items():
        with pytest.raises(ValueError, match=message):
            sum_rows(*wrong)


# Odd head dims are padded; 300 queries are several blocks of torch's CPU kernel.
@pytest.mark.parametrize("shape", [(2, 3, 17, 17, 16), (1, 2, 300, 77, 40), (2, 1, 5, 9, 20), (1, 1, 1, 1, 8)], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("forced", [None, "reference"])
def test_of_attention(device, shape, dtype, forced):
    batch, heads, queries, keys, head_dim = shape
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = (
        torch.randn(batch, n, heads, head_dim, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
        for n in (queries, keys, keys, queries)
    )
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    for scale in (None, 0.3):
        expected = gradients(lambda *x, s=scale: slow_attention(*x, s), upstream, q.double(), k.double(), v.double())
        with ak.backend(forced) if forced else contextlib.nullcontext():
            got = gradients(
                lambda *x, s=scale: ak.attention_with_logsumexp(*x, scale=s)[0],
                upstream,
                *(x.to(device) for x in (q, k, v)),
            )
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == dtype
            assert (a.double().cpu() - b).norm() <= tolerance * (b.norm() + 0.01)  # of one key they are 0


def test_of_attention_by_a_gradient_without_memory(device):
    """What a sum hands back has strides of 0."""
    q, k, v = (torch.randn(1, 2, 9, 16, device=device) for _ in range(3))
    ones = torch.ones(()), torch.ones(1, 2, 9, 16)
    expanded, dense = (gradients(lambda *x: ak.attention_with_logsumexp(*x)[0], upstream, q, k, v) for upstream in ones)
    for a, b in zip(expanded, dense, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("forced", [None, "reference"])
def test_gradcheck(forced):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    index, source = rows(2, 4, 6), rows(2, 12, 6)
    with ak.backend(forced) if forced else contextlib.nullcontext():
        for function in (
            lambda x: ak.gather_tokens(x, index),
            lambda x: ak.recover_tokens(x, source),
            lambda x: sum_rows(x, index[:, [0, 1, 1, 2, 3, 3]], 7),
        ):
            x = draw(2, 6, 3)
            assert torch.autograd.gradcheck(function, x) and torch.autograd.gradgradcheck(function, x)
        maps = draw(2, 6, 3), draw(2, 3, 3, 4)
        assert torch.autograd.gradcheck(lambda x, residual: ak.recover_feature_map(x, source, residual), maps)
        assert torch.autograd.gradgradcheck(lambda x, residual: ak.recover_feature_map(x, source, residual), maps)
        qkv = draw(1, 2, 5, 8), draw(1, 2, 7, 8), draw(1, 2, 7, 8)
        assert torch.autograd.gradcheck(lambda *x: ak.attention_with_logsumexp(*x, scale=0.4)[0], qkv)


def opcheck_calls(device: torch.device, dtype: torch.dtype):
    def draw(*shape):
        return torch.randn(*shape, device=device).to(dtype).requires_grad_()

    torch.manual_seed(0)
    q, k, v = draw(2, 2, 9, 16), draw(2, 2, 7, 16), draw(2, 2, 7, 16)
    out, lse = (x.detach() for x in ak.attention_with_logsumexp(q, k, v))
    index, source = rows(2, 4, 9).to(device), rows(2, 9, 4).to(device)
    plain = (x.detach() for x in (q, k, v))
    return {
        ops.attention_with_logsumexp: (q, k, v, 0.3),
        ops._attention_backward: (torch.randn_like(out), *plain, out, lse),
        ops.gather_tokens: (draw(2, 9, 5), index),
        ops._gather_pair: (draw(2, 9, 5), draw(2, 9, 3), index),
        ops.recover_tokens: (draw(2, 4, 5), source),
        ops.recover_feature_map: (draw(2, 4, 5), source, draw(2, 5, 3, 3)),
        ops._sum_rows: (draw(2, 9, 5), source, 4),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck(backend, device, dtype):
    with ak.backend(backend):
        for op, arguments in opcheck_calls(device, dtype).items():
            torch.library.opcheck(op.default, arguments)


def prune_and_recover(q, k, v, residual):
    """The ops as a block uses them, from its queries to its feature map."""
    out, lse = ak.attention_with_logsumexp(q, k, v)
    scores, _ = ak.weighted_page_rank(q, k, lse, max_iterations=2, tolerance=0.0)
    index = ak.select_tokens(scores, 4)
    source = ak.similarity_source(q, k, lse, index)
    compact = ak.gather_tokens(out.transpose(1, 2).flatten(2), index)
    return ak.recover_feature_map(compact * compact, source, residual) + ak.recover_tokens(compact, source).mean()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_forward_and_backward(backend, device, compiler):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 9, 2, 16, device=device).transpose(1, 2) for _ in range(3)]
    inputs.append(torch.randn(2, 32, 3, 3, device=device))
    torch._dynamo.reset()
    with ak.backend(backend):
        compiled = torch.compile(prune_and_recover, fullgraph=True, backend=compiler)
        expected, got = (gradients(each, torch.ones(()), *inputs) for each in (prune_and_recover, compiled))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert b.abs().sum() > 0


def saved_by(function) -> list[torch.Tensor]:
    saved = []

    def keep(x):
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        function()
    return saved


def test_nothing_is_saved_but_indices_and_what_attention_saves():
    x, residual = torch.randn(2, 9, 4, requires_grad=True), torch.randn(2, 4, 3, 3, requires_grad=True)
    index, source = rows(2, 4, 9), rows(2, 9, 9)
    for function, names in (
        (lambda: ak.gather_tokens(x, index), index),
        (lambda: ak.recover_tokens(x, source), source),
        (lambda: ak.recover_feature_map(x, source, residual), source),
    ):
        assert [each.data_ptr() for each in saved_by(function)] == [names.data_ptr()]
    q, k, v = (torch.randn(1, 9, 2, 16, requires_grad=True).transpose(1, 2) for _ in range(3))
    results = []
    saved = saved_by(lambda: results.extend(ak.attention_with_logsumexp(q, k, v)))
    assert [each.data_ptr() for each in saved] == [each.data_ptr() for each in (q, k, v, *results)]


def test_a_logsumexp_requires_no_gradient_and_a_second_derivative_of_attention_is_refused():
    q = torch.randn(1, 1, 5, 8, requires_grad=True)
    out, lse = ak.attention_with_logsumexp(q, q, q)
    assert out.requires_grad and not lse.requires_grad
    (first,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="expected first derivatives only"):
        first.sum().backward()


def test_without_gradients_none_are_recorded():
    x, index = torch.randn(2, 9, 4, requires_grad=True), rows(2, 4, 9)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert not ak.gather_tokens(x, index).requires_grad
            assert not ops.gather_tokens(x, index).requires_grad
    assert not ak.gather_tokens(x.detach(), index).requires_grad


@pytest.mark.parametrize("enabled", [False, True])
def test_tangents_are_refused_not_dropped(device, enabled):
    x, index = torch.randn(2, 9, 5, device=device), rows(2, 4, 9).to(device)
    with torch.set_grad_enabled(enabled):
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="x carries a tangent"):
            ak.gather_tokens(forward_ad.make_dual(x, torch.ones_like(x)), index)
        with pytest.raises(NotImplementedError, match="x carries a tangent"):
            torch.func.jvp(lambda x: ak.gather_tokens(x, index), (x,), (torch.ones_like(x),))
        with forward_ad.dual_level():
            assert ak.gather_tokens(x, index).shape == (2, 4, 5)
