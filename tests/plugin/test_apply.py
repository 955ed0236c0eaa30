"""Applying, removing, copying, and recording."""

import copy
import gc
import pickle
import weakref

import pytest
import torch

import atedm
from atedm.policy.options import PUBLISHED


def snapshot(unet):
    return {name: (id(module), sorted(module.__dict__)) for name, module in unet.named_modules()}


def test_remove_restores_the_very_same_modules_and_outputs(unet, inputs):
    before, full, keys = snapshot(unet), unet(**inputs).sample, list(unet.state_dict())
    atedm.apply(unet, PUBLISHED)
    pruned = unet(**inputs).sample
    assert list(unet.state_dict()) == keys
    atedm.remove(unet)
    assert snapshot(unet) == before
    assert not unet._forward_pre_hooks and not unet._forward_pre_hooks_with_kwargs
    assert torch.equal(unet(**inputs).sample, full)
    assert not torch.allclose(pruned, full)
    atedm.remove(unet)  # nothing left to do, and no error


def test_other_hooks_survive_removal(unet, inputs):
    calls = []
    unet.register_forward_pre_hook(lambda module, args: calls.append(1))
    atedm.apply(unet, PUBLISHED)
    atedm.remove(unet)
    unet(**inputs)
    assert calls == [1]


def test_applying_twice_replaces(unet, inputs):
    atedm.apply(unet, PUBLISHED, ratio=0.9, schedule=None)
    atedm.apply(unet, PUBLISHED, ratio=0.3, schedule=None)
    twice = unet(**inputs).sample
    atedm.remove(unet)
    atedm.apply(unet, PUBLISHED, ratio=0.3, schedule=None)
    assert torch.equal(unet(**inputs).sample, twice)
    atedm.remove(unet)
    assert all("forward" not in module.__dict__ for module in unet.modules())


def test_a_refused_apply_leaves_the_earlier_one_in_force(unet, inputs):
    atedm.apply(unet, PUBLISHED, ratio=0.3, schedule=None)
    pruned = unet(**inputs).sample
    with pytest.raises(ValueError, match="levels names level 7"):
        atedm.apply(unet, PUBLISHED, levels=(7,))
    assert torch.equal(unet(**inputs).sample, pruned)


def test_applied_restores_what_was_in_force(unet, inputs):
    full = unet(**inputs).sample
    with atedm.applied(unet, PUBLISHED, ratio=0.3, schedule=None):
        outer = unet(**inputs).sample
        with atedm.applied(unet, PUBLISHED, ratio=0.8, schedule=None):
            assert not torch.equal(unet(**inputs).sample, outer)
        assert torch.equal(unet(**inputs).sample, outer)
    assert torch.equal(unet(**inputs).sample, full)
    with pytest.raises(RuntimeError, match="mine"), atedm.applied(unet, PUBLISHED):
        raise RuntimeError("mine")
    assert torch.equal(unet(**inputs).sample, full)


@pytest.mark.parametrize("place", ["mid_block.attentions.0.transformer_blocks.1.ff", "mid_block.attentions.0.proj_out"])
def test_an_exception_in_the_middle_of_a_forward_leaves_nothing_behind(unet, inputs, place):
    full = unet(**inputs).sample
    atedm.apply(unet, PUBLISHED, schedule=None)
    pruned, before = unet(**inputs).sample, snapshot(unet)

    def fail(module, args):
        raise RuntimeError("in the middle")

    handle = unet.get_submodule(place).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        unet(**inputs)
    handle.remove()
    assert snapshot(unet) == before
    assert torch.equal(unet(**inputs).sample, pruned)
    atedm.remove(unet)
    assert torch.equal(unet(**inputs).sample, full)


def test_two_unets_share_no_state(make_unet, inputs):
    first, second = make_unet(seed=0), make_unet(seed=3)
    full = second(**inputs).sample
    atedm.apply(first, PUBLISHED, ratio=0.5, schedule=atedm.DSAP(1.0))
    assert torch.equal(second(**inputs).sample, full)
    atedm.apply(second, PUBLISHED, ratio=0.8, schedule=None)
    alone = second(**inputs).sample
    first(**inputs)
    assert torch.equal(second(**inputs).sample, alone)
    atedm.remove(first)
    assert torch.equal(second(**inputs).sample, alone)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))])
