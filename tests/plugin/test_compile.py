"""torch.compile on a pruned UNet: one graph, the same result."""

import pytest
import torch

import atedm


@pytest.mark.parametrize("placement", ["early", "paper"])
def test_a_pruned_unet_is_one_graph(unet, inputs, placement):
    atedm.apply(unet, schedule=None, placement=placement)
    expected = unet(**inputs).sample
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).sample, expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_a_constant_light_phase_is_compiled_as_such(unet, inputs):
    atedm.apply(unet, schedule=atedm.DSAP(1.0))
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")(**inputs).sample  # before any eager call
    torch.testing.assert_close(compiled, unet(**inputs).sample, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_a_schedule_that_cannot_be_followed_is_refused(unet, inputs):
    atedm.apply(unet)
    with pytest.raises(Exception, match="expected schedule=None, regional compilation"):
        torch.compile(unet, fullgraph=True, backend="aot_eager")(**inputs)
    torch._dynamo.reset()


def test_a_schedule_is_followed_across_a_graph_break(unet, inputs):
    atedm.apply(unet)
    expected = [unet(**{**inputs, "timestep": t}).sample for t in (999, 1)]
    compiled = torch.compile(unet, backend="aot_eager")
    for timestep, sample in zip((999, 1), expected, strict=True):
        torch.testing.assert_close(compiled(**{**inputs, "timestep": timestep}).sample, sample, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_regional_compilation_follows_the_schedule(unet, inputs):
    atedm.apply(unet)
    expected = [unet(**{**inputs, "timestep": t}).sample for t in (999, 1)]
    unet.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for timestep, sample in zip((999, 1), expected, strict=True):
        torch.testing.assert_close(unet(**{**inputs, "timestep": timestep}).sample, sample, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
