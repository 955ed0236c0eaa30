"""Random shapes, strides, dtypes and special values, compared with the reference; and values that cannot be compared,
which must still do no harm."""

# ruff: noqa: B023 — every lambda is called where it is defined.

from __future__ import annotations

import contextlib
import random

import pytest
import torch
from torch import Tensor

import atedm_kernels as ak
from atedm_kernels import native
from tests.helpers import oracle

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SEEDS = range(60)
INF, NAN = float("inf"), float("nan")


class Fuzz:
    """Random tensors from one seed."""

    def __init__(self, seed: int) -> None:
        self.choice = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, factor: float = 1.0) -> Tensor:
        return self.laid_out((torch.randn(shape, generator=self.generator) * factor).to(dtype))

    def laid_out(self, x: Tensor) -> Tensor:
        """The same values with other strides, or at an address that is not a multiple of the element's size."""
        layout = self.choice.choice(
            ["contiguous", "transposed", "every second", "reversed dims", "unaligned", "padded"]
        )
        if layout == "transposed" and x.ndim > 2:
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "every second":
            return torch.stack([x, torch.full_like(x, 99)], -1).flatten(-2)[..., ::2]
        if layout == "reversed dims":
            dims = list(reversed(range(x.ndim)))
            return x.permute(dims).contiguous().permute(dims)
        if layout == "unaligned":
            memory = bytearray(x.numel() * x.element_size() + 1)
            out = torch.frombuffer(memory, dtype=x.dtype, offset=1, count=x.numel()).view(x.shape)
            return out.copy_(x)
        if layout == "padded":
            return torch.nn.functional.pad(x, (1, 2))[..., 1:-2]
        return x.contiguous()

    def spoil(self, x: Tensor, values: list[float]) -> None:
        """Write special values into a few places."""
        for _ in range(self.choice.randint(1, 3)):
            place = tuple(self.choice.randrange(n) for n in x.shape)
            x[place] = self.choice.choice(values)

    def index(self, batch: int, rows: int, upper: int) -> Tensor:
        return self.laid_out(torch.randint(0, upper, (batch, rows), generator=self.generator))

    @contextlib.contextmanager
    def settings(self):
        """A random ISA, route and number of threads."""
        isa = self.choice.choice([name for name, missing in native.isas().items() if missing is None])
        limits = self.choice.choice([(1 << 40, 0), (0, 1 << 40), (0, 0)])
        before = torch.get_num_threads()
        torch.set_num_threads(self.choice.choice([1, 2, 3]))
        try:
            with native.forced_isa(isa), native.map_limits(*limits):
                yield
        finally:
            torch.set_num_threads(before)


def attention(fuzz: Fuzz, special: list[float], huge: float = 1.0) -> tuple[Tensor, Tensor, Tensor, float]:
    """``q, k, lse`` of a self-attention and its scale, with special values in them."""
    batch, heads = fuzz.choice.randint(1, 3), fuzz.choice.randint(1, 4)
    tokens, head_dim = fuzz.choice.randint(1, 150), fuzz.choice.randint(8, 256)
    dtype = fuzz.choice.choice(DTYPES)
    scale = fuzz.choice.choice([head_dim**-0.5, 0.1, -0.2, 0.0])
    q, k = (fuzz.normal(batch, heads, tokens, head_dim, dtype=dtype, factor=huge) for _ in range(2))
    finite = scale * (q.double() @ k.double().mT)
    lse = finite.logsumexp(-1).float()
    if special:
        for x in (q, k, lse):
            if fuzz.choice.random() < 0.5:
                fuzz.spoil(x, special)
    return q, k, fuzz.laid_out(lse), scale


def both(call) -> tuple:
    results = []
    for name in ("native", "reference"):
        with ak.backend(name):
            results.append(call())
    return tuple(results)


def assert_same(native: Tensor, reference: Tensor, tolerance: float) -> None:
    """NaN and infinities in the same places, the rest close."""
    assert torch.equal(native.isnan(), reference.isnan())
    assert torch.equal(native == INF, reference == INF) and torch.equal(native == -INF, reference == -INF)
    ordinary = reference.isfinite()
    error = (native - reference).abs()[ordinary]
    assert (error <= tolerance * reference[ordinary].abs() + 1e-12).all(), error.max()


@pytest.mark.parametrize("special", [[], [0.0, -0.0, 1e-42], [INF, -INF], [NAN, INF]], ids=str)
def test_sums_and_rankings(special):
    for seed in SEEDS:
        fuzz = Fuzz(seed)
        q, k, lse, scale = attention(fuzz, special)
        weights = fuzz.choice.choice([None, fuzz.laid_out(torch.rand(lse.shape, generator=fuzz.generator))])
        text = k[:, :, : fuzz.choice.randint(1, k.shape[2])]
        initial = fuzz.choice.choice([None, fuzz.laid_out(torch.rand(lse.shape, generator=fuzz.generator) + 1e-3)])
        settings = {"scale": scale, "max_iterations": fuzz.choice.randint(1, 4), "tolerance": 0.0, "initial": initial}
        with fuzz.settings():
            assert_same(*both(lambda: ak.attention_column_sums(q, k, lse, weights, scale=scale)), 2e-4)
            rankings = [both(lambda: ak.weighted_page_rank(q, k, lse, **settings))]
            logits = scale * (q.double() @ text.double().mT)
            # Entropies near 0 consist of rounding, that of float32 logits.
            if not special and torch.distributions.Categorical(logits=logits).entropy().min() > 0.05:
                text_lse = logits.logsumexp(-1).float()
                rankings.append(both(lambda: ak.weighted_page_rank_cross(q, text, text_lse, **settings)))
            for (scores, iterations), (expected, expected_iterations) in rankings:
                assert_same(scores, expected, 1e-3)
                assert torch.equal(iterations, expected_iterations)


