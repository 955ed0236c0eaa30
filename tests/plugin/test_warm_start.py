"""A ranking that begins at the scores of an earlier step of the picture."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import atedm
from atedm.policy.options import PUBLISHED
from atedm.policy.ranking import WARM_ITERATIONS
from atedm.unet.errors import RankedNaN
from atedm.unet.graphs import graphs_per_size
from atedm.unet.installing import calls_of
from atedm_kernels import DEFAULT_MAX_ITERATIONS
from tests.helpers.running import timesteps_of

COLD, WARM = DEFAULT_MAX_ITERATIONS, WARM_ITERATIONS
# Every iteration runs, and a step that does not prune is no reason for another.
WARM_START = {"schedule": None, "warm_start": True, "tolerance": 0.0}


@torch.no_grad()
def run(unet, inputs, steps=4):
    timesteps = timesteps_of(steps)
    calls = ({**inputs, "sample": inputs["sample"] * (1 - 0.2 * n), "timestep": t} for n, t in enumerate(timesteps))
    return [unet(**call).sample.clone() for call in calls]


def iterations(recording, block):
    """Those of each step in which ``block`` was ranked: all of its heads run as many."""
    found = {ranked.step: ranked.iterations.unique().tolist() for ranked in recording.ranked if ranked.block == block}
    return {step: number for step, (number,) in found.items()}


class Slow:
    """The rankings of a picture by dense maps in float64, from what enters each pruned block's self-attention."""

    def __init__(self, unet):
        self.scores = {}
        self._last = {}
        for name in atedm.pruned_blocks(unet):
            first = unet.get_submodule(name).transformer_blocks[0]
            first.norm1.register_forward_hook(lambda _, __, x, name=name, first=first: self._rank(name, first.attn1, x))

    def _rank(self, name, attention, tokens):
        q, k = (
            (tokens.double() @ projection.weight.double().T).unflatten(2, (attention.heads, -1)).transpose(1, 2)
            for projection in (attention.to_q, attention.to_k)
        )
        a = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        scores = self._last.get(name, torch.ones(a.shape[:3], dtype=torch.float64))
        for _ in range(WARM if name in self._last else COLD):
            scores = torch.einsum("bhm,bhmn->bhn", scores, a)
            scores = scores / scores.sum(-1, keepdim=True)
        self._last[name] = scores
        self.scores.setdefault(name, []).append(scores.square().mean(1).sqrt())


def test_it_is_the_chain_of_an_independent_implementation(unet, inputs):
    atedm.apply(unet, PUBLISHED, **WARM_START)
    slow = Slow(unet)
    with atedm.record(unet) as recording:
        run(unet, inputs)
    for name in atedm.pruned_blocks(unet):
        found = [ranked.scores for ranked in recording.ranked if ranked.block == name]
        assert len(found) == len(slow.scores[name]) == 4
        for one, other in zip(found, slow.scores[name], strict=True):
            torch.testing.assert_close(one.double(), other, rtol=2e-3, atol=1e-7)
        assert iterations(recording, name) == {0: COLD, 1: WARM, 2: WARM, 3: WARM}


@pytest.mark.parametrize("ranking", ["self", "cross"])
def test_each_picture_has_its_own(unet, make_inputs, ranking):
    first, second = make_inputs(seed=1), make_inputs(seed=2, height=24)
    options = {**WARM_START, "ranking": ranking}
    atedm.apply(unet, PUBLISHED, **options)
    alone = [run(unet, inputs) for inputs in (first, second)]
    assert calls_of(unet).memory.nbytes == 0  # freed at the last step
    for inputs, expected in zip((first, second), alone, strict=True):
        with atedm.record(unet) as recording:
            for one, other in zip(run(unet, inputs), expected, strict=True):
                assert torch.equal(one, other)
        assert set(iterations(recording, atedm.pruned_blocks(unet)[0]).items()) >= {(0, COLD), (3, WARM)}
    atedm.apply(unet, PUBLISHED, **{**options, "warm_start": False})
    with atedm.record(unet) as cold:
        assert torch.equal(run(unet, second)[0], alone[1][0])
    assert set(iterations(cold, atedm.pruned_blocks(unet)[0]).values()) == {COLD}
    assert not all(
        torch.equal(one.scores, other.scores) for one, other in zip(cold.ranked, recording.ranked, strict=True)
    )


