"""torch.compile on a pruned UNet: no graph break, as many graphs as there are phases and sizes, the same result."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch._dynamo.testing import CompileCounterWithBackend

import atedm
from atedm.policy.options import PUBLISHED
from atedm.unet.graphs import graphs_per_size

pytestmark = pytest.mark.usefixtures("fresh_compiler")

NOISE, ALMOST_DONE = 999, 1  # timesteps in DSAP's light phase and after it


@pytest.fixture
def counter():
    return CompileCounterWithBackend("eager")


@pytest.fixture
def unet(unet_to_compile):
    return unet_to_compile


# Where it matters to atedm which of them it is; "unet.forward" is tested with what is remembered.
ways = pytest.mark.parametrize("compile_whole", ["torch.compile", "unet.compile"], indirect=True)


def at(inputs, timestep):
    return {**inputs, "timestep": torch.tensor(float(timestep))}


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


BY_KEYS = {"ranking": "keys", "recovery": "keys", "grid": 2}


@pytest.mark.parametrize("options", [{}, {"placement": "paper"}, BY_KEYS], ids=["early", "paper", "keys"])
def test_without_a_schedule_a_pruned_unet_is_one_graph(unet, inputs, counter, options):
    # In test_capturable.py fake tensors run through every op.
    atedm.apply(unet, PUBLISHED, schedule=None, **options)
    expected = unet(**inputs).sample
    unet.compile(fullgraph=True, backend=counter)
    for timestep in (NOISE, 600, ALMOST_DONE):
        unet(**at(inputs, timestep))
    assert_same(unet(**at(inputs, inputs["timestep"])).sample, expected)
    assert counter.frame_count == 1 == graphs_per_size(replace(PUBLISHED, schedule=None, **options))


def test_a_constant_light_phase_is_compiled_as_such(unet, inputs, counter):
    atedm.apply(unet, PUBLISHED, schedule=atedm.DSAP(1.0))
    compiled = torch.compile(unet, fullgraph=True, backend=counter)(**inputs).sample  # before any eager call
    assert_same(compiled, unet(**inputs).sample)


def test_a_schedule_takes_two_graphs_a_size(unet, inputs, make_inputs, counter):
    atedm.apply(unet, PUBLISHED)
    other = make_inputs(height=24, width=16)
    calls = [(inputs, NOISE), (other, ALMOST_DONE), (inputs, 900), (inputs, ALMOST_DONE)]
    expected = [unet(**at(size, t)).sample for size, t in calls]
    atedm.remove(unet)
    compiled = torch.compile(unet, fullgraph=True, backend=counter)
    assert atedm.apply(compiled, PUBLISHED) is compiled
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        got = [compiled(**at(size, t)).sample for size, t in calls]
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
        assert counter.frame_count == graphs_per_size(PUBLISHED) + 1 == 3
        for t in (ALMOST_DONE, NOISE, 800, 2):
            compiled(**at(inputs, t))
    assert counter.frame_count == 3


def test_regions_take_no_more_graphs_than_kinds_of_layers(unet, inputs, counter):
    atedm.apply(unet, PUBLISHED)
    expected = [unet(**at(inputs, t)).sample for t in (NOISE, ALMOST_DONE)]
    unet.compile_repeated_blocks(fullgraph=True, backend=counter)
    for timestep, sample in zip((NOISE, ALMOST_DONE), expected, strict=True):
        assert_same(unet(**at(inputs, timestep)).sample, sample)
    graphs = counter.frame_count
    for timestep in (NOISE, ALMOST_DONE, 800):
        unet(**at(inputs, timestep))
    assert counter.frame_count == graphs


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor wants a C++ compiler")
def test_regions_through_inductor(unet, inputs):
    """In the mode that uses CUDA graphs on a GPU; on a CPU it is inductor's own code, with strides of its choice."""
    atedm.apply(unet, PUBLISHED, schedule=None)
    with torch.inference_mode():
        expected = unet(**inputs).sample
        unet.compile_repeated_blocks(fullgraph=True, mode="reduce-overhead")
        assert_same(unet(**inputs).sample, expected)


