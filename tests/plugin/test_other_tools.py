"""What other tools take out, share, or exchange under a name of diffusers': seen, and nothing is locked."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

import atedm
from atedm.policy.options import PUBLISHED


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
    with pytest.raises(RuntimeError, match="undo that first"):
        atedm.remove(unet)
    atedm.remove(other)
    assert not torch.equal(unet(**inputs).sample, full)
    atedm.remove(unet)
    assert torch.equal(unet(**inputs).sample, full)


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
