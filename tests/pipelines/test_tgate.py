"""T-GATE keeps what each attention computed and reuses it by place: refused on a pruned UNet, whichever comes first."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from tgate import TgateSDXLLoader

import atedm
from atedm.policy.options import PUBLISHED
from tests.helpers.running import PROMPT, STEPS, latents

OPTIONS = pytest.mark.parametrize("options", [{}, {"placement": "paper"}, {"levels": (3,), "schedule": None}])
REPLACED = r"attentions\.\d {} be pruned: the forward of its first layer or of the self-attention there has been"


def gate(pipe):
    """A picture by T-GATE, which attends anew in some steps only."""
    gating = {"gate_step": STEPS - 1, "sp_interval": 2, "fi_interval": 1, "warm_up": 1}
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_inference_steps": STEPS, "generator": generator, "output_type": "latent"}
    return TgateSDXLLoader(pipe).tgate(PROMPT, **gating, **arguments).images


def undo(pipe):
    """T-GATE itself leaves its forwards and what they keep."""
    for module in pipe.unet.modules():
        if isinstance(module, Attention):
            module.__dict__.pop("forward", None)
            module.__dict__.pop("cache", None)


@pytest.fixture
def pipe(base):
    yield base
    undo(base)
    atedm.remove(base)
    base.__dict__.pop("tgate", None)


@pytest.fixture
def attributes(base):
    """What each module of the UNet holds itself."""

    def held():
        return {name: set(vars(module)) for name, module in base.unet.named_modules()}

    return held


@OPTIONS
def test_after_tgate_apply_refuses(pipe, attributes, options):
    full, before = latents(pipe), attributes()
    gated = gate(pipe)
    assert not torch.equal(gated, full)
    with pytest.raises(ValueError, match=REPLACED.format("cannot")):
        atedm.apply(pipe, PUBLISHED, **options)
    assert atedm.pruned_blocks(pipe) == []
    assert torch.equal(gate(pipe), gated)
    undo(pipe)
    assert attributes() == before
    with atedm.applied(pipe, PUBLISHED, **options):
        assert not torch.equal(latents(pipe), full)
    assert attributes() == before and torch.equal(latents(pipe), full)


@OPTIONS
@pytest.mark.parametrize("first_undone", ["tgate", "atedm"])
def test_after_apply_the_next_call_refuses_tgate(pipe, attributes, options, first_undone):
    full, before = latents(pipe), attributes()
    atedm.apply(pipe, PUBLISHED, **options)
    pruned = latents(pipe)
    for run in (gate, latents):  # in its own run, and in what it leaves behind
        with pytest.raises(ValueError, match=REPLACED.format("can no longer")):
            run(pipe)
    if first_undone == "tgate":
        undo(pipe)
        assert torch.equal(latents(pipe), pruned)
        atedm.remove(pipe)
    else:
        atedm.remove(pipe)
        undo(pipe)
    assert attributes() == before and torch.equal(latents(pipe), full)


def test_blocks_that_stay_whole_may_be_gated(pipe):
    gated = gate(pipe)
    undo(pipe)
    with atedm.applied(pipe, PUBLISHED, ratio=0.0):
        assert torch.equal(gate(pipe), gated)


def test_steps_that_are_reused_refuse_it_in_either_order(pipe):
    gate(pipe)
    with pytest.raises(ValueError, match="must run in every step: the forward of its first layer or of the self-"):
        atedm.apply(pipe, "quality")
    undo(pipe)
    atedm.apply(pipe, "quality")
    with pytest.raises(ValueError, match="can no longer be left out of reused steps: the forward of its first layer"):
        gate(pipe)