@ways
def test_a_unet_compiled_after_apply_says_what_to_do(unet, inputs, counter, compile_whole):
    atedm.apply(unet, PUBLISHED)
    compiled = compile_whole(unet, counter)
    with pytest.raises(Exception, match=r"expected atedm\.apply once more, now on the compiled UNet"):
        compiled(**at(inputs, NOISE))
    atedm.apply(compiled, PUBLISHED)
    got = compiled(**at(inputs, ALMOST_DONE)).sample
    with torch.compiler.set_stance("force_eager"):
        assert_same(got, unet(**at(inputs, ALMOST_DONE)).sample)


def test_compiling_again_in_place_is_noticed(unet, inputs, counter):
    unet.compile(fullgraph=True, backend=counter)
    atedm.apply(unet, PUBLISHED)
    unet(**at(inputs, NOISE))
    unet.compile(fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"expected atedm\.apply once more"):
        unet(**at(inputs, NOISE))


@ways
def test_applying_the_same_again_takes_no_graph_more_and_removing_gives_the_full_unet_back(
    unet, inputs, counter, compile_whole
):
    full = unet(**inputs).sample
    compiled = compile_whole(unet, counter)
    call = unet._compiled_call_impl
    twice = [{"ratio": 0.5, "schedule": None}, {"ratio": {2: 0.6}, "schedule": None}]
    expected = []
    for cycle in range(10):  # more than torch makes graphs of one function before it gives up
        assert_same(compiled(**inputs).sample, full)
        assert unet._compiled_call_impl is call
        assert not compiled._forward_pre_hooks and not unet._forward_pre_hooks
        with atedm.applied(compiled, PUBLISHED, **twice[0]):
            got = [compiled(**at(inputs, NOISE)).sample]
            with atedm.applied(compiled, PUBLISHED, **twice[1]):
                got.append(compiled(**inputs).sample)
            got.append(compiled(**at(inputs, ALMOST_DONE)).sample)
        assert not any(torch.allclose(one, full) for one in got)
        expected = expected or got
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
        if cycle == 0:
            graphs = counter.frame_count
    assert counter.frame_count == graphs == 3


@pytest.mark.parametrize("part", ["UNet", "blocks"])
def test_settings_that_take_more_graphs_than_torch_keeps_say_what_to_raise(unet, counter, caplog, part):
    atedm.apply(unet, PUBLISHED, ratio=0.1)
    for n in range(10):
        atedm.apply(unet, PUBLISHED, ratio=0.05 * n)  # not compiled: there are no graphs
    for module in [unet] if part == "UNet" else map(unet.get_submodule, atedm.pruned_blocks(unet)):
        module.compile(fullgraph=True, backend=counter)
    # Two phases each; beside those of the UNet the one without pruning. torch counts those of all three blocks as one.
    limit, needed = (8, 9) if part == "UNet" else (18, 24)
    with torch._dynamo.config.patch(recompile_limit=limit):
        for n in (1, 2, 3, 1, 2, 3):
            atedm.apply(unet, PUBLISHED, ratio=0.1 * n)
        assert not caplog.messages
        atedm.apply(unet, PUBLISHED, ratio=0.5)
    assert len(caplog.messages) == 1 and f"need up to {needed} graphs" in caplog.messages[0]
    assert f"recompile_limit to at least {needed}" in caplog.messages[0]


def test_that_nothing_is_pruned_is_said_of_a_graph_too(unet, inputs, counter, caplog):
    unet.compile(fullgraph=True, backend=counter)
    atedm.apply(unet, PUBLISHED, keep_multiple=4096, schedule=None)
    for timestep in (NOISE, ALMOST_DONE):
        unet(**at(inputs, timestep))
    assert len([message for message in caplog.messages if "nothing is pruned there" in message]) == 1


