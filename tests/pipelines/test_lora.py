"""LoRA weights, loaded before and after pruning, fused and not."""

import copy

import diffusers
import pytest
import torch
from peft import LoraConfig

import atedm
from atedm.policy.options import PUBLISHED
from tests.helpers.running import check, latents


@pytest.fixture
def pipe(base):
    pipe = diffusers.StableDiffusionXLPipeline.from_pipe(base, unet=copy.deepcopy(base.unet))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def weights(base, tmp_path_factory):
    """A folder with LoRA weights that change pictures visibly."""
    folder = tmp_path_factory.mktemp("lora")
    unet = copy.deepcopy(base.unet)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.15, generator=generator)
    from peft.utils import get_peft_model_state_dict

    layers = {key: value.detach() for key, value in get_peft_model_state_dict(unet).items()}
    diffusers.StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder


def test_before_and_after_apply_are_the_same(pipe, base, weights):
    plain = latents(pipe)
    pipe.load_lora_weights(weights)
    full, pruned, _ = check(pipe)
    assert not torch.allclose(full, plain)
    with atedm.applied(pipe, PUBLISHED, ratio=0.25):
        pipe.unload_lora_weights()
        without = latents(pipe)
        pipe.load_lora_weights(weights)
        assert torch.equal(latents(pipe), pruned)
    assert not torch.allclose(without, pruned)
    assert torch.equal(latents(pipe), full)


def test_fused(pipe, weights):
    pipe.load_lora_weights(weights)
    full, _, _ = check(pipe)
    # Fused weights are rounded otherwise, and rounding may decide which of two tokens is copied: so nothing is.
    with atedm.applied(pipe, PUBLISHED, ratio=0.25, recovery="zeros"):
        pruned = latents(pipe)
        pipe.fuse_lora()
        torch.testing.assert_close(latents(pipe), pruned, rtol=1e-3, atol=1e-3)
        pipe.unfuse_lora()
    torch.testing.assert_close(latents(pipe), full, rtol=1e-3, atol=1e-3)


def test_scale(pipe, weights):
    pipe.load_lora_weights(weights)
    check(pipe, lambda: latents(pipe, cross_attention_kwargs={"scale": 0.5}))
