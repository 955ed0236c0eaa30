"""Any order of applying, removing, running and failing ends with the UNet bit for bit as it was; nothing piles up."""

import copy
import gc
import pickle

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import atedm

OPTIONS = st.fixed_dictionaries(
    {"ratio": st.sampled_from([0.0, 0.2, 0.63, 0.95])},
    optional={
        "placement": st.sampled_from(["early", "paper"]),
        "schedule": st.sampled_from([None, atedm.DSAP(), atedm.DSAP(1.0)]),
        "levels": st.sampled_from([(2,), (3,), (2, 3)]),
        "recovery": st.sampled_from(["similarity", "keys", "zeros", "bicubic"]),
        "ranking": st.sampled_from(["self", "cross", "keys"]),
        "grid": st.sampled_from([None, 2, 3]),
        "keep_multiple": st.sampled_from([1, 16]),
        "rank_every": st.sampled_from([1, 2]),
        "share_guidance": st.booleans(),
    },
)
ACTIONS = st.one_of(
    st.tuples(st.just("apply"), OPTIONS),
    st.tuples(st.just("applied"), OPTIONS),
    st.tuples(st.just("refused"), st.sampled_from([{"ratio": 1.0}, {"levels": (9,)}, {"ration": 0.5}])),
    st.tuples(st.sampled_from(["remove", "run", "record", "fail", "copy", "pickle"]), st.none()),
)


def snapshot(unet):
    modules = {name: (id(module), sorted(module.__dict__)) for name, module in unet.named_modules()}
    return modules, {name: (id(p), p._version) for name, p in unet.named_parameters()}, list(unet.state_dict())


def do(unet, inputs, action, argument):
    if action == "apply":
        atedm.apply(unet, **argument)
    elif action == "applied":
        with atedm.applied(unet, **argument):
            unet(**inputs)
    elif action == "refused":
        with pytest.raises((ValueError, TypeError)):
            atedm.apply(unet, **argument)
    elif action == "remove":
        atedm.remove(unet)
    elif action == "run":
        assert unet(**inputs).sample.isfinite().all()
    elif action == "record" and atedm.pruned_blocks(unet):
        with atedm.record(unet) as recording:
            unet(**inputs)
        assert recording.calls
    elif action == "fail":
        with pytest.raises(RuntimeError):
            unet(**{**inputs, "sample": inputs["sample"][:, :3]})
    elif action in ("copy", "pickle"):
        twin = copy.deepcopy(unet) if action == "copy" else pickle.loads(pickle.dumps(unet))
        assert torch.equal(twin(**inputs).sample, unet(**inputs).sample)
        atedm.remove(twin)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(actions=st.lists(ACTIONS, max_size=8))
def test_any_sequence_ends_where_it_began(unet, inputs, actions):
    before, full = snapshot(unet), unet(**inputs).sample
    for action, argument in actions:
        do(unet, inputs, action, argument)
    atedm.remove(unet)
    assert snapshot(unet) == before
    assert not unet._forward_pre_hooks
    assert torch.equal(unet(**inputs).sample, full)


def test_two_hundred_calls_take_no_more_memory_than_twenty(unet, inputs):
    process = psutil.Process()
    atedm.apply(unet)

    def after(calls):
        for n in range(calls):
            unet(**{**inputs, "timestep": 999 - 4 * n})
        gc.collect()
        return process.memory_info().rss, len(gc.get_objects())

    memory, objects = after(20)
    later_memory, later_objects = after(200)
    assert later_objects - objects < 50
    assert later_memory - memory < 8 * 2**20  # a call's activations take more
