"""Cached updates, staleness and reused steps, against an implementation that is slow and obvious."""

import copy
import gc
import math
import weakref

import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, UNet2DConditionModel
from torch._dynamo.testing import CompileCounterWithBackend

import atedm
from atedm.app.models import SDXL_UNET, meta_unet
from atedm.policy.options import PUBLISHED
from atedm.policy.staleness import DRIFT_WIDTH
from tests.helpers.slow_unet import RATIO, SlowUNet


@pytest.fixture
def unet(make_unet):
    """Every level and kind of block, in half the time."""
    return make_unet(layers_per_block=1)


def scheduler_of(steps, kind=EulerDiscreteScheduler):
    scheduler = kind()
    scheduler.set_timesteps(steps)
    return scheduler


def calls_of(inputs, timesteps):
    """The inputs of a picture's calls, which drift from step to step, as far as the UNet's answers matter."""
    generator = torch.Generator().manual_seed(3)
    sample = inputs["sample"]
    for timestep in timesteps:
        sample = sample + 0.3 * torch.randn(sample.shape, generator=generator, dtype=torch.float64).to(sample)
        yield {**inputs, "sample": sample, "timestep": timestep}


def run(unet, inputs, scheduler=None):
    scheduler = scheduler or scheduler_of(7)
    return [unet(**call).sample for call in calls_of(inputs, scheduler.timesteps)]


KINDS = ["whole", "pruned", "reused", "light", "pruned", "reused", "pruned"]
POLICIES = [("self", None), ("self", "drift"), ("self", "steps"), (None, "drift"), (None, "steps")]
CACHED = {"recovery": "cached", "ratio": RATIO, "tolerance": 0, "max_iterations": 5}


@pytest.mark.parametrize(
    ("ranking", "staleness", "scheduler"),
    [
        *((*policy, scheduler_of(len(KINDS))) for policy in POLICIES),
        ("self", "drift", scheduler_of(4, HeunDiscreteScheduler)),
    ],
)
def test_a_picture_equals_the_slow_implementation(make_unet, make_inputs, ranking, staleness, scheduler):
    unet, inputs = make_unet(torch.float64), make_inputs(torch.float64)
    slow = SlowUNet(unet, ranking, staleness)
    timesteps = scheduler.timesteps
    assert len(timesteps) == len(KINDS)  # each call of a second-order step is an entry
    expected = [slow(kind, call) for kind, call in zip(KINDS, calls_of(inputs, timesteps), strict=True)]
    slow.remove()
    atedm.apply(unet, PUBLISHED, schedule=KINDS, ranking=ranking, staleness=staleness, **CACHED)
    with atedm.record(unet) as recording:
        found = run(unet, inputs, scheduler)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert recording.kinds == KINDS == recording.schedule()
    assert recording.memory_bytes > 0


