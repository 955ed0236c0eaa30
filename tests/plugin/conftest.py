"""A UNet with SDXL's structure in small, and inputs for it; ways to compile it whole."""

import weakref

import pytest
import torch
from diffusers import UNet2DConditionModel

from atedm.unet import graphs

TEXT_WIDTH, POOLED_WIDTH, TIME_IDS = 24, 20, 6


def build_unet(dtype=torch.float32, seed=0, **overrides):
    torch.manual_seed(seed)
    config = {
        "sample_size": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 32, 64),
        "transformer_layers_per_block": (1, 2, 3),
        "attention_head_dim": (1, 2, 4),  # diffusers' name for the number of heads
        "cross_attention_dim": TEXT_WIDTH,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 8 * TIME_IDS + POOLED_WIDTH,
        "norm_num_groups": 8,
    }
    unet = UNet2DConditionModel(**{**config, **overrides}).eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "attn1.to_q" in name or "attn1.to_k" in name:
                parameter.mul_(4.0)  # maps with a real spread: untrained ones are nearly uniform
    return unet.to(dtype).requires_grad_(False)


@pytest.fixture(params=["torch.compile", "unet.compile", "unet.forward"])
def compile_whole(request):
    """Each way to compile a UNet whole: ``compile_whole(unet, backend)`` returns what is called."""

    def compile_(unet, backend):
        if request.param == "torch.compile":
            return torch.compile(unet, fullgraph=True, backend=backend)
        if request.param == "unet.compile":
            unet.compile(fullgraph=True, backend=backend)
        else:
            unet.forward = torch.compile(unet.forward, fullgraph=True, backend=backend)
        return unet

    compile_.way = request.param
    return compile_


def build_inputs(dtype=torch.float32, batch=2, height=16, width=24, timestep=500, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "sample": normal(batch, 4, height, width),
        "timestep": timestep,
        "encoder_hidden_states": normal(batch, 7, TEXT_WIDTH),
        "added_cond_kwargs": {"text_embeds": normal(batch, POOLED_WIDTH), "time_ids": normal(batch, TIME_IDS)},
    }


@pytest.fixture
def make_unet():
    return build_unet


@pytest.fixture
def make_inputs():
    return build_inputs


@pytest.fixture
def unet():
    return build_unet()


# Two levels: every kind of block, layer and stage that there is, traced in half the time of three.
TWO_LEVELS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (16, 32),
    "attention_head_dim": (1, 2),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 2),
    "reverse_transformer_layers_per_block": (1, 1),
}


@pytest.fixture
def unet_to_compile():
    """Without a middle, which takes a third of the time again."""
    return build_unet(**TWO_LEVELS, mid_block_type=None)


@pytest.fixture
def unet_with_a_middle():
    return build_unet(**TWO_LEVELS)


@pytest.fixture
def fresh_compiler(monkeypatch):
    """Without a graph, and with none counted: UNets of earlier tests may still be there."""
    torch._dynamo.reset()
    monkeypatch.setattr(graphs, "_counted", weakref.WeakKeyDictionary())
    yield
    torch._dynamo.reset()


@pytest.fixture
def inputs():
    return build_inputs()