def test_copies_carry_pruning_and_are_independent(unet, inputs, duplicate):
    full = unet(**inputs).sample
    atedm.apply(unet, PUBLISHED, ratio=0.5)
    pruned = unet(**inputs).sample
    twin = duplicate(unet)
    atedm.remove(unet)
    assert torch.equal(twin(**inputs).sample, pruned)
    atedm.remove(twin)
    assert torch.equal(twin(**inputs).sample, full)


def test_a_copy_computes_with_its_own_weights(unet, inputs):
    atedm.apply(unet, PUBLISHED, ratio=0.5)
    pruned = unet(**inputs).sample
    twin = copy.deepcopy(unet)
    for parameter in twin.parameters():
        parameter.zero_()
    assert torch.equal(unet(**inputs).sample, pruned)
    assert not twin(**inputs).sample.any()


def test_moving_and_casting_after_apply(unet, make_inputs):
    atedm.apply(unet, PUBLISHED, ratio=0.5, schedule=None)
    unet.to(torch.float64)
    assert unet(**make_inputs(torch.float64)).sample.dtype == torch.float64


def test_pruned_blocks_names_what_is_pruned(unet):
    assert atedm.pruned_blocks(unet) == []
    atedm.apply(unet, PUBLISHED, levels=(3,))
    level_2 = [f"down_blocks.1.attentions.{i}" for i in range(2)] + [f"up_blocks.1.attentions.{i}" for i in range(3)]
    level_3 = [
        *(f"down_blocks.2.attentions.{i}" for i in range(2)),
        "mid_block.attentions.0",
        *(f"up_blocks.0.attentions.{i}" for i in range(3)),
    ]
    assert sorted(atedm.pruned_blocks(unet)) == sorted(level_3)
    atedm.apply(unet, PUBLISHED)
    assert sorted(atedm.pruned_blocks(unet)) == sorted(level_2 + level_3)


def test_no_random_numbers_are_drawn(unet, inputs):
    atedm.apply(unet, PUBLISHED)
    state = torch.get_rng_state()
    unet(**inputs)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ratio": 1.0}, ValueError, "ratio is 1.0"),
        ({"ratio": -0.1}, ValueError, "ratio is -0.1"),
        ({"ratio": float("nan")}, ValueError, "ratio is nan"),
        ({"ratio": "half"}, TypeError, "ratio is 'half'"),
        ({"ratio": {3: 2.0}}, ValueError, r"ratio\[3\] is 2.0"),
        ({"ratio": {9: 0.5}}, ValueError, "ratio names level 9"),
        ({"ratio": {"2": 0.5}}, TypeError, "ratio names level '2'"),
        ({"ratio": {2.0: 0.5}}, TypeError, "ratio names level 2.0"),
        ({"ratio": {True: 0.5}}, TypeError, "ratio names level True"),
        ({"tolerance": float("inf")}, ValueError, "tolerance is inf"),
        ({"ratio": {2: 0.5}, "levels": (3,)}, ValueError, "no attention block is left"),
        ({"ratio": {}}, ValueError, "no attention block is left"),
        ({"levels": 3}, TypeError, "levels is 3"),
        ({"tolerance": None}, TypeError, "tolerance is None"),
        ({"scheduler": 3}, TypeError, "scheduler is 3"),
        ({"levels": (1,)}, ValueError, r"levels names level 1; expected levels with attention: \[2, 3\]"),
        ({"levels": ()}, ValueError, "no attention block is left"),
        ({"levels": "23"}, TypeError, "levels is '23'"),
        ({"schedule": 0.3}, TypeError, "schedule is 0.3"),
        ({"placement": "late"}, ValueError, "placement is 'late'"),
        ({"ranking": "random"}, ValueError, "ranking is 'random'"),
        ({"recovery": "mean"}, ValueError, "recovery is 'mean'"),
        ({"grid": 1}, ValueError, "grid is 1; expected None or an integer of at least 2"),
        ({"grid": True}, ValueError, "grid is True"),
        ({"rank_every": 0}, ValueError, "rank_every is 0"),
        ({"rank_every": 2.0}, ValueError, "rank_every is 2.0"),
        ({"reduction": "max"}, ValueError, "reduction is 'max'"),
        ({"keep_multiple": 0}, ValueError, "keep_multiple is 0"),
        ({"max_iterations": 0}, ValueError, "max_iterations is 0"),
        ({"tolerance": -1.0}, ValueError, "tolerance is -1.0"),
        ({"ration": 0.5}, TypeError, "'ration' is not an option; expected some of ratio"),
    ],
)
def test_wrong_options_are_named(unet, options, error, message):
    before = snapshot(unet)
    with pytest.raises(error, match=message):
        atedm.apply(unet, PUBLISHED, **options)
    assert snapshot(unet) == before


