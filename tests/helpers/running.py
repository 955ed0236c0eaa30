"""Runs a pipeline, and checks what must hold for every pipeline."""

import torch
from diffusers import EulerDiscreteScheduler

import atedm
from atedm.policy.options import PUBLISHED

PROMPT = "a red circle left of a blue square"
STEPS = 4

# The schedule of the checks. The default one would compute all steps of such a short run.
OWN_KINDS = ["whole", "pruned", "reused", "pruned"]


def timesteps_of(steps):
    """Return the timesteps of a new picture of ``steps`` steps. No other picture shares the tensor."""
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    return scheduler.timesteps


def latents(pipe, **arguments):
    """Return what ``pipe`` makes for a prompt and a seed, before decoding."""
    defaults = {"prompt": PROMPT, "num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "latent"}
    generator = torch.Generator().manual_seed(0)
    return pipe(**{**defaults, "generator": generator, **arguments}).images


def check(pipe, call=None, alike=0.5, **changes):
    """Check that pruning takes effect, that ratio 0 changes nothing, and that removal restores every bit.

    It checks the published method, and the default recovery and staleness in steps of ``OWN_KINDS``, with ``changes``.

    ``call``: runs ``pipe`` and returns a tensor; :func:`latents` by default. ``alike``: minimum cosine similarity.

    Returns:
        The full result, the pruned one of the published method, and the latter's recording.
    """
    call = call or (lambda: latents(pipe))
    full = call()
    with atedm.applied(pipe, PUBLISHED, ratio=0.0):
        assert torch.equal(call(), full)
    with atedm.applied(pipe, PUBLISHED, ratio=0.25), atedm.record(pipe) as recording:
        pruned = call()
    options = {"schedule": OWN_KINDS, **changes}
    with atedm.applied(pipe, **options), atedm.record(pipe, tokens=False) as steps:
        own = call()
    assert own.shape == full.shape and own.isfinite().all()
    kinds = steps.kinds
    assert kinds[0] == "whole" and set(kinds) <= {"whole", "pruned", "reused"}
    if len(kinds) > 1:
        assert "pruned" in kinds and not torch.equal(own, full)
    if len(kinds) >= len(OWN_KINDS) and options["schedule"] == OWN_KINDS:
        assert "reused" in kinds
    assert torch.cosine_similarity(own.flatten(), full.flatten(), dim=0) > alike
    assert recording.ranked
    assert pruned.shape == full.shape and pruned.isfinite().all()
    assert not torch.equal(pruned, full)
    assert torch.cosine_similarity(pruned.flatten(), full.flatten(), dim=0) > alike
    assert torch.equal(call(), full)
    return full, pruned, recording
