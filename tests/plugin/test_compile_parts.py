"""Stages and attention blocks that are compiled one by one: they follow the kind of the step, and remember."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import atedm
from atedm.policy.options import PUBLISHED
from tests.helpers.running import timesteps_of

KINDS = ["whole", "pruned", "reused", "pruned", "reused"]
CHOICES = {"schedule": None, "ratio": 0.6, "rank_every": 3, "warm_start": True}
REMEMBERED = {"schedule": KINDS, "recovery": "cached", "staleness": "drift", "ratio": 0.6}


@pytest.fixture(autouse=True)
def all_graphs(fresh_compiler):
    with torch._dynamo.config.patch(recompile_limit=100):
        yield


@pytest.fixture
def unet(unet_to_compile):
    return unet_to_compile


@pytest.fixture
def counter():
    return CompileCounterWithBackend("eager")


def call(unet, inputs, timestep, step):
    return unet(**{**inputs, "sample": inputs["sample"] * (1 - 0.05 * step), "timestep": timestep}).sample.clone()


@torch.no_grad()
def run(unet, inputs, timesteps=None):
    timesteps = timesteps_of(len(KINDS)) if timesteps is None else timesteps
    return [call(unet, inputs, t, n) for n, t in enumerate(timesteps)]


def compile_blocks(unet, backend="eager", number=None):
    for name in atedm.pruned_blocks(unet)[:number]:
        unet.get_submodule(name).compile(backend=backend)


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def graphs_said(caplog):
    (message,) = [message for message in caplog.messages if "recompile_limit" in message]
    return int(message.split("need up to ")[1].split()[0])


@pytest.mark.parametrize("part", ["stages", "blocks"])
def test_they_follow_the_kind_and_the_limit_that_they_need_is_said(unet, make_inputs, part, counter, caplog):
    first, second = make_inputs(seed=1), make_inputs(seed=2)
    atedm.apply(unet, PUBLISHED, **REMEMBERED)
    expected = [run(unet, inputs) for inputs in (first, second)]
    if part == "blocks":
        compile_blocks(unet, counter)
    else:  # in either way
        for module in unet.down_blocks:
            module.compile(backend=counter)
        for n, module in enumerate(unet.up_blocks):
            unet.up_blocks[n] = torch.compile(module, backend=counter)
    with torch._dynamo.config.patch(recompile_limit=5):  # torch's is 8, and SDXL has 11 blocks
        run(unet, first, timesteps_of(9)[:1])
    assert_same(run(unet, first), expected[0])
    graphs = counter.frame_count
    assert_same(run(unet, second), expected[1])
    assert counter.frame_count == graphs  # they read the buffers of the picture before
    # Three blocks, which two kinds of step run; three stages with one function, which all run, and the last one's own.
    # One more each for a picture of which nothing is remembered.
    assert graphs_said(caplog) == {"blocks": 6 + 3, "stages": 9 + 3}[part]
    assert graphs == {"blocks": 6, "stages": 9 + 3}[part]


def test_stages_of_which_none_is_reused_remember_too(unet, make_inputs, counter):
    options = {**REMEMBERED, "schedule": ["whole", "pruned", "pruned", "pruned", "whole"]}
    first, second = make_inputs(seed=1), make_inputs(seed=2)
    atedm.apply(unet, PUBLISHED, **options)
    expected = [run(unet, inputs) for inputs in (first, second)]
    unet.down_blocks[1].compile(backend=counter)
    assert_same(run(unet, first), expected[0])
    graphs = counter.frame_count
    assert_same(run(unet, second), expected[1])
    assert counter.frame_count == graphs


def test_a_middle_that_is_wrapped_before_or_after_apply(unet_with_a_middle, inputs):
    unet = unet_with_a_middle
    atedm.apply(unet, PUBLISHED, **REMEMBERED)
    expected = run(unet, inputs)
    own = unet.mid_block
    unet.mid_block = torch.compile(own, backend="eager")
    assert_same(run(unet, inputs), expected)
    atedm.apply(unet, PUBLISHED, **REMEMBERED)
    assert_same(run(unet, inputs), expected)
    atedm.remove(unet)
    assert "forward" not in vars(own) and unet.mid_block._orig_mod is own
    unet.mid_block.attentions[0] = torch.compile(own.attentions[0], backend="eager")
    atedm.apply(unet, PUBLISHED, **REMEMBERED)
    assert_same(run(unet, inputs), expected)


def test_constant_settings_are_counted_too(unet, inputs, caplog):
    atedm.apply(unet, PUBLISHED, schedule=None)
    compile_blocks(unet)
    with torch._dynamo.config.patch(recompile_limit=2):
        unet(**inputs)
    assert graphs_said(caplog) == 3


@pytest.mark.parametrize("options", [CHOICES, REMEMBERED], ids=["choices", "remembered"])
def test_a_second_live_picture_is_not_the_first(unet, make_inputs, options, caplog):
    pictures = [(make_inputs(seed=seed), timesteps_of(len(KINDS))) for seed in (1, 2)]
    instead = {"schedule": None} if options is CHOICES else {"ratio": 0.0, "schedule": None}
    with atedm.applied(unet, PUBLISHED, **{"ratio": 0.6, **instead}):
        other = run(unet, pictures[1][0])
    atedm.apply(unet, PUBLISHED, **options)
    expected = run(unet, pictures[0][0])
    compile_blocks(unet, number=1)
    found = [[], []]
    with torch.no_grad():
        for step in range(len(KINDS)):
            for n, (inputs, timesteps) in enumerate(pictures):
                found[n].append(call(unet, inputs, timesteps[step], step))
    assert_same(found[0], expected)
    assert_same(found[1], other)
    assert len([m for m in caplog.messages if "pictures take turns on a compiled UNet" in m]) == 1


@pytest.mark.parametrize(("options", "step"), [(CHOICES, 0), (REMEMBERED, 1)], ids=["choices", "remembered"])
def test_a_picture_that_breaks_off_leaves_nothing_to_the_next(unet, make_inputs, options, step):
    first, second = make_inputs(seed=1), make_inputs(seed=2)
    atedm.apply(unet, PUBLISHED, **options)
    expected = run(unet, second)
    compile_blocks(unet, number=1)
    run(unet, first)
    timesteps = timesteps_of(len(KINDS))

    def stop(*_):
        raise OSError("stop")

    with torch.no_grad():
        for n in range(step):
            call(unet, first, timesteps[n], n)
        hook = unet.up_blocks[-1].register_forward_pre_hook(stop)
        with pytest.raises(OSError, match="stop"):
            call(unet, first, timesteps[step], step)
        hook.remove()
    # The broken one's timesteps are alive, as a traceback keeps them.
    assert_same(run(unet, second), expected)
    # And its own may serve another try.
    assert_same(run(unet, second, timesteps), expected)


def test_a_second_thread_is_refused(unet, make_inputs):
    inside, over = threading.Event(), threading.Event()
    inputs = [make_inputs(seed=seed) for seed in (1, 2)]
    atedm.apply(unet, PUBLISHED, **REMEMBERED)
    expected = run(unet, inputs[0])
    compile_blocks(unet, number=1)

    def wait(*_):
        inside.set()
        over.wait(60)

    hook = unet.conv_out.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(run, unet, inputs[0])
        assert inside.wait(60)
        with pytest.raises(RuntimeError, match="two threads call a compiled UNet"):
            run(unet, inputs[1])
        over.set()
        assert_same(first.result(), expected)
    hook.remove()
    assert_same(run(unet, inputs[0]), expected)