def test_sources():
    for seed in SEEDS:
        fuzz = Fuzz(seed)
        special = fuzz.choice.choice([[], [], [0.0], [INF, -INF], [NAN]])
        q, k, lse, scale = attention(fuzz, special)
        batch, _, tokens, _ = q.shape
        keep = fuzz.choice.randint(1, tokens)
        index = torch.stack([torch.randperm(tokens, generator=fuzz.generator)[:keep] for _ in range(batch)])
        index = fuzz.laid_out(index)
        with fuzz.settings():
            source, expected = both(lambda: ak.similarity_source(q, k, lse, index, scale=scale))
        assert torch.equal(source.gather(1, index), torch.arange(keep).expand(batch, -1))
        similarity = torch.exp(scale * (q.double() @ k.double().mT) - lse.double()[..., None]).mean(1)
        similarity = similarity.mT.gather(2, index[:, None].expand(-1, tokens, -1)).nan_to_num(-1.0, posinf=1e300)
        picked, wanted = (similarity.gather(2, s[..., None])[..., 0] for s in (source, expected))
        # Equal up to rounding, or all of them vanish in float32.
        assert ((picked - wanted).abs() <= 1e-4 * wanted.abs() + 1e-30).all()


def test_selection():
    for seed in SEEDS:
        fuzz = Fuzz(seed)
        batch, heads, tokens = (fuzz.choice.randint(1, n) for n in (3, 12, 300))
        scores = fuzz.normal(batch, heads, tokens, factor=fuzz.choice.choice([1.0, 1e-42, 1e30, 0.0]))
        if fuzz.choice.random() < 0.5:
            scores = fuzz.laid_out(scores.round(decimals=1))  # ties
        if fuzz.choice.random() < 0.5:
            fuzz.spoil(scores, [INF, -INF, 0.0, -0.0, 3e38])
        keep = fuzz.choice.randint(1, tokens)
        reduction = fuzz.choice.choice(["rms", "mean"])
        if reduction == "mean" and heads > 1 and scores.isinf().any():
            scores = scores.nan_to_num(posinf=1e38, neginf=-1e38)  # inf - inf is NaN, which is an error
        with fuzz.settings():
            index, expected = both(lambda: ak.select_tokens(scores, keep, reduction=reduction))
        if not torch.equal(index, expected):  # the order of a sum may decide between equal joined heads
            joined = scores.double().mean(1) if reduction == "mean" else scores.double().square().mean(1).sqrt()
            ranked = [joined.gather(1, i).sort(-1).values for i in (index, expected)]
            torch.testing.assert_close(*ranked, rtol=1e-14, atol=0.0)


def test_copies():
    for seed in SEEDS:
        fuzz = Fuzz(seed)
        batch, length, channels, height, width = (fuzz.choice.randint(1, n) for n in (3, 60, 200, 12, 12))
        dtype, other = fuzz.choice.choice(DTYPES), fuzz.choice.choice(DTYPES)
        x = fuzz.normal(batch, length, channels, dtype=dtype, factor=fuzz.choice.choice([1.0, 1e-6, 3e4]))
        residual = fuzz.normal(batch, channels, height, width, dtype=other)
        if fuzz.choice.random() < 0.3:
            residual = residual.to(memory_format=torch.channels_last)
        for tensor in (x, residual):
            fuzz.spoil(tensor, [INF, -INF, NAN, 1e-7, -0.0])
        index, source = fuzz.index(batch, fuzz.choice.randint(1, 90), length), fuzz.index(batch, height * width, length)
        with fuzz.settings():
            for op in (ak.gather_tokens, ak.recover_tokens):
                native, reference = both(lambda op=op: op(x, index))
                assert torch.equal(native.nan_to_num(77.0), reference.nan_to_num(77.0))
            native, reference = both(lambda: ak.recover_feature_map(x, source, residual))
        assert native.dtype == reference.dtype and native.stride() == reference.stride()
        assert torch.equal(native.isnan(), reference.isnan())
        assert torch.equal(native.nan_to_num(77.0), reference.nan_to_num(77.0))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def test_updates():
    for seed in SEEDS:
        fuzz = Fuzz(seed)
        batch, channels, height, width = (fuzz.choice.randint(1, n) for n in (3, 200, 14, 14))
        tokens, dtype, other = height * width, fuzz.choice.choice(DTYPES), fuzz.choice.choice(DTYPES)
        keep = fuzz.choice.randint(1, tokens)
        kept = [torch.randperm(tokens, generator=fuzz.generator)[:keep].sort().values for _ in range(batch)]
        index = fuzz.laid_out(torch.stack(kept))
        x, cache = (fuzz.normal(batch, n, channels, dtype=dtype) for n in (keep, tokens))
        residual = fuzz.normal(batch, channels, height, width, dtype=other)
        if fuzz.choice.random() < 0.3:
            residual = residual.to(memory_format=torch.channels_last)
        for tensor in (x, cache, residual):
            fuzz.spoil(tensor, [INF, -INF, NAN, 1e-7, -0.0])
        written = torch.stack([old.index_copy(0, at, new) for old, at, new in zip(cache, index, x, strict=True)])
        caches = [cache, cache.clone()]  # the second in another layout, where the first has gaps
        with fuzz.settings():
            native, reference = both(lambda: ak.update_feature_map(x, index, caches.pop(0), residual))
        assert torch.equal(bits(cache), bits(written))
        assert native.dtype == reference.dtype and native.stride() == reference.stride()
        assert torch.equal(native.nan_to_num(77.0), reference.nan_to_num(77.0))


