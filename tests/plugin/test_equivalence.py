"""What a pruned UNet computes, against an implementation written to be slow and obvious."""

import math

import pytest
import torch

import atedm
from atedm.policy.options import PUBLISHED
from tests.helpers.slow_pruning import slow_unet


def run(unet, inputs, **options):
    with atedm.applied(unet, PUBLISHED, **options):
        return unet(**inputs).sample


def test_ratio_zero_is_the_unpatched_unet(unet, inputs):
    full = unet(**inputs).sample
    assert torch.equal(run(unet, inputs, ratio=0), full)


@pytest.mark.parametrize("placement", ["early", "paper"])
@pytest.mark.parametrize("levels", [(2, 3), (3,)])
@pytest.mark.parametrize("ratio", [0.63, 0.3])
def test_equals_the_slow_implementation(make_unet, make_inputs, placement, levels, ratio):
    unet, inputs = make_unet(torch.float64), make_inputs(torch.float64)
    expected = slow_unet(unet, inputs, ratio, levels)
    out = run(
        unet, inputs, ratio=ratio, levels=levels, schedule=None, placement=placement, tolerance=0, max_iterations=5
    )
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("placement", ["early", "paper"])
def test_recovery_by_keys_equals_the_slow_implementation(make_unet, make_inputs, placement):
    unet, inputs = make_unet(torch.float64), make_inputs(torch.float64)
    expected = slow_unet(unet, inputs, 0.63, (2, 3), recovery="keys")
    options = {"ratio": 0.63, "schedule": None, "placement": placement, "tolerance": 0, "max_iterations": 5}
    out = run(unet, inputs, recovery="keys", **options)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(out, run(unet, inputs, **options), atol=1e-3)


@pytest.mark.parametrize("ratio", [0.63, 0.9])
def test_ranking_by_keys_on_a_grid_equals_the_slow_implementation(make_unet, make_inputs, ratio):
    unet, inputs = make_unet(torch.float64), make_inputs(torch.float64)
    expected = slow_unet(unet, inputs, ratio, (2, 3), ranking="keys", recovery="keys", grid=2)
    options = {"ratio": ratio, "schedule": None, "ranking": "keys", "recovery": "keys"}
    with atedm.record(atedm.apply(unet, PUBLISHED, grid=2, **options)) as recording:
        out = unet(**inputs).sample
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(out, run(unet, inputs, **options), atol=1e-3)
    for ranked in recording.ranked:
        assert ranked.scores.isfinite().all()
        assert ranked.iterations is None
        # 0.63 leaves more than a quarter of the tokens; 0.9 leaves 10 of 8 × 12 and 2 of 4 × 6.
        stride = 2 if ratio == 0.63 else {(8, 12): 4, (4, 6): 4}[ranked.height, ranked.width]
        assert ranked.mask()[:, ::stride, ::stride].all()


@pytest.mark.parametrize("stride", [2, 3, 50])
def test_a_grid_has_its_crossings_at_odd_sizes(make_unet, make_inputs, stride):
    unet, inputs = make_unet(torch.float32), make_inputs(torch.float32, height=18, width=26)
    with atedm.applied(unet, PUBLISHED, ratio=0.5, grid=stride, schedule=None), atedm.record(unet) as recording:
        unet(**inputs)
    sizes = {(ranked.height, ranked.width) for ranked in recording.ranked}
    assert sizes == {(9, 13), (5, 7)}
    for ranked in recording.ranked:
        assert ranked.mask()[:, ::stride, ::stride].all()
        assert ranked.index.shape[1] == math.floor(0.5 * ranked.tokens + 0.5)


@pytest.mark.parametrize("placement", ["early", "paper"])
def test_cross_ranking_equals_the_slow_implementation(make_unet, make_inputs, placement):
    unet, inputs = make_unet(torch.float64), make_inputs(torch.float64)
    expected = slow_unet(unet, inputs, 0.5, (2, 3), ranking="cross")
    out = run(
        unet, inputs, ratio=0.5, schedule=None, placement=placement, ranking="cross", tolerance=0, max_iterations=5
    )
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_convolutional_projections(make_unet, make_inputs):
    unet = make_unet(torch.float64, use_linear_projection=False)
    inputs = make_inputs(torch.float64)
    expected = slow_unet(unet, inputs, 0.63, (2, 3))
    out = run(unet, inputs, ratio=0.63, schedule=None, tolerance=0, max_iterations=5)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_early_equals_paper_placement_on_a_fixed_kept_set(make_unet, make_inputs):
    unet, inputs = make_unet(torch.float64), make_inputs(torch.float64)

    def fixed(q, k, lse):
        generator = torch.Generator().manual_seed(q.shape[2])
        return torch.rand(q.shape[0], 1, q.shape[2], generator=generator)

    early = run(unet, inputs, ranking=fixed, schedule=None, placement="early")
    paper = run(unet, inputs, ranking=fixed, schedule=None, placement="paper")
    assert not torch.allclose(early, unet(**inputs).sample, atol=1e-3)
    torch.testing.assert_close(early, paper, rtol=1e-12, atol=1e-12)


