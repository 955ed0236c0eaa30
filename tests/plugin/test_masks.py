"""Masks: those of IP-Adapters, read at the kept tokens, and those of padded prompts."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0

import atedm
from atedm.policy.options import PUBLISHED
from atedm.unet.attention import masks_of_kept

HEIGHT, WIDTH, KEEP, DIM, TEXT, BATCH = 6, 10, 17, 16, 12, 2
TOKENS = HEIGHT * WIDTH


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def index_of_kept():
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(TOKENS, generator=generator)[:KEEP].sort().values for _ in range(BATCH)])


@pytest.fixture(params=[IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0])
def attend(request):
    """Cross-attention with two adapters, of three images and of one."""
    torch.manual_seed(0)
    attention = Attention(DIM, cross_attention_dim=TEXT, heads=2, dim_head=8).double().requires_grad_(False)
    processor = request.param(DIM, TEXT, num_tokens=(4, 4), scale=[[0.5, 1.0, 2.0], [0.7]])
    attention.set_processor(processor.double().requires_grad_(False))
    text = (normal(BATCH, 5, TEXT, seed=1), [normal(BATCH, 3, 4, TEXT, seed=2), normal(BATCH, 1, 4, TEXT, seed=3)])

    def call(x, masks):
        return attention(x, encoder_hidden_states=text, ip_adapter_masks=masks)

    return call


@pytest.mark.parametrize("sizes", [((48, 80), (48, 80)), ((6, 10), (96, 160)), ((64, 64), (30, 90)), ((1, 1), (7, 13))])
@pytest.mark.filterwarnings("ignore:The aspect ratio of the mask")
def test_attention_on_kept_tokens_is_that_on_all_there(attend, sizes):
    masks = [normal(1, 3, *sizes[0], seed=4), normal(1, 1, *sizes[1], seed=5)]
    x, index = normal(BATCH, TOKENS, DIM), index_of_kept()
    at = index[..., None].expand(-1, -1, DIM)
    expected = attend(x, masks).gather(1, at)
    out = attend(x.gather(1, at), masks_of_kept(masks, index, TOKENS))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(out, attend(x.gather(1, at), [torch.ones_like(mask) for mask in masks]), atol=1e-3)


def test_the_older_form_and_an_adapter_without_a_mask():
    index = index_of_kept()
    masks = torch.rand(2, 1, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    expected = [mask.flatten()[index][:, None, None] for mask in masks]  # the size of the map: nothing is resized
    for form in (masks, [mask[None] for mask in masks]):
        for mask, values in zip(masks_of_kept(form, index, TOKENS), expected, strict=True):
            assert mask.shape == (BATCH, 1, 1, KEEP)
            torch.testing.assert_close(mask, values)
    assert masks_of_kept([None, "no mask"], index, TOKENS) == [None, "no mask"]


@pytest.mark.parametrize("placement", ["early", "paper"])
def test_a_padded_prompt_is_masked_as_without_pruning(make_unet, make_inputs, placement):
    unet, inputs = make_unet(torch.float64), make_inputs(torch.float64)
    options = {"ratio": 0.5, "schedule": None, "placement": placement}
    short = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"][:, :4]}
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]] * 2)
    with atedm.applied(unet, PUBLISHED, **options):
        expected = unet(**short).sample
        masked = unet(**inputs, encoder_attention_mask=mask).sample
        unmasked = unet(**inputs).sample
    torch.testing.assert_close(masked, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(unmasked, expected, atol=1e-3)