def test_a_tool_that_was_undone_is_no_obstacle(unet, inputs):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    full = unet(**inputs).sample
    block = unet.mid_block.attentions[0]
    add_hook_to_module(block, AlignDevicesHook(execution_device="cpu"))
    with pytest.raises(ValueError, match="forward has been replaced"):
        atedm.apply(unet, PUBLISHED)
    remove_hook_from_module(block)
    left_behind = block.forward
    atedm.apply(unet, PUBLISHED, schedule=None)
    assert not torch.equal(unet(**inputs).sample, full)
    atedm.remove(unet)
    assert block.forward == left_behind
    assert torch.equal(unet(**inputs).sample, full)


def test_removal_reaches_under_an_accelerate_hook(unet, inputs):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    full = unet(**inputs).sample
    atedm.apply(unet, PUBLISHED, schedule=None)
    block = unet.mid_block.attentions[0]
    add_hook_to_module(block, AlignDevicesHook(execution_device="cpu"))
    atedm.remove(unet)
    remove_hook_from_module(block)
    assert torch.equal(unet(**inputs).sample, full)


def test_removal_refuses_what_it_cannot_undo(unet, inputs):
    atedm.apply(unet, PUBLISHED, schedule=None)
    pruned = unet(**inputs).sample
    block = unet.mid_block.attentions[0]
    ours = block.forward
    block.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(RuntimeError, match=r"forward of mid_block\.attentions\.0 has been replaced"):
        atedm.remove(unet)
    assert torch.equal(unet(**inputs).sample, pruned)
    block.forward = ours
    atedm.remove(unet)


def test_a_recording_survives_applying_again(unet, inputs):
    atedm.apply(unet, PUBLISHED, schedule=None)
    with atedm.record(unet) as recording:
        atedm.apply(unet, PUBLISHED, ratio=0.5, schedule=None)
        unet(**inputs)
    assert len(recording.ranked) == 11
    unet(**inputs)
    assert len(recording.ranked) == 11


def test_removing_while_recording_is_said(unet, inputs, caplog):
    atedm.apply(unet, PUBLISHED, schedule=None)
    with atedm.record(unet) as recording:
        unet(**inputs)
        atedm.remove(unet)
        atedm.apply(unet, PUBLISHED, schedule=None)
        unet(**inputs)
    assert len(recording.ranked) == 11
    assert [message for message in caplog.messages if "a recording, which ends here" in message]


def test_what_was_applied_before_keeps_no_unet_alive(make_unet):
    unet = make_unet()
    for ratio in (0.3, 0.5, 0.3):
        atedm.remove(atedm.apply(unet, PUBLISHED, ratio=ratio))
    gone = weakref.ref(unet)
    del unet
    gc.collect()
    assert gone() is None


def test_blocks_that_were_exchanged_are_pruned_anew(unet, inputs):
    atedm.remove(atedm.apply(unet, PUBLISHED, schedule=None))
    unet.mid_block.attentions[0] = copy.deepcopy(unet.mid_block.attentions[0])
    full = unet(**inputs).sample
    with atedm.applied(unet, PUBLISHED, schedule=None), atedm.record(unet) as recording:
        unet(**inputs)
    assert "mid_block.attentions.0" in {ranked.block for ranked in recording.ranked}
    assert torch.equal(unet(**inputs).sample, full)


def test_record_needs_pruning(unet):
    with pytest.raises(ValueError, match="not pruned"), atedm.record(unet):
        pass