def test_fused_projections_change_nothing(make_unet, make_inputs):
    unet, inputs = make_unet(torch.float64), make_inputs(torch.float64)
    expected = run(unet, inputs, schedule=None)
    unet.fuse_qkv_projections()
    torch.testing.assert_close(run(unet, inputs, schedule=None), expected, rtol=1e-12, atol=1e-12)


def test_levels_have_their_own_ratios(unet, inputs):
    with atedm.applied(unet, PUBLISHED, ratio={2: 0.25, 3: 0.75}, schedule=None), atedm.record(unet) as recording:
        unet(**inputs)
    kept = {(ranked.level, ranked.tokens, ranked.index.shape[1]) for ranked in recording.ranked}
    assert kept == {(2, 8 * 12, 72), (3, 4 * 6, 6)}


def test_keep_multiple(unet, inputs):
    with atedm.applied(unet, PUBLISHED, ratio=0.63, keep_multiple=8, schedule=None), atedm.record(unet) as recording:
        unet(**inputs)
    # 0.37 · 96 = 35.5 and 0.37 · 24 = 8.9
    assert {(ranked.level, ranked.index.shape[1]) for ranked in recording.ranked} == {(2, 32), (3, 8)}


def test_zeros_leave_dropped_tokens_at_what_zeros_project_to(make_unet, make_inputs):
    unet, inputs = make_unet(torch.float64), make_inputs(torch.float64)
    seen = {}
    block = unet.mid_block.attentions[0]
    handle = block.register_forward_hook(lambda module, args, out: seen.update(before=args[0], after=out[0]))
    with atedm.applied(unet, PUBLISHED, ratio=0.5, recovery="zeros", schedule=None), atedm.record(unet) as recording:
        unet(**inputs)
    handle.remove()
    mask = next(ranked for ranked in recording.ranked if ranked.block.startswith("mid")).mask()
    padded = seen["before"] + block.proj_out.bias[:, None, None]
    same = (padded - seen["after"]).abs().amax(dim=1) < 1e-14
    assert torch.equal(same, ~mask)


@pytest.mark.parametrize("recovery", ["zeros", "bicubic"])
@pytest.mark.parametrize("linear", [True, False])
def test_other_recoveries_commute_with_the_projection(make_unet, make_inputs, recovery, linear):
    unet, inputs = make_unet(torch.float64, use_linear_projection=linear), make_inputs(torch.float64)
    early = run(unet, inputs, recovery=recovery, schedule=None, placement="early")
    paper = run(unet, inputs, recovery=recovery, schedule=None, placement="paper")
    torch.testing.assert_close(early, paper, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(early, run(unet, inputs, schedule=None), atol=1e-3)


def test_bicubic_recovers_a_constant_and_keeps_kept_tokens():
    from atedm.policy.recovery import interpolate_bicubic

    generator = torch.Generator().manual_seed(0)
    height, width, keep = 7, 10, 9
    index = torch.stack([torch.randperm(height * width, generator=generator)[:keep].sort().values for _ in range(2)])
    constant = interpolate_bicubic(torch.full((2, keep, 3), 2.5), index, height, width)
    assert torch.allclose(constant, torch.tensor(2.5), atol=1e-5)
    x = torch.randn(2, keep, 3, generator=generator)
    out = interpolate_bicubic(x, index, height, width)
    assert torch.equal(out.gather(1, index[..., None].expand(-1, -1, 3)), x)


def test_batch_rows_do_not_influence_each_other(make_unet, make_inputs):
    unet, both = make_unet(torch.float64), make_inputs(torch.float64)
    one = {
        **both,
        "sample": both["sample"][1:],
        "encoder_hidden_states": both["encoder_hidden_states"][1:],
        "added_cond_kwargs": {key: value[1:] for key, value in both["added_cond_kwargs"].items()},
    }
    torch.testing.assert_close(run(unet, both, schedule=None)[1:], run(unet, one, schedule=None), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_low_precision_stays_near_float64_on_the_same_kept_sets(make_unet, make_inputs, dtype, tolerance):
    def fixed(q, k, lse):
        return torch.arange(q.shape[2], dtype=torch.float32).sin().expand(q.shape[0], 1, -1)

    # The most similar token is a choice as well, which rounding may turn, so it is left out here.
    options = {"ranking": fixed, "recovery": "zeros", "schedule": None}
    unet, inputs = make_unet(dtype), make_inputs(dtype)
    low = run(unet, inputs, **options)
    exact_inputs = {
        "sample": inputs["sample"].double(),
        "timestep": inputs["timestep"],
        "encoder_hidden_states": inputs["encoder_hidden_states"].double(),
        "added_cond_kwargs": {key: value.double() for key, value in inputs["added_cond_kwargs"].items()},
    }
    exact = run(unet.double(), exact_inputs, **options)
    assert low.dtype == dtype
    assert (low.double() - exact).norm() / exact.norm() < tolerance
