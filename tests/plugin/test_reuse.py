"""Steps that reuse deep features: beside ControlNets, adapters, FreeU and DeepCache, and on UNets of other shapes."""

import dataclasses
import itertools
import math

import pytest
import torch

import atedm
from atedm.policy.adaptive import Adaptive
from atedm.policy.options import PUBLISHED
from atedm.policy.schedule import Every, Listed, Progress
from atedm.unet.installing import calls_of
from tests.helpers.running import latents, timesteps_of

KINDS = ["whole", "reused", "pruned", "reused"]


def reused_by_hand(unet, feature, call, first_residual=0.0):
    """What a reused step computes, from the feature that entered the last layer before."""
    embedding = unet.time_embedding(unet.get_time_embed(sample=call["sample"], timestep=call["timestep"]))
    embedding = embedding + unet.get_aug_embed(embedding, call["encoder_hidden_states"], call["added_cond_kwargs"])
    hidden = torch.cat([feature, unet.conv_in(call["sample"]) + first_residual], 1)
    hidden = unet.up_blocks[-1].resnets[-1](hidden, embedding)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))


def entering(unet, call):
    """The feature that enters the last layer in a whole call."""
    seen = []
    hook = unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    unet(**call)
    hook.remove()
    return seen[0][:, : -unet.conv_in.out_channels]


def residuals(unet, sample):
    """Of the shapes that a ControlNet adds: for each skip connection, and for the middle."""
    shapes, seen = [], []
    hooks = [
        m.register_forward_hook(lambda _, args, out: seen.append(out)) for m in (*unet.down_blocks, unet.mid_block)
    ]
    unet(sample["sample"], 500, sample["encoder_hidden_states"], added_cond_kwargs=sample["added_cond_kwargs"])
    for hook in hooks:
        hook.remove()
    first = unet.conv_in(sample["sample"])
    shapes = [first.shape, *(x.shape for _, states in seen[:-1] for x in states)]
    generator = torch.Generator().manual_seed(5)
    down = [0.1 * torch.randn(shape, generator=generator) for shape in shapes]
    # An adapter adds to what a stage gives, with cross-attention before it is made smaller.
    given = list(zip(seen[:-1], unet.down_blocks, strict=True))
    adapted = [x if n == 0 else states[len(stage.resnets) - 1] for n, ((x, states), stage) in enumerate(given)]
    return down, 0.1 * torch.randn(seen[-1].shape, generator=generator), [x.shape for x in adapted]


def test_of_a_controlnet_the_first_residual_acts(unet, inputs):
    down, middle, _ = residuals(unet, inputs)
    control = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    call = {**inputs, "timestep": timesteps_of(4)[0], **control}
    feature = entering(unet, call)
    timesteps = timesteps_of(4)
    atedm.apply(unet, PUBLISHED, schedule=KINDS)
    unet(**{**call, "timestep": timesteps[0]})
    later = {**call, "sample": inputs["sample"] * 0.9, "timestep": timesteps[1]}
    expected = reused_by_hand(unet, feature, later, down[0])
    torch.testing.assert_close(unet(**later).sample, expected, rtol=1e-5, atol=1e-5)


def test_a_t2i_adapter_adds_in_place_to_nothing_that_is_read(unet, inputs):
    _, _, shapes = residuals(unet, inputs)

    def call(timestep, sample):
        adapters = [torch.full(shape, 0.1) for shape in shapes]
        return {**inputs, "sample": sample, "timestep": timestep, "down_intrablock_additional_residuals": adapters}

    timesteps = timesteps_of(4)
    feature = entering(unet, call(timesteps[0], inputs["sample"]))
    atedm.apply(unet, PUBLISHED, schedule=KINDS)
    unet(**call(timesteps[0], inputs["sample"]))
    later = call(timesteps[1], inputs["sample"] * 0.9)
    expected = reused_by_hand(unet, feature, later)
    torch.testing.assert_close(unet(**later).sample, expected, rtol=1e-5, atol=1e-5)