@pytest.mark.parametrize(("ranking", "staleness"), POLICIES)
def test_so_does_one_whose_blocks_are_compiled(unet_to_compile, make_inputs, fresh_compiler, ranking, staleness):
    unet, inputs = unet_to_compile.to(torch.float64), make_inputs(torch.float64)
    kinds = ["whole", "pruned", "reused", "pruned"]
    slow = SlowUNet(unet, ranking, staleness)
    timesteps = scheduler_of(len(kinds)).timesteps
    expected = [slow(kind, call) for kind, call in zip(kinds, calls_of(inputs, timesteps), strict=True)]
    slow.remove()
    atedm.apply(unet, PUBLISHED, schedule=kinds, ranking=ranking, staleness=staleness, **CACHED)
    counter = CompileCounterWithBackend("eager")
    blocks = atedm.pruned_blocks(unet)
    for name in blocks:
        unet.get_submodule(name).compile(fullgraph=True, backend=counter)
    for one, other in zip(run(unet, inputs, scheduler_of(len(kinds))), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert counter.frame_count == 2 * len(blocks)


def test_the_first_call_is_whole_and_equals_the_full_unet_bit_for_bit(unet, inputs):
    full = run(unet, inputs)
    for schedule in (None, atedm.DSAP(1.0), atedm.Every(3), ["reused"]):
        atedm.apply(unet, PUBLISHED, schedule=schedule, recovery="cached", staleness="drift")
        found = run(unet, inputs)
        assert torch.equal(found[0], full[0])
        assert not torch.allclose(found[1], full[1], rtol=1e-3, atol=1e-3)


def test_every_step_whole_is_the_full_unet(unet, inputs):
    full = run(unet, inputs)
    atedm.apply(unet, PUBLISHED, schedule=atedm.Adaptive(tolerance=1e-6))
    assert atedm.pruned_blocks(unet) == []
    assert all(torch.equal(a, b) for a, b in zip(run(unet, inputs), full, strict=True))


def test_unpruned_tokens_are_not_remembered(unet, inputs):
    atedm.apply(unet, PUBLISHED, schedule=atedm.Every(2), recovery="cached", staleness="drift")
    with atedm.record(unet, tokens=False) as recording:
        run(unet, inputs)
    feature = 2 * 4 * inputs["sample"][0, 0].numel() * 16  # of float32: 16 channels enter the last layer
    assert recording.memory_bytes == feature + 4
    assert recording.kinds == ["whole", "reused"] * 3 + ["whole"]


OURS = {"schedule": KINDS, "recovery": "cached", "staleness": "drift"}


def test_pictures_in_turn_and_second_order_steps_have_their_own_memory(unet, make_inputs):
    inputs = [make_inputs(seed=seed) for seed in (1, 2)]
    kinds = [EulerDiscreteScheduler, HeunDiscreteScheduler]
    atedm.apply(unet, PUBLISHED, **OURS)
    alone = [run(unet, inputs[n], scheduler_of(7, kinds[n])) for n in range(2)]
    schedulers = [scheduler_of(7, kind) for kind in kinds]
    calls = [list(calls_of(inputs[n], schedulers[n].timesteps)) for n in range(2)]
    for step in range(13):
        for n in range(2):
            if step < len(calls[n]):
                assert torch.equal(unet(**calls[n][step]).sample, alone[n][step])


def test_tiles_and_halves_of_guidance_are_whole_and_say_so_once(unet, make_inputs, caplog):
    inputs = [make_inputs(seed=seed, batch=1) for seed in (1, 2)]
    full = [unet(**{**inputs[n], "timestep": t}).sample for t in scheduler_of(7).timesteps for n in range(2)]
    atedm.apply(unet, PUBLISHED, **OURS)
    timesteps = scheduler_of(7).timesteps
    found = [unet(**{**inputs[n], "timestep": t}).sample for t in timesteps for n in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(found, full, strict=True))
    assert len([m for m in caplog.messages if "every step is whole" in m]) == 1


def test_where_the_picture_is_unknown_every_step_is_whole(unet, inputs, caplog):
    full = unet(**{**inputs, "timestep": 500}).sample
    atedm.apply(unet, PUBLISHED, **OURS)
    assert all(torch.equal(unet(**{**inputs, "timestep": 500}).sample, full) for _ in range(3))
    assert len([m for m in caplog.messages if "cannot tell which picture a call belongs to" in m]) == 1


def spoiled(calls, row, since):
    """``calls`` with NaN in a row of the batch, from one step on."""
    for step, call in enumerate(calls):
        sample = call["sample"].clone()
        if step >= since:
            sample[row, 0, 0, 0] = math.nan
        yield {**call, "sample": sample}


@pytest.mark.parametrize("ranking", ["self", None])
@pytest.mark.parametrize("since", [0, 3])  # a whole step, which is remembered, or the first that prunes
def test_drift_names_nan(unet, inputs, ranking, since):
    atedm.apply(unet, PUBLISHED, **{**OURS, "schedule": ["whole", "reused", "reused", "pruned"]}, ranking=ranking)
    calls = spoiled(calls_of(inputs, scheduler_of(4).timesteps), 1, since)
    for _ in range(3):
        unet(**next(calls))
    with pytest.raises(atedm.RankedNaN, match=r"blocks\.1\.attentions\.0 ranks NaN .* at step 3") as raised:
        unet(**next(calls))
    assert raised.value.rows == [1]


def test_features_that_are_not_finite_are_computed_and_a_warning_says_so_once(unet, inputs, caplog):
    atedm.apply(unet, PUBLISHED, schedule=atedm.Adaptive(1e9))
    with atedm.record(unet, tokens=False) as recording:
        for call in spoiled(calls_of(inputs, scheduler_of(9).timesteps), 1, 5):
            unet(**call)
    assert recording.kinds == ["whole"] * 2 + ["reused"] * 3 + ["whole"] * 4
    assert [m for m in caplog.messages if "expected finite numbers" in m] == [
        f"{atedm.Adaptive(1e9)!r}: before step 6 the features of the batch change by nan; expected finite numbers: "
        "look at the latents and the prompts, and at the dtype"
    ]


def test_an_adaptive_schedule_that_prunes_names_nan(unet, inputs):
    atedm.apply(unet, PUBLISHED, schedule=atedm.Adaptive(1e9, pruned_from=0))
    calls = spoiled(calls_of(inputs, scheduler_of(12).timesteps), 0, 1)
    for _ in range(2):
        unet(**next(calls))
    with pytest.raises(atedm.RankedNaN, match="ranks NaN in row 0 of the batch, at step 2"):
        unet(**next(calls))


def test_image_to_image_and_a_batch_that_shrinks_begin_whole(unet, make_inputs):
    inputs = make_inputs()
    half = {name: x[:1] if torch.is_tensor(x) else x for name, x in inputs.items()}
    half["added_cond_kwargs"] = {name: x[:1] for name, x in inputs["added_cond_kwargs"].items()}
    timesteps = scheduler_of(7).timesteps
    atedm.apply(unet, PUBLISHED, **OURS)
    with atedm.record(unet, tokens=False) as recording:
        for n, timestep in enumerate(timesteps[2:]):
            last = unet(**{**(inputs if n < 2 else half), "timestep": timestep}).sample
    assert recording.kinds == ["whole", "light", "whole", "reused", "pruned"]
    assert recording.schedule() == ["whole", "whole", *recording.kinds]
    assert last.isfinite().all() and last.shape[0] == 1


def test_an_interrupted_picture_leaves_nothing_to_the_next(unet, make_inputs):
    first, second = make_inputs(seed=1), make_inputs(seed=2)
    atedm.apply(unet, PUBLISHED, **OURS)
    expected = run(unet, second)
    for call in list(calls_of(first, scheduler_of(7).timesteps))[:3]:
        unet(**call)
    hook = unet.mid_block.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        unet(**{**first, "timestep": scheduler_of(7).timesteps[0]})
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(run(unet, second), expected, strict=True))


