"""What other tools take out, share, or exchange under a name of diffusers': seen, and nothing is locked."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

import atedm
from atedm.policy.options import PUBLISHED
from tests.helpers.running import timesteps_of


@pytest.fixture
def unet(make_unet):
    """Every level and kind of block, in half the time."""
    return make_unet(layers_per_block=1)


def test_another_call_in_a_class_of_processors_is_refused_in_either_order(unet, inputs, monkeypatch):
    atedm.apply(unet, PUBLISHED, schedule=None)
    unet(**inputs)
    own = AttnProcessor2_0.__call__
    monkeypatch.setattr(AttnProcessor2_0, "__call__", lambda *args, **kwargs: own(*args, **kwargs))
    with pytest.raises(ValueError, match=r"can no longer be pruned: .* runs through AttnProcessor2_0 of another tool"):
        unet(**inputs)
    atedm.remove(unet)
    with pytest.raises(ValueError, match=r"cannot be pruned: .* runs through AttnProcessor2_0 of another tool"):
        atedm.apply(unet, PUBLISHED, schedule=None)


@pytest.mark.parametrize("after", [atedm.remove, lambda unet: atedm.apply(unet, "quality")], ids=["remove", "apply"])
def test_forwards_that_another_tool_puts_back_are_said_and_lock_nothing(unet, inputs, after):
    full = unet(**inputs).sample
    atedm.apply(unet, PUBLISHED, schedule=None)
    blocks = [unet.get_submodule(name) for name in atedm.pruned_blocks(unet)]
    for block in blocks[:-1]:
        del block.forward
    with pytest.raises(ValueError, match="can no longer be pruned: its forward is that of its class again"):
        unet(**inputs)
    after(unet)
    atedm.remove(unet)
    assert torch.equal(unet(**inputs).sample, full)
    assert not any("forward" in vars(module) for module in unet.modules())


def test_unets_that_share_a_part_are_undone_in_turn(make_unet, unet, inputs):
    other = make_unet()
    other.mid_block = unet.mid_block
    full = unet(**inputs).sample
    atedm.apply(unet, PUBLISHED, schedule=None)
    atedm.apply(other, PUBLISHED, schedule=None)
    with pytest.raises(ValueError, match="another UNet shares it"):
        unet(**inputs)
    with pytest.raises(RuntimeError, match="undo that first"):
        atedm.remove(unet)
    atedm.remove(other)
    assert not torch.equal(unet(**inputs).sample, full)
    atedm.remove(unet)
    assert torch.equal(unet(**inputs).sample, full)


@pytest.mark.parametrize("first", ["quality", PUBLISHED])
def test_a_block_that_another_unet_shares_and_prunes_is_refused(make_unet, unet, inputs, first):
    """Also by a UNet that only leaves it out of reused steps."""
    other = make_unet()
    other.mid_block = unet.mid_block
    atedm.apply(unet, first)
    expected = unet(**inputs).sample
    with (
        atedm.applied(other, PUBLISHED, schedule=None),
        pytest.raises(ValueError, match="another UNet shares it"),
    ):
        unet(**inputs)
    assert torch.equal(unet(**inputs).sample, expected)


@pytest.mark.parametrize(("processor", "is_read"), [(AttnProcessor, True), (AttnProcessor2_0, False)])
def test_the_scale_of_an_attention_is_read_where_its_processor_reads_it(unet, inputs, processor, is_read):
    unet.set_attn_processor(processor())
    atedm.apply(unet, PUBLISHED, schedule=None)
    plain = unet(**inputs).sample
    firsts = [unet.get_submodule(name).transformer_blocks[0].attn1 for name in atedm.pruned_blocks(unet)]
    for attention in firsts:
        attention.scale *= 3
    scaled = unet(**inputs).sample
    assert torch.equal(scaled, plain) is not is_read
    for attention in firsts if is_read else ():
        attention.scale /= 3
        attention.to_q.weight.data *= 3
    torch.testing.assert_close(scaled, unet(**inputs).sample)


METHOD = "_get_output_for_continuous_inputs"


def test_an_output_that_a_class_brings_along_is_refused(unet, monkeypatch):
    """It would run in whole calls and not in pruned ones."""
    block = unet.mid_block.attentions[0]
    own = getattr(type(block), METHOD)
    monkeypatch.setattr(type(block), METHOD, lambda *args, **kwargs: own(*args, **kwargs))
    with pytest.raises(
        ValueError, match=f"cannot be pruned: the method {METHOD} of its class .* is not diffusers' own"
    ):
        atedm.apply(unet, PUBLISHED, schedule=None)


def replace_on(unet, layer, name, monkeypatch):
    attention = unet.mid_block.attentions[0].transformer_blocks[layer].get_submodule(name)
    monkeypatch.setattr(attention, "get_attention_scores", lambda *args: None)


def replace_in_class(unet, layer, name, monkeypatch):
    monkeypatch.setattr(Attention, "get_attention_scores", lambda *args: None)


@pytest.mark.parametrize(
    ("replace", "layer", "name"),
    [(replace_on, 0, "attn1"), (replace_on, 0, "attn2"), (replace_on, 1, "attn1"), (replace_in_class, 0, "attn1")],
)
def test_a_replaced_method_of_any_attention_is_refused_in_either_order(unet, inputs, monkeypatch, replace, layer, name):
    atedm.apply(unet, PUBLISHED, schedule=None)
    unet(**inputs)
    replace(unet, layer, name, monkeypatch)
    with pytest.raises(ValueError, match=r"can no longer be pruned: .*get_attention_scores"):
        unet(**inputs)
    atedm.remove(unet)
    with pytest.raises(ValueError, match=r"cannot be pruned: .*get_attention_scores"):
        atedm.apply(unet, PUBLISHED, schedule=None)


@pytest.mark.parametrize("where", ["", "mid_block", "down_blocks.1"])
def test_accelerates_hooks_may_come_after_apply(unet, inputs, where):
    """On every module, as sequential offload puts them, or on a stage alone."""

    def run():
        return [unet(**{**inputs, "timestep": t}).sample for t in timesteps_of(4)]

    full = unet(**inputs).sample
    atedm.apply(unet, "quality", schedule=atedm.Every(2))
    expected = run()
    for name, module in unet.named_modules():
        if name and (not where or name == where):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
    atedm.remove(unet)
    assert torch.equal(unet(**inputs).sample, full)


def test_a_feed_forward_that_torch_compile_has_wrapped_is_diffusers_own(unet, inputs):
    atedm.apply(unet, PUBLISHED, schedule=None)
    expected = unet(**inputs).sample
    layer = unet.mid_block.attentions[0].transformer_blocks[1]
    layer.ff = torch.compile(layer.ff, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(unet(**inputs).sample, expected)
        atedm.apply(unet, PUBLISHED, schedule=None)