def test_freeu_changes_no_feature_that_is_kept(make_unet, inputs):
    unet = make_unet(
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(1, 2),
    )
    unet.enable_freeu(s1=0.6, s2=0.4, b1=1.3, b2=1.4)
    atedm.apply(unet, PUBLISHED, schedule=["whole", "reused", "reused"])
    timesteps = timesteps_of(3)
    with torch.no_grad():
        unet(**{**inputs, "timestep": timesteps[0]})
        feature = calls_of(unet).memory.picture(timesteps.untyped_storage()).slot.feature
        before = feature.clone()
        unet(**{**inputs, "timestep": timesteps[1]})
        assert torch.equal(feature, before)


def test_where_the_last_layer_has_attention_it_runs(make_unet, inputs):
    unet = make_unet(
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=(2, 2, 4),
        use_linear_projection=False,
    )
    timesteps = timesteps_of(4)
    call = {**inputs, "timestep": timesteps[0]}
    feature = entering(unet, call)
    attention = unet.up_blocks[-1].attentions[-1]
    later = {**call, "sample": inputs["sample"] * 0.9, "timestep": timesteps[1]}
    embedding = unet.time_embedding(unet.get_time_embed(sample=later["sample"], timestep=later["timestep"]))
    embedding = embedding + unet.get_aug_embed(embedding, inputs["encoder_hidden_states"], inputs["added_cond_kwargs"])
    hidden = unet.up_blocks[-1].resnets[-1](torch.cat([feature, unet.conv_in(later["sample"])], 1), embedding)
    hidden = attention(hidden, encoder_hidden_states=inputs["encoder_hidden_states"]).sample
    expected = unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))
    for options in ({}, {"recovery": "cached", "staleness": "drift", "ranking": None}):
        atedm.apply(unet, PUBLISHED, schedule=KINDS, **options)
        timesteps = timesteps_of(4)
        unet(**{**call, "timestep": timesteps[0]})
        found = unet(**{**later, "timestep": timesteps[1]}).sample
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        for step in (2, 3):
            assert unet(**{**later, "timestep": timesteps[step]}).sample.isfinite().all()


def test_unets_of_other_stages_are_refused_before_anything_is_changed(make_unet):
    unet = make_unet(up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "AttnUpBlock2D"))
    with pytest.raises(ValueError, match="features cannot be reused: it has a AttnUpBlock2D"):
        atedm.apply(unet, PUBLISHED, schedule=atedm.Every(2))
    assert not unet._forward_pre_hooks and "forward" not in unet.mid_block.__dict__


def test_removal_leaves_the_stages_as_they_were(unet, inputs):
    before = {name: sorted(module.__dict__) for name, module in unet.named_modules()}
    full = unet(**inputs).sample
    atedm.apply(unet, PUBLISHED, schedule=KINDS, recovery="cached")
    atedm.remove(unet)
    assert {name: sorted(module.__dict__) for name, module in unet.named_modules()} == before
    assert torch.equal(unet(**inputs).sample, full)


@pytest.mark.parametrize("part", ["mid_block", "up_blocks.2", "up_blocks.2.resnets.0", "down_blocks.0"])
def test_a_forward_that_is_replaced_later_is_refused_at_the_next_call(unet, inputs, part):
    atedm.apply(unet, PUBLISHED, schedule=KINDS)
    module = unet.get_submodule(part)
    before = module.forward
    module.forward = lambda *args, **kwargs: before(*args, **kwargs)
    with pytest.raises(ValueError, match=f"the features of {part} can no longer be reused"):
        unet(**{**inputs, "timestep": timesteps_of(4)[0]})


@pytest.fixture
def pipe():
    from atedm.embedded import embedded_pipeline

    return embedded_pipeline()