def test_a_picture_that_begins_late_in_an_interrupted_ones_timesteps_has_nothing_of_it(unet, make_inputs, caplog):
    first, second = make_inputs(seed=1), make_inputs(seed=2)
    atedm.apply(unet, PUBLISHED, **OURS)

    def late(timesteps):
        return [unet(**{**second, "timestep": timestep}).sample for timestep in timesteps[4:]]

    expected, timesteps = late(scheduler_of(7).timesteps), scheduler_of(7).timesteps
    for timestep in timesteps[:3]:
        unet(**{**first, "timestep": timestep})
    assert all(torch.equal(a, b) for a, b in zip(late(timesteps), expected, strict=True))
    assert len([m for m in caplog.messages if "a call skips steps" in m]) == 1


def test_a_run_of_every_second_step_is_known_from_its_second_stride(unet, inputs):
    atedm.apply(unet, PUBLISHED, **OURS)
    with atedm.record(unet, tokens=False) as recording:
        for timestep in scheduler_of(7).timesteps[::2]:
            unet(**{**inputs, "timestep": timestep})
    assert recording.kinds == ["whole", "whole", *KINDS[4::2]]


def test_steps_that_record_gradients_are_not_skipped(unet, inputs):
    atedm.apply(unet, PUBLISHED, **OURS)
    with atedm.record(unet, tokens=False) as recording:
        for n, timestep in enumerate(scheduler_of(7).timesteps):
            sample = inputs["sample"].clone().requires_grad_(n in (2, 3))
            unet(**{**inputs, "sample": sample, "timestep": timestep})
    assert recording.kinds == [*KINDS[:2], "whole", "whole", *KINDS[4:]]