def test_where_nothing_can_be_remembered_each_begins_at_uniform_scores_and_that_is_said_once(unet, inputs, caplog):
    atedm.apply(unet, PUBLISHED, **WARM_START)
    with atedm.record(unet) as recording, torch.no_grad():
        for timestep in (900, 800):
            unet(**{**inputs, "timestep": timestep})
    assert {count for ranked in recording.ranked for count in ranked.iterations.unique().tolist()} == {COLD}
    (message,) = [m for m in caplog.messages if "not taken from the timesteps of a scheduler" in m]
    assert "warm_start=True" in message and "every ranking begins at uniform scores" in message


def test_a_choice_that_serves_several_steps_hands_on_its_scores(unet, inputs):
    atedm.apply(unet, PUBLISHED, **WARM_START, rank_every=2)
    with atedm.record(unet) as recording:
        run(unet, inputs, steps=6)
    ranked = [r for r in recording.ranked if r.block == atedm.pruned_blocks(unet)[0] and r.iterations is not None]
    assert [(r.step, r.iterations.unique().tolist()) for r in ranked] == [(0, [COLD]), (2, [WARM]), (4, [WARM])]


def test_blocks_that_are_whole_in_light_steps_begin_at_uniform_scores_after_them(unet, inputs):
    atedm.apply(
        unet, PUBLISHED, warm_start=True, tolerance=0.0, schedule=["light", "light", "pruned", "pruned", "light"]
    )
    with atedm.record(unet) as recording:
        run(unet, inputs, steps=5)
    found = [iterations(recording, name) for name in atedm.pruned_blocks(unet)]
    assert {0: COLD, 1: WARM, 2: COLD, 3: WARM, 4: WARM} in found
    assert {2: COLD, 3: WARM} in found


def test_steps_between_that_rank_nothing_leave_the_scores(unet, inputs):
    kinds = ["whole", "pruned", "reused", "whole", "pruned", "reused", "pruned"]
    atedm.apply(unet, schedule=kinds, tolerance=0.0)
    with atedm.record(unet) as recording:
        run(unet, inputs, steps=len(kinds))
    assert recording.kinds == kinds
    assert iterations(recording, atedm.pruned_blocks(unet)[0]) == {1: COLD, 4: WARM, 6: WARM}


def test_fewer_iterations_than_a_warm_start_takes_are_not_exceeded(unet, inputs):
    atedm.apply(unet, PUBLISHED, **WARM_START, max_iterations=1)
    with atedm.record(unet) as recording:
        run(unet, inputs)
    assert set(iterations(recording, atedm.pruned_blocks(unet)[0]).values()) == {1}


def test_nan_is_named_and_not_handed_on(unet, inputs):
    atedm.apply(unet, PUBLISHED, **WARM_START)
    timesteps = timesteps_of(4)
    spoilt = {**inputs, "sample": inputs["sample"].clone()}
    spoilt["sample"][1, 0, 0, 0] = float("nan")
    with torch.no_grad():
        for n, t in enumerate(timesteps):
            if n == 2:
                for _ in range(2):
                    with pytest.raises(RankedNaN):
                        unet(**{**spoilt, "timestep": t})
            assert unet(**{**inputs, "timestep": t}).sample.isfinite().all()


def test_compiled_it_is_two_graphs_of_which_pictures_share_the_buffers(unet_to_compile, make_inputs, fresh_compiler):
    unet, counter = unet_to_compile, CompileCounterWithBackend("eager")
    first, second = make_inputs(seed=1), make_inputs(seed=2)
    atedm.apply(unet, PUBLISHED, **WARM_START)
    expected = [run(unet, inputs) for inputs in (first, second)]
    unet.compile(fullgraph=True, backend=counter)
    atedm.apply(unet, PUBLISHED, **WARM_START)
    for inputs, wanted in zip((first, second), expected, strict=True):
        for one, other in zip(run(unet, inputs), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == graphs_per_size(replace(PUBLISHED, **WARM_START)) == 2


def test_options():
    assert atedm.Options().starts_warm and not atedm.Options(ranking="keys").starts_warm
    assert not atedm.Options(ranking=None).starts_warm and not atedm.PRESETS["quality"].starts_warm
    assert not atedm.PRESETS["paper"].starts_warm and not atedm.PRESETS["paper-dagger"].starts_warm
    assert atedm.Options.from_dict(atedm.Options(warm_start=False).to_dict()) == atedm.Options(warm_start=False)
    constant = atedm.Options(schedule=None, recovery="similarity", staleness=None, warm_start=False)
    assert constant.is_constant and not replace(constant, warm_start=True).is_constant
    with pytest.raises(TypeError, match="warm_start is 1; expected True or False"):
        atedm.Options(warm_start=1)