def test_deepcache_on_top_works_without_reused_steps_and_is_refused_with_them(pipe):
    from DeepCache import DeepCacheSDHelper

    def deepcache():
        helper = DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=2, cache_branch_id=0)
        helper.enable()
        return helper

    helper = deepcache()
    alone = latents(pipe)
    helper.disable()
    with atedm.applied(pipe, PUBLISHED, ratio=0.3, recovery="cached", staleness="drift", schedule=None):
        helper = deepcache()
        first, second = latents(pipe), latents(pipe)
        helper.disable()
    assert torch.equal(first, second) and not torch.equal(first, alone)
    # What DeepCache reuses at this depth, a step of ours reuses too.
    with atedm.applied(pipe, PUBLISHED, ratio=0.3, recovery="cached", staleness="drift", schedule=KINDS):
        torch.testing.assert_close(first, latents(pipe))
    atedm.apply(pipe, PUBLISHED, schedule=atedm.Every(2))
    helper = deepcache()
    with pytest.raises(ValueError, match="can no longer be reused: its forward has been replaced by another tool"):
        latents(pipe)
    helper.disable()
    atedm.remove(pipe)
    helper = deepcache()
    with pytest.raises(ValueError, match="features cannot be reused: the forward of"):
        atedm.apply(pipe, PUBLISHED, schedule=atedm.Every(2))
    helper.disable()


def kinds_of(schedule, total, rates):
    """The kinds of a run in which the feature changes by ``rates`` from each step to the next."""
    kinds, known = {}, {}
    for step in range(total):
        computed = [n for n, kind in kinds.items() if kind != "reused"]

        def rate(computed=computed):
            known[computed[-1]] = sum(rates[computed[-2] : computed[-1]]) / (computed[-1] - computed[-2])
            return known[computed[-1]]

        kinds[step] = schedule.kind(Progress(step, total, kinds, rate, known))
    return "".join(kind[0] for kind in kinds.values())


# Measured on the embedded model with 25 Euler steps.
CHANGES = [0.42, 0.22, 0.24, 0.24, 0.20, 0.17, 0.13, 0.10, 0.09, 0.08, 0.07, *[0.06] * 14]


def test_more_steps_come_closer_and_cost_less_a_step():
    """Twice as many: half the change from each to the next."""
    finer = [change / 2 for change in CHANGES for _ in range(2)]
    for schedule in (Adaptive(0.3), Adaptive(0.55, min_gap=2)):
        computed, of_more = kinds_of(schedule, 25, CHANGES).count("w"), kinds_of(schedule, 50, finer).count("w")
        assert computed < of_more < 2 * computed
    apart = Adaptive(0.3, max_gap=20)
    assert kinds_of(apart, 50, [0.019] * 50).startswith("wwrrrrrrrw")  # 0.3 / 2^¾ is 9 times the rate: 6 equal parts
    assert kinds_of(apart, 25, [0.038] * 25).startswith("wwrrrrrw")  # 0.3 is 7 times the rate: 4 equal parts
    assert kinds_of(apart, 13, [0.09] * 13).startswith("wwrrw")  # fewer steps take no more than that


def test_an_adaptive_schedule_follows_the_rate_of_change():
    found = kinds_of(Adaptive(0.3), 25, CHANGES)
    assert [step for step, kind in enumerate(found) if kind == "w"] == [0, 1, 2, 3, 4, 5, 6, 7, 9, 12, 16, 20, 24]
    assert kinds_of(Adaptive(0.3, max_gap=1), 25, CHANGES) == "w" * 25
    pruned = kinds_of(Adaptive(0.3, pruned_from=0.5), 25, CHANGES)
    assert pruned.replace("p", "w") == found and [pruned[n] for n in (12, 16, 20, 24)] == ["w", "p", "w", "p"]
    apart = kinds_of(Adaptive(0.3, min_gap=2), 25, CHANGES)
    assert apart.startswith("wrwrwrwrw") and "ww" not in apart[:9]
    late = kinds_of(Adaptive(0.3, min_gap=2), 25, [0.05] * 15 + [0.4] * 10)  # as under Karras
    assert late.startswith("wrwrrrwrrr") and late.endswith("wwwwwww")
    assert kinds_of(Adaptive(1e9, min_gap=3), 36, [0.1] * 36).startswith("wrrwrrrwr")
    assert kinds_of(Adaptive(0.3, min_gap=2), 24, [math.nan] * 24) == "wrw" + "w" * 21
    assert kinds_of(Adaptive(0.3, min_gap=2), 23, [0.3] * 23) == "w" * 23  # too short for that