def test_values_beyond_comparison():
    """Logits of 1e30 with an unrelated logsumexp do no harm: indices stay in range."""
    for seed in SEEDS:
        fuzz = Fuzz(seed)
        huge = fuzz.choice.choice([1e3, 1e15, 1e-40])
        q, k, lse, scale = attention(fuzz, [INF, -INF, NAN, 3e38, 1e-45], huge)
        lse *= fuzz.choice.choice([1.0, -1.0, 1e30, 0.0])
        tokens = q.shape[2]
        index = torch.arange(tokens)[: fuzz.choice.randint(1, tokens)].expand(q.shape[0], -1)
        with ak.backend("native"), fuzz.settings():
            assert ak.attention_column_sums(q, k, lse, scale=scale).shape == lse.shape
            for rank in (ak.weighted_page_rank, ak.weighted_page_rank_cross):
                scores, iterations = rank(q, k, lse, scale=scale, max_iterations=3)
                assert scores.shape == lse.shape and ((iterations >= 1) & (iterations <= 3)).all()
            source = ak.similarity_source(q, k, lse, index, scale=scale)
            assert (source >= 0).all() and (source < index.shape[1]).all()


def test_indices_out_of_range_stay_inside():
    """The ops reject them; the kernels themselves clamp."""
    from atedm_kernels.ops.gather_tokens.native_kernel import gather_rows_native
    from atedm_kernels.ops.recover_feature_map.native_kernel import recover_feature_map_native
    from atedm_kernels.ops.similarity_source.native_kernel import similarity_source_native
    from atedm_kernels.ops.update_feature_map.native_kernel import update_feature_map_native

    x = torch.randn(1, 4, 24)
    wild = torch.tensor([[-1, 2**40, 3, -(2**62), 4, 0]])
    clamped = wild.clamp(0, 3)
    assert torch.equal(gather_rows_native(x, wild), x[:, clamped[0]])
    residual = torch.zeros(1, 24, 2, 3)
    out = recover_feature_map_native(x, wild, residual)
    assert torch.equal(out.flatten(2).mT, x[:, clamped[0]])
    oracle.assert_wild_updates_stay_inside(update_feature_map_native, torch.device("cpu"))
    q = torch.randn(1, 2, 6, 16)
    source = similarity_source_native(q, q, torch.zeros(1, 2, 6), wild, 0.25)
    assert (source >= 0).all() and (source < 6).all()


def test_nan_counts_least():
    from atedm_kernels.ops.select_tokens.native_kernel import select_tokens_native
    from atedm_kernels.ops.select_tokens.reference import select_tokens_reference

    scores = torch.rand(2, 3, 500, generator=torch.Generator().manual_seed(0))
    scores[0, 1, ::3] = NAN
    scores[1] = NAN
    for keep in (1, 250, 499):
        got = select_tokens_native(scores, keep, "rms")
        assert torch.equal(got, select_tokens_reference(scores, keep, "rms"))
        assert got[1].tolist() == list(range(keep))


@pytest.mark.parametrize("name", ["q", "x", "scores", "residual"])
def test_empty_dimensions_are_named(name):
    """The checks name the argument before a kernel is reached; exercise.cpp hands empty ones to the library itself."""
    empty, index = torch.zeros(1, 2, 0, 16), torch.zeros(1, 3, dtype=torch.int64)
    calls = {
        "q": lambda: ak.attention_column_sums(empty, empty, torch.zeros(1, 2, 0)),
        "x": lambda: ak.gather_tokens(torch.zeros(1, 0, 4), index),
        "scores": lambda: ak.select_tokens(torch.zeros(1, 2, 0), 1),
        "residual": lambda: ak.recover_feature_map(torch.zeros(1, 3, 4), index, torch.zeros(1, 4, 0, 3)),
    }
    with ak.backend("native"), pytest.raises(ValueError, match=f"{name} has shape"):
        calls[name]()