@pytest.mark.parametrize("compile_whole", ["torch.compile", "unet.forward"], indirect=True)
def test_a_recording_sees_every_call_of_a_compiled_unet(unet, inputs, counter, compile_whole):
    compiled = compile_whole(unet, counter)
    atedm.apply(compiled, PUBLISHED)
    compiled(**at(inputs, NOISE))
    with atedm.record(compiled) as recording:
        for timestep in (NOISE, ALMOST_DONE):
            compiled(**at(inputs, timestep))
    blocks = atedm.pruned_blocks(compiled)
    assert {ranked.call for ranked in recording.ranked} == {0, 1}
    assert [ranked.block for ranked in recording.ranked if ranked.call == 1] == blocks


def test_a_recording_of_a_compiled_unet_chooses_as_often(unet, inputs, counter):
    unet.compile(fullgraph=True, backend=counter)
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(6)
    atedm.apply(unet, PUBLISHED, scheduler=scheduler, schedule=None, rank_every=3)
    with atedm.record(unet) as recording:
        for timestep in scheduler.timesteps:
            unet(**{**inputs, "timestep": timestep})
    assert recording.calls == list(range(6))
    assert {ranked.step for ranked in recording.ranked if ranked.iterations is not None} == {0, 3}


def test_a_copy_of_a_compiled_pruned_unet_runs(unet, inputs, counter):
    unet.compile(fullgraph=True, backend=counter)
    atedm.apply(unet, PUBLISHED)
    expected = unet(**at(inputs, ALMOST_DONE)).sample
    twin = copy.deepcopy(unet)
    assert_same(twin(**at(inputs, ALMOST_DONE)).sample, expected)


def steps_of(*values):
    """As a scheduler has them: elements of timesteps that a picture has for itself."""
    return torch.tensor([float(value) for value in values])


def test_a_choice_for_several_steps_takes_a_graph_to_choose_and_one_to_reuse(unet, inputs, counter):
    atedm.apply(unet, PUBLISHED, rank_every=2)
    values = (NOISE, 950, 900, 400, 300, 200, 100, 50, 20)  # three light ones
    expected = [unet(**{**inputs, "timestep": t}).sample for t in steps_of(*values)]
    unet.up_blocks[0].attentions[0].compile(fullgraph=True, backend=counter)  # it prunes in both phases
    for _ in range(2):  # the second image takes no graph more
        for t, sample in zip(steps_of(*values), expected, strict=True):
            assert_same(unet(**{**inputs, "timestep": t}).sample, sample)
        assert counter.frame_count == graphs_per_size(replace(PUBLISHED, rank_every=2)) == 4


def test_a_graph_that_did_not_choose_leaves_no_earlier_pictures_choice(unet, inputs, counter):
    values, mirrored = (NOISE, 950, 900), {**inputs, "sample": -inputs["sample"]}
    atedm.apply(unet, PUBLISHED, schedule=None, rank_every=3)
    first, second, alone = (steps_of(*values) for _ in range(3))
    expected = [unet(**{**mirrored, "timestep": t}).sample for t in alone][1]
    unet.up_blocks[0].attentions[0].compile(fullgraph=True, backend=counter)
    for t in first[:2]:
        unet(**{**inputs, "timestep": t})
    with atedm.record(unet):  # runs uncompiled
        unet(**{**mirrored, "timestep": second[0]})
    got = unet(**{**mirrored, "timestep": second[1]}).sample
    atedm.remove(unet)
    with torch.compiler.set_stance("force_eager"):
        atedm.apply(unet, PUBLISHED, schedule=None)
        fresh = unet(**{**mirrored, "timestep": second[1]}).sample
    assert any(torch.allclose(got, right, rtol=1e-4, atol=1e-4) for right in (expected, fresh))