def test_a_feature_that_stands_still_is_reused_longer():
    """As in the first half of a run with Karras' timesteps."""
    for rate in (0.0, 5e-324, 0.002):
        for tolerance in (0.3, 1e9):
            assert kinds_of(Adaptive(tolerance), 25, [rate] * 25) == "ww" + "r" * 11 + "w" + "r" * 10 + "w"
    assert kinds_of(Adaptive(0.3, max_gap=2), 25, [0.002] * 25).startswith("ww" + "r" * 5 + "w")
    assert kinds_of(Adaptive(0.3), 25, [0.007] * 25).startswith("wwrrrw")  # 0.3 / 12 is 4 times the rate
    assert kinds_of(Adaptive(1e9), 25, [0.007] * 25).startswith("wwrrrrrrrw")  # and 0.07 ten times: 3 equal parts
    for tolerance in (0.3, 1e9):
        assert kinds_of(Adaptive(tolerance), 25, [0.02] * 25).startswith("wwrrrw")
    assert kinds_of(Adaptive(0.02), 25, [0.003] * 25).startswith("wwrrrw")
    assert kinds_of(Adaptive(0.3), 9, [0.0] * 9) == "wwrrrrrrw"


def test_a_rate_that_grows_is_expected_to_go_on_growing():
    """As under Karras' timesteps, where the rate doubles every few steps of the second half."""
    growing = [0.02 * 1.12**n for n in range(24)]
    found = kinds_of(Adaptive(0.3), 25, growing)
    computed = [step for step, kind in enumerate(found) if kind == "w"]
    changes = [sum(growing[a:b]) for a, b in itertools.pairwise(computed) if b - a > 1]
    assert len(changes) >= 3 and max(changes) <= 0.5 * 0.3  # only that much of the tolerance is used
    # Of twice the steps, which grow half as fast, more of the tolerance is used.
    finer = [rate / 2 for rate in growing for _ in range(2)]
    assert kinds_of(Adaptive(0.3 * 2**0.75), 50, finer).count("w") == 20  # 22 with half of it
    # One that falls is not.
    falling = growing[::-1]
    assert kinds_of(Adaptive(0.3), 25, falling) == kinds_of(Forgetful(0.3), 25, falling)
    assert kinds_of(Adaptive(0.3), 25, [0.0, 5e-324, 1e-300, *[1e-12] * 22]).startswith("wwrrr")
    tiny = Progress(3, 5000, dict.fromkeys(range(3), "whole"), lambda: 5e-322, {1: 1e-323, 2: 5e-322})
    assert Adaptive(1e9, max_gap=5000).kind(tiny) == "reused"  # no overflow


def test_what_changes_faster_than_the_tolerance_is_not_pruned():
    changes = [0.2] * 12 + [0.35] * 6 + [0.2] * 6  # too fast to be reused, all of them
    found = kinds_of(Adaptive(0.3, pruned_from=0.3), 25, changes)
    assert found[8:13] == "pwpwp" and found[13:19] == "wwwwww" and found[20:] == "pwpwp"
    every_second = Adaptive(0.3, pruned_from=0.3, max_gap=1).planned(25)
    assert every_second == ["whole"] * 8 + ["pruned", "whole"] * 8 + ["pruned"]


class Forgetful(Adaptive):
    """Goes by the last rate alone."""

    def kind(self, progress):
        return super().kind(dataclasses.replace(progress, rates={}))


