"""Cached updates and reused steps in a compiled UNet: one graph a kind, buffers that stay where they are."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import atedm
from atedm.policy.options import PUBLISHED
from atedm.unet.graphs import graphs_per_size
from atedm.unet.installing import calls_of
from tests.helpers.running import timesteps_of
from tests.helpers.slow_unet import RATIO, SlowUNet

ALL_KINDS = ["whole", "light", "pruned", "reused", "pruned", "reused"]
KINDS = ["whole", "pruned", "pruned", "reused", "pruned", "reused"]
OURS = {"schedule": KINDS, "recovery": "cached", "staleness": "drift", "ratio": 0.6}


pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture
def unet(unet_to_compile):
    return unet_to_compile


def calls(inputs, timesteps):
    return [{**inputs, "sample": inputs["sample"] * (1 - 0.05 * n), "timestep": t} for n, t in enumerate(timesteps)]


@torch.no_grad()
def run(unet, inputs, timesteps=None):
    timesteps = timesteps_of(len(KINDS)) if timesteps is None else timesteps
    return [unet(**call).sample.clone() for call in calls(inputs, timesteps)]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        tolerance = 1e-5 if one.dtype == torch.float32 else 1e-9
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_a_kind_is_a_graph_and_the_next_picture_takes_no_more(unet, make_inputs, compile_whole):
    # Once every kind, with fake tensors through every op; the other ways differ by what tells a graph the kind.
    is_first = compile_whole.way == "torch.compile"
    counter = CompileCounterWithBackend("aot_eager" if is_first else "eager")
    unet = unet.to(torch.float64)
    first, second = (make_inputs(torch.float64, seed=seed) for seed in (1, 2))
    kinds = ALL_KINDS if is_first else ["whole", "pruned"] * 3
    options = {**OURS, "schedule": kinds, "ratio": RATIO, "tolerance": 0, "max_iterations": 5}
    with torch.no_grad():
        slow = SlowUNet(unet)
        expected = [
            [slow(kind, call) for kind, call in zip(kinds, calls(inputs, timesteps_of(6)), strict=True)]
            for inputs in (first, second)
        ]
        slow.remove()
        compiled = compile_whole(unet, counter)
        atedm.apply(compiled, PUBLISHED, **options)
        assert_same(run(compiled, first), expected[0])
        slot = next(iter(calls_of(unet).memory._of_graphs.values()))
        places = [x.data_ptr() for x in slot.tensors()]
        assert counter.frame_count == graphs_per_size(replace(PUBLISHED, **options)) == len(set(kinds))
        # A call that raises tells the next one nothing, compiled or not.
        with pytest.raises(Exception, match="channels"):
            compiled(**{**first, "timestep": timesteps_of(6)[0], "sample": first["sample"][:, :3]})
        if compile_whole.way == "torch.compile":
            assert_same(run(unet, first), expected[0])
        assert_same(run(compiled, second), expected[1])
        assert counter.frame_count == len(set(kinds))
        assert places == [x.data_ptr() for x in slot.tensors()]


def test_adaptive_steps_are_those_of_the_uncompiled_unet(unet, inputs):
    schedule = atedm.Adaptive(tolerance=0.5, pruned_from=0.4)
    options = {**OURS, "schedule": schedule}
    timesteps = timesteps_of(12)
    with torch.no_grad():
        atedm.apply(unet, PUBLISHED, **options)
        with atedm.record(unet, tokens=False) as eager:
            expected = run(unet, inputs, timesteps)
        unet.compile(fullgraph=True, backend="eager")
        atedm.apply(unet, PUBLISHED, **options)
        with atedm.record(unet, tokens=False) as recording:
            assert_same(run(unet, inputs, timesteps_of(12)), expected)
    assert recording.kinds == eager.kinds and len(set(eager.kinds)) == 3


def test_a_second_live_picture_is_whole_and_that_is_said_once(unet, make_inputs, caplog):
    first, second = make_inputs(seed=1), make_inputs(seed=2)
    with torch.no_grad():
        full = run(unet, second)
        atedm.apply(unet, PUBLISHED, **OURS)
        expected = run(unet, first)
        unet.compile(fullgraph=True, backend="eager")
        atedm.apply(unet, PUBLISHED, **OURS)
        pictures = [(first, timesteps_of(6)), (second, timesteps_of(6))]
        found = [[], []]
        for step in range(6):
            for n, (inputs, timesteps) in enumerate(pictures):
                found[n].append(unet(**calls(inputs, timesteps)[step]).sample)
        assert_same(found[0], expected)
        assert_same(found[1], full)
        assert len([m for m in caplog.messages if "pictures take turns on a compiled UNet" in m]) == 1
        # The first has come to its end, so the next one has the buffers.
        assert_same(run(unet, first), expected)


def test_what_is_remembered_outlives_the_memory_of_a_graph(unet, inputs):
    """As CUDA graphs do, each graph writes over what the one before gave."""
    given = []

    def overwriting(graph, _):
        def call(*arguments):
            for tensor in given:
                tensor.zero_()
            outputs = graph(*arguments)
            given[:] = [x for x in outputs if isinstance(x, torch.Tensor) and all(x is not a for a in arguments)]
            return outputs

        return call

    with torch.no_grad():
        atedm.apply(unet, PUBLISHED, **OURS, rank_every=2)
        expected = run(unet, inputs)
        unet.compile(fullgraph=True, backend=overwriting)
        atedm.apply(unet, PUBLISHED, **OURS, rank_every=2)
        assert_same(run(unet, inputs), expected)


def test_compiled_layers_leave_the_memory_to_their_blocks(unet, inputs):
    counter = CompileCounterWithBackend("eager")
    with torch.no_grad():
        atedm.apply(unet, PUBLISHED, **OURS)
        expected = run(unet, inputs)
        unet.compile_repeated_blocks(fullgraph=True, backend=counter)
        assert_same(run(unet, inputs), expected)
        graphs = counter.frame_count
        assert_same(run(unet, inputs), expected)
        assert counter.frame_count == graphs
