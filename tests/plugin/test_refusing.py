"""What cannot be pruned is refused, by its name and with the reason."""

import types

import pytest
import torch
from diffusers import AutoencoderKL, PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

import atedm
from atedm.policy.options import PUBLISHED


def test_what_is_no_unet_is_refused():
    vae = AutoencoderKL(block_out_channels=(32,))
    with pytest.raises(TypeError, match="AutoencoderKL"):
        atedm.apply(vae, PUBLISHED)
    with pytest.raises(TypeError, match="UNet2DConditionModel"):
        atedm.apply(types.SimpleNamespace(transformer=vae), PUBLISHED)
    with pytest.raises(TypeError, match="UNet2DConditionModel"):
        atedm.remove(vae)


def test_a_unet_without_attention_is_refused(make_unet):
    unet = make_unet(
        down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3, mid_block_type="UNetMidBlock2D"
    )
    with pytest.raises(ValueError, match="no attention block"):
        atedm.apply(unet, PUBLISHED)


def test_paper_placement_needs_a_second_layer(make_unet):
    unet = make_unet(transformer_layers_per_block=1)
    with pytest.raises(ValueError, match="more than one layer"):
        atedm.apply(unet, PUBLISHED, placement="paper")
    assert len(atedm.pruned_blocks(atedm.apply(unet, PUBLISHED, placement="early"))) == 11


def test_unsupported_modules_are_named(unet, inputs):
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1

    class Foreign:
        def __call__(self, *args, **kwargs):
            raise NotImplementedError

    plain = attention.processor
    attention.processor = Foreign()
    with pytest.raises(ValueError, match=r"mid_block.attentions.0 cannot be pruned: .* runs through Foreign"):
        atedm.apply(unet, PUBLISHED)
    attention.processor = plain
    atedm.apply(unet, PUBLISHED, schedule=None)
    attention.processor = Foreign()
    with pytest.raises(ValueError, match=r"mid_block.attentions.0 can no longer be pruned: .*Foreign"):
        unet(**inputs)


def test_heads_that_no_kernel_serves_are_refused_when_applied(make_unet):
    unet = make_unet(attention_head_dim=(1, 2, 16))
    with pytest.raises(ValueError, match="its heads have 4 dimensions; expected 8 to 256"):
        atedm.apply(unet, PUBLISHED)
    assert atedm.pruned_blocks(atedm.apply(unet, PUBLISHED, levels=(2,)))


def test_a_ratio_of_zero_goes_where_nothing_could_be_ranked(make_unet, inputs):
    unet = make_unet(attention_head_dim=(1, 2, 16))
    full = unet(**inputs).sample
    assert len(atedm.pruned_blocks(atedm.apply(unet, PUBLISHED, ratio=0))) == 11
    assert torch.equal(unet(**inputs).sample, full)
    with pytest.raises(ValueError, match="its heads have 4 dimensions"):
        atedm.apply(unet, PUBLISHED, ratio=0.5)
    assert torch.equal(unet(**inputs).sample, full)


def test_a_forward_replaced_by_another_tool_is_refused(unet):
    block = unet.mid_block.attentions[0]
    block.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="forward has been replaced"):
        atedm.apply(unet, PUBLISHED)


def first_attention(unet):
    return unet.mid_block.attentions[0].transformer_blocks[0].attn1


def replace_forward(unet):
    first_attention(unet).forward = lambda *args, **kwargs: 0


def hook_layer(unet):
    unet.mid_block.attentions[0].transformer_blocks[0].register_forward_hook(lambda *_: None)


def hook_attention(unet):
    first_attention(unet).register_forward_pre_hook(lambda *_: None)


def broadcast_attention(unet):
    identifiers = {"spatial_attention_block_identifiers": ("transformer_blocks",)}
    config = PyramidAttentionBroadcastConfig(2, current_timestep_callback=lambda: 500, **identifiers)
    apply_pyramid_attention_broadcast(unet, config)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replace_forward, "the self-attention there has been replaced by another tool"),
        (hook_layer, "its first layer has forward hooks"),
        (hook_attention, "its first self-attention has forward hooks"),
        (broadcast_attention, "diffusers' hook 'pyramid_attention_broadcast', which may count on all tokens"),
    ],
)
def test_what_pruning_would_pass_by_is_refused(unet, change, reason):
    change(unet)
    with pytest.raises(ValueError, match=reason):
        atedm.apply(unet, PUBLISHED)
    assert atedm.pruned_blocks(unet) == []


def test_hooks_that_come_later_are_refused_too(unet, inputs):
    atedm.apply(unet, PUBLISHED, schedule=None)
    hook_layer(unet)
    with pytest.raises(ValueError, match="can no longer be pruned: its first layer has forward hooks"):
        unet(**inputs)


def test_always_light_leaves_nothing_of_blocks_that_are_whole_then(make_unet):
    unet = make_unet(layers_per_block=1, mid_block_type=None)
    light = {"schedule": atedm.DSAP(1.0)}
    assert sorted(atedm.pruned_blocks(atedm.apply(unet, PUBLISHED, **light))) == [
        "up_blocks.0.attentions.0",
        "up_blocks.1.attentions.0",
    ]
    unet.up_blocks[0].attentions = unet.up_blocks[0].attentions[1:]
    unet.up_blocks[1].attentions = unet.up_blocks[1].attentions[1:]
    with pytest.raises(ValueError, match=r"no attention block is left to prune with .*DSAP\(fraction=1.0\)"):
        atedm.apply(unet, PUBLISHED, **light)


@pytest.mark.parametrize("shape", [(2, 1, 5), (1, 1, 96), (2, 96)])
def test_a_ranking_of_the_wrong_shape_is_refused(unet, inputs, shape):
    atedm.apply(unet, PUBLISHED, schedule=None, levels=(2,), ranking=lambda q, k, lse: torch.rand(shape))
    with pytest.raises(ValueError, match="ranking returned"):
        unet(**inputs)


@pytest.mark.parametrize("extra", [{"attention_mask": torch.ones(2, 96)}, {"cross_attention_kwargs": {"ip_masks": 1}}])
def test_arguments_that_name_positions_are_refused(unet, inputs, extra):
    atedm.apply(unet, PUBLISHED, schedule=None)
    with pytest.raises(ValueError, match=next(iter(extra))):
        unet(**inputs, **extra)


def test_gligen_is_refused(make_unet):
    with pytest.raises(ValueError, match=r"down_blocks\.1\.attentions\.0 cannot be pruned: .*GLIGEN"):
        atedm.apply(make_unet(attention_type="gated"), PUBLISHED)