def test_an_adaptive_schedule_computes_the_last_step_and_keeps_to_its_gaps():
    """Multistep solvers end on it: under DPM++ 2M colours are wrong where the last three steps reuse features."""
    for total in range(1, 40):
        for max_gap in (1, 3, 4, 7):
            found = kinds_of(Adaptive(0.3, max_gap=max_gap), total, CHANGES + [0.06] * 20)
            assert found[-1] == "w" and "r" * (max_gap + max_gap // 4) not in found
            # What is left of the run is divided evenly: no two computed steps of the end beside each other.
            assert max_gap == 1 or total < 20 or "ww" not in found[9:]


@pytest.mark.parametrize("rate", [math.nan, math.inf])
def test_features_that_are_not_finite_are_not_reused(rate):
    changes = [*CHANGES[:15], rate, *CHANGES[16:]]
    kinds = kinds_of(Adaptive(0.3), 25, changes)
    assert kinds[:17] == kinds_of(Adaptive(0.3), 25, CHANGES)[:17]  # the step that shows it is computed as ever
    assert kinds[16:18] == "ww" and kinds[18:] == "rrrwrrw"
    assert kinds_of(Adaptive(0.3, pruned_from=0), 12, [rate] * 12) == "wwpwpwpwpwpw"
    assert kinds_of(Adaptive(0.3, pruned_from=0), 11, [rate] * 11) == "w" * 11  # too short to prune


def test_fixed_schedules_say_what_they_plan():
    assert Every(3, "pruned").planned(7) == ["pruned", "reused", "reused"] * 2 + ["pruned"]
    assert Listed(("whole", "reused")).planned(5) == ["whole"] * 3 + ["reused"] * 2
    assert atedm.DSAP(0.5).planned(4) == ["light", "light", "pruned", "pruned"]
    assert Adaptive().planned(9) is None


def test_what_does_not_fit_is_named():
    for wrong, message in [
        (lambda: Every(0), "n is 0; expected an integer of at least 1"),
        (lambda: Every(2, "reused"), "computed is 'reused'; expected one of 'whole'"),
        (lambda: atedm.Options(schedule=[]), "schedule is empty"),
        (
            lambda: atedm.Options(schedule=["whole", "half"]),
            r"schedule\[1\] is 'half'; expected one of 'whole', 'light'",
        ),
        (lambda: Adaptive(0), "tolerance is 0; expected a finite number above 0"),
        (lambda: Adaptive(0.3, max_gap=0), "max_gap is 0"),
        (lambda: Adaptive(0.3, min_gap=0), "min_gap is 0; expected an integer of at least 1"),
        (lambda: Adaptive(0.3, max_gap=2, min_gap=3), "min_gap is 3; expected at most max_gap, 2"),
        (lambda: Adaptive(0.3, pruned_from=2), "pruned_from is 2; expected 0 to 1"),
        (lambda: atedm.Options(ranking=None, staleness=None), "ranking is None and staleness is None"),
        (lambda: atedm.Options(ranking=None, recovery="similarity"), "recovery is 'similarity' with ranking=None"),
        (lambda: atedm.Options(recovery="cached", placement="paper"), "placement is 'paper' with recovery='cached'"),
        (lambda: atedm.Options(staleness="age"), "staleness is 'age'; expected one of 'drift', 'steps'"),
    ]:
        with pytest.raises(ValueError, match=message):
            wrong()


def test_schedules_survive_json(tmp_path):
    for schedule in (None, atedm.DSAP(0.2), atedm.Every(3, "pruned"), ["whole", "reused"], Adaptive(0.2, 3, 0.5)):
        options = atedm.Options(schedule=schedule, recovery="cached", staleness="drift", ranking=None)
        options.save(tmp_path / "options.json")
        assert atedm.Options.load(tmp_path / "options.json") == options


def test_a_schedule_of_the_users_own(unet, inputs):
    class LastHalf(atedm.Schedule):
        def kind(self, progress):
            return "whole" if progress.step < progress.total / 2 else "reused"

    atedm.apply(unet, PUBLISHED, schedule=LastHalf())
    with atedm.record(unet, tokens=False) as recording:
        for timestep in timesteps_of(6):
            unet(**{**inputs, "timestep": timestep})
    assert recording.kinds == ["whole"] * 3 + ["reused"] * 3
    with pytest.raises(TypeError, match=r"schedule is .*expected one of DSAP, Every, Adaptive"):
        atedm.Options(schedule=LastHalf()).to_dict()
