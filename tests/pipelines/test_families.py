"""UNets whose levels are others than SDXL's base: its refiner, Stable Diffusion 1.5 and 2.1."""

import copy

import diffusers
import pytest
import torch

import atedm
from atedm.policy.options import PUBLISHED
from tests.helpers.running import check, latents

FAMILIES = {
    "1.5": {"attention_head_dim": 2},
    "2.1": {"attention_head_dim": (1, 2, 4, 4), "use_linear_projection": True, "upcast_attention": True},
}


@pytest.mark.parametrize("version", FAMILIES)
def test_stable_diffusion_before_xl(base, version):
    """Attention at levels 1 to 3 and in the middle, one layer a block; convolutions as projections in 1.5."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 32, 32),
        norm_num_groups=8,
        cross_attention_dim=base.text_encoder.config.hidden_size,
        layers_per_block=1,
        **FAMILIES[version],
    )
    pipe = diffusers.StableDiffusionPipeline(
        base.vae,
        base.text_encoder,
        base.tokenizer,
        unet.eval().requires_grad_(False),
        copy.deepcopy(base.scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    _, _, recording = check(pipe)
    assert {ranked.level for ranked in recording.ranked} == {1, 2, 3, 4}
    with pytest.raises(ValueError, match=r"no attention block is left to prune.*more than one layer"):
        atedm.apply(pipe, PUBLISHED, placement="paper")


def test_the_refiner(base, picture):
    """Four levels, of which 2 and 3 and the middle have attention; one text encoder; five time ids."""
    torch.manual_seed(0)
    text, id_width = base.text_encoder_2.config, 8
    unet = diffusers.UNet2DConditionModel(
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32, 64, 64),
        attention_head_dim=(1, 2, 4, 4),
        transformer_layers_per_block=2,
        norm_num_groups=8,
        cross_attention_dim=text.hidden_size,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=id_width,
        projection_class_embeddings_input_dim=5 * id_width + text.projection_dim,
    )
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(
        base.vae,
        None,
        base.text_encoder_2,
        None,
        base.tokenizer_2,
        unet.eval().requires_grad_(False),
        copy.deepcopy(base.scheduler),
        requires_aesthetics_score=True,
    )
    pipe.set_progress_bar_config(disable=True)
    _, _, recording = check(pipe, lambda: latents(pipe, image=picture, strength=0.5))
    assert recording.calls == [2, 3]
    assert [level for _, level, _ in recording.blocks] == [2, 2, 3, 3, 4, 3, 3, 3, 2, 2, 2]
    assert {ranked.level for ranked in recording.ranked} == {2, 3, 4}