def tensors():
    # Not those that compiling has made, whose sizes are symbols.
    return sum(x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor)


def test_memory_is_freed_with_the_picture_and_grows_with_no_number_of_them(unet, inputs):
    atedm.apply(unet, PUBLISHED, **OURS)
    memory = atedm.unet.installing.calls_of(unet).memory
    run(unet, inputs)
    gc.collect()
    before = tensors()
    for _ in range(12):
        scheduler = scheduler_of(7)
        for call in list(calls_of(inputs, scheduler.timesteps))[:3]:  # broken off
            unet(**call)
        assert memory.nbytes > 0 and len(memory) <= 2
        del call
    unfinished = weakref.ref(memory.picture(scheduler.timesteps.untyped_storage()).slot.feature)
    atedm.remove(unet)
    del memory, scheduler
    gc.collect()
    assert unfinished() is None and tensors() <= before


def test_a_thousand_pictures_leave_nothing(unet, inputs):
    atedm.apply(unet, PUBLISHED, **OURS)
    planner, taken = atedm.unet.installing.calls_of(unet).planner, set()
    for n in range(1000):
        timesteps = scheduler_of(7).timesteps
        for timestep in timesteps if n % 2 else timesteps[:3]:  # every other one is broken off
            planner.ended(planner.call((inputs["sample"], timestep), {}, in_graph=False))
        taken.add((len(planner.pictures.memory), planner.pictures.memory.nbytes))
        del timestep
    # One that is over keeps nothing; one that is not goes with its timesteps.
    assert len(taken) == 2 and max(taken)[0] <= 2
    del timesteps
    assert len(planner.pictures.memory) == planner.pictures.memory.nbytes == 0


def test_copies_and_saved_weights_never_see_it(unet, inputs, tmp_path):
    before = set(unet.state_dict())
    atedm.apply(unet, PUBLISHED, **OURS)
    scheduler = scheduler_of(7)
    for call in list(calls_of(inputs, scheduler.timesteps))[:2]:
        unet(**call)
    assert set(unet.state_dict()) == before
    assert len(atedm.unet.installing.calls_of(copy.deepcopy(unet)).memory) == 0
    unet.save_pretrained(tmp_path)
    saved = UNet2DConditionModel.from_pretrained(tmp_path)
    assert all(torch.equal(weight, unet.state_dict()[name]) for name, weight in saved.state_dict().items())


def test_training_modes_do_not_reach_the_memory(unet, inputs):
    unet.requires_grad_(True)
    atedm.apply(unet, PUBLISHED, **OURS)
    with torch.enable_grad():
        run(unet, inputs)
    scheduler = scheduler_of(7)
    calls = list(calls_of(inputs, scheduler.timesteps))
    with torch.inference_mode():
        first = unet(**calls[0]).sample
    with torch.no_grad():
        assert unet(**calls[1]).sample.isfinite().all() and first.isfinite().all()


def test_what_a_picture_takes_at_sdxl_size():
    """The figures of docs/options.md: 1024², guidance, bf16."""
    unet = meta_unet(SDXL_UNET, torch.bfloat16)
    sample = torch.empty(2, 4, 128, 128, device="meta", dtype=torch.bfloat16)
    sizes = {2: (5, 4096, 640), 3: (6, 1024, 1280)}  # level: its blocks, tokens, channels
    updates = sum(blocks * 2 * tokens * channels * 2 for blocks, tokens, channels in sizes.values())
    drift = sum(blocks * (2 * tokens + channels) * DRIFT_WIDTH * 2 for blocks, tokens, channels in sizes.values())
    feature = 2 * 320 * 128 * 128 * 2 + 4  # and the rate of its change
    for options, expected, shown in (
        ({"schedule": atedm.Adaptive()}, feature, 21),
        ({"schedule": None, "recovery": "cached", "staleness": "drift"}, updates + drift, 84),
        ({"schedule": ["whole", "pruned", "reused"], "recovery": "cached"}, updates + feature, 105),
    ):
        with atedm.applied(unet, PUBLISHED, **options):
            planner = atedm.unet.installing.calls_of(unet).planner
            with planner.all_of_kind("pruned", sample):
                assert planner.forced.slot.nbytes == expected
        assert round(expected / 1e6) == shown
