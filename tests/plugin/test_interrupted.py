"""Calls that do not come to their end, or come from where no call is known: nothing of them reaches another picture."""

import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import atedm
from atedm.policy.options import PUBLISHED
from atedm.unet.installing import calls_of
from tests.helpers.running import timesteps_of

pytestmark = pytest.mark.usefixtures("fresh_compiler")

KINDS = ["whole", "pruned", "reused", "pruned", "reused"]
OURS = {"schedule": KINDS, "recovery": "cached", "staleness": "drift", "ratio": 0.6}
CHOICES = {"schedule": None, "ratio": 0.6, "rank_every": 3}


@pytest.fixture
def unet(unet_to_compile):
    return unet_to_compile


def call(unet, inputs, timestep, step):
    return unet(**{**inputs, "sample": inputs["sample"] * (1 - 0.05 * step), "timestep": timestep}).sample.clone()


@torch.no_grad()
def run(unet, inputs, timesteps=None, since=0):
    timesteps = timesteps_of(len(KINDS)) if timesteps is None else timesteps
    return [call(unet, inputs, t, n) for n, t in enumerate(timesteps) if n >= since]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def expected_of(unet, inputs, **options):
    with atedm.applied(unet, PUBLISHED, **options):
        return run(unet, inputs)


def raising_once(module, error):
    """A hook that raises ``error`` at the next call of ``module``, and never again."""

    def stop(*_):
        handle.remove()
        raise error

    handle = module.register_forward_pre_hook(stop)


def test_an_interrupt_inside_a_graph_of_the_unet(unet, make_inputs):
    first, second = make_inputs(seed=1), make_inputs(seed=2)
    expected, errors = expected_of(unet, second, **OURS), []

    def backend(graph, _):
        def execute(*arguments):
            if errors:
                raise errors.pop()
            return graph(*arguments)

        return execute

    compiled = torch.compile(unet, backend=backend)
    atedm.apply(compiled, PUBLISHED, **OURS)
    run(compiled, first)
    timesteps = timesteps_of(len(KINDS))
    with torch.no_grad():
        call(compiled, first, timesteps[0], 0)
        errors.append(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            call(compiled, first, timesteps[1], 1)
    with atedm.record(unet, tokens=False) as recording:
        assert_same(run(unet, second), expected)
    assert recording.kinds == KINDS
    assert_same(run(compiled, second), expected)
    assert_same(run(compiled, second, timesteps), expected)  # another try
    forward = compiled.forward
    atedm.remove(compiled)
    assert compiled.forward is not forward


def test_a_thread_that_ends_inside_a_call(unet, make_inputs):
    inputs = make_inputs()
    expected = expected_of(unet, inputs, **OURS)
    atedm.apply(unet, PUBLISHED, **OURS)
    unet.up_blocks[0].attentions[0].compile(backend="eager")
    raising_once(unet.up_blocks[-1], SystemExit())
    thread = threading.Thread(target=run, args=(unet, inputs))
    thread.start()
    thread.join()
    assert_same(run(unet, inputs), expected)


class Waiting(atedm.Schedule):
    """Its first step is planned until it may go on."""

    def __init__(self):
        self.planning, self.go_on, self.fails = threading.Event(), threading.Event(), False

    @property
    def kinds(self):
        return frozenset(KINDS)

    def kind(self, progress):
        if self.fails:
            raise OSError("no kind")
        self.planning.set()
        assert self.go_on.wait(60)
        return KINDS[progress.step]


def test_threads_that_begin_at_once_on_a_compiled_unet(unet, make_inputs):
    inputs, schedule = make_inputs(), Waiting()
    expected = expected_of(unet, inputs, **OURS)
    atedm.apply(unet, PUBLISHED, **{**OURS, "schedule": schedule})
    unet.up_blocks[0].attentions[0].compile(backend="eager")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(run, unet, inputs)
        assert schedule.planning.wait(60)
        with pytest.raises(RuntimeError, match="two threads"):
            run(unet, inputs)
        schedule.go_on.set()
        assert_same(first.result(), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_schedule_that_raises(unet, make_inputs, caplog, compiled):
    inputs, schedule, timesteps = make_inputs(), Waiting(), timesteps_of(len(KINDS))
    schedule.go_on.set()
    expected = expected_of(unet, inputs, **OURS)
    atedm.apply(unet, PUBLISHED, **{**OURS, "schedule": schedule})
    if compiled:
        unet.up_blocks[0].attentions[0].compile(backend="eager")
    schedule.fails = True
    with pytest.raises(OSError, match="no kind"):
        run(unet, inputs, timesteps)
    schedule.fails = False
    assert_same(run(unet, inputs), expected)  # the timesteps of the failed one live
    assert_same(run(unet, inputs, timesteps), expected)
    assert not [message for message in caplog.messages if "several contents" in message]


def test_an_interrupt_within_a_unet_that_another_one_calls(make_unet, make_inputs):
    outer, inner = make_unet(layers_per_block=1), make_unet(layers_per_block=1, seed=1)
    inputs = make_inputs()
    expected = [expected_of(unet, inputs, **OURS) for unet in (outer, inner)]
    for unet in (outer, inner):
        atedm.apply(unet, PUBLISHED, **OURS)
    timesteps, within = timesteps_of(len(KINDS)), timesteps_of(len(KINDS))
    hook = outer.mid_block.register_forward_pre_hook(lambda *_: call(inner, inputs, within[0], 0) and None)
    raising_once(inner.mid_block, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(outer, inputs, timesteps)
    hook.remove()
    with atedm.record(inner, tokens=False) as recording:
        assert_same(run(outer, inputs, timesteps), expected[0])
        assert_same(run(inner, inputs, within), expected[1])
    assert recording.kinds == KINDS


def test_a_picture_without_room_that_raises(unet, make_inputs, caplog):
    inputs = make_inputs()
    expected = expected_of(unet, inputs, **OURS)
    atedm.apply(unet, PUBLISHED, **OURS)
    unet.up_blocks[0].attentions[0].compile(backend="eager")
    owner, timesteps = timesteps_of(len(KINDS)), timesteps_of(len(KINDS))
    with torch.no_grad():
        call(unet, inputs, owner[0], 0)
        raising_once(unet.up_blocks[-1], OSError("stop"))
        with pytest.raises(OSError, match="stop"):
            call(unet, inputs, timesteps[0], 0)
    del owner
    assert_same(run(unet, inputs, timesteps), expected)
    assert not [message for message in caplog.messages if "several contents" in message]


def test_nothing_outlives_the_last_step(unet, inputs):
    atedm.apply(unet, PUBLISHED, **OURS)
    timesteps = timesteps_of(len(KINDS))
    with torch.no_grad():
        for n, t in enumerate(timesteps[:-1]):
            call(unet, inputs, t, n)
        (picture,) = [picture for _, picture in calls_of(unet).memory._pictures.values()]
        slot = weakref.ref(picture.slot)
        call(unet, inputs, timesteps[-1], len(KINDS) - 1)
    gc.collect()
    assert slot() is None


def test_a_forward_that_is_called_by_hand_is_whole_and_says_so_once(unet, make_inputs, caplog):
    inputs, other = make_inputs(seed=1), make_inputs(seed=2)
    with torch.no_grad():
        full = unet(**other).sample
        atedm.apply(unet, PUBLISHED, **OURS)
        run(unet, inputs)
        for _ in range(2):
            assert torch.equal(unet.forward(**other).sample, full)
    assert len([message for message in caplog.messages if "a part of the UNet was called on its own" in message]) == 1


@pytest.mark.parametrize("order", [[True, False], [False, True]], ids=["autocast first", "autocast second"])
def test_pictures_with_and_without_autocast(unet, make_inputs, order):
    def picture(is_cast):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
            return run(unet, make_inputs())

    atedm.apply(unet, PUBLISHED, **OURS)
    expected = {is_cast: picture(is_cast) for is_cast in order}
    unet.up_blocks[0].attentions[0].compile(backend="eager")
    for is_cast in order:
        assert_same(picture(is_cast), expected[is_cast])


def test_a_choice_of_a_graph_stays_where_the_rest_runs_uncompiled(unet, make_inputs):
    inputs, timesteps = make_inputs(), timesteps_of(len(KINDS))
    expected = expected_of(unet, inputs, **CHOICES)
    atedm.apply(unet, PUBLISHED, **CHOICES)
    for name in atedm.pruned_blocks(unet):
        unet.get_submodule(name).compile(backend="eager")
    with torch._dynamo.config.patch(recompile_limit=2):  # torch runs what takes more graphs uncompiled
        assert_same(run(unet, inputs), expected)
    torch._dynamo.reset()
    with torch.no_grad():
        found = [call(unet, inputs, timesteps[0], 0)]
    with atedm.record(unet) as recording:
        found += run(unet, inputs, timesteps, since=1)
    assert_same(found, expected)
    first = [ranked for ranked in recording.ranked if ranked.step == 1]
    assert first and all(ranked.scores.isnan().all() and ranked.iterations is None for ranked in first)


@pytest.mark.parametrize("place", ["up_blocks.0", "up_blocks.0.attentions.0"], ids=["stage", "block"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_copy_of_a_unet_with_a_part_whose_forward_is_compiled_is_refused(unet, inputs, place, before):
    if before and place.endswith("attentions.0"):
        pytest.skip("apply refuses a block whose forward is another's")
    part = unet.get_submodule(place)
    if before:
        part.forward = torch.compile(part.forward, backend="eager")
    atedm.apply(unet, PUBLISHED, **CHOICES)
    if not before:
        part.forward = torch.compile(part.forward, backend="eager")
    expected = run(unet, inputs)
    twin = copy.deepcopy(unet)
    with pytest.raises(RuntimeError, match="is a copy, and its compiled forward runs what it was copied from"):
        run(twin, inputs)
    assert_same(run(unet, inputs), expected)


def leaving_out(block):
    """Wrap ``block``; a call pops the first entry of the list that this returns, and leaves atedm out if it is true."""
    ours, left_out = block.forward, []

    def wrapped(*args, **kwargs):
        return type(block).forward(block, *args, **kwargs) if left_out and left_out.pop(0) else ours(*args, **kwargs)

    block.forward = wrapped
    return left_out


@pytest.mark.parametrize("compiled", [False, True])
def test_a_block_that_was_left_out_of_the_first_call_has_no_earlier_pictures_memory(unet, make_inputs, compiled):
    """By what wraps it: then it runs whole the first time that it is asked."""
    if compiled:
        unet.up_blocks[0].compile(backend="eager")  # then pictures share their memory
    atedm.apply(unet, PUBLISHED, **OURS | {"schedule": None})
    block = unet.down_blocks[1].attentions[0]
    first, second = make_inputs(seed=1), make_inputs(seed=2)
    left_out = leaving_out(block)

    def picture(*which):
        left_out[:] = which
        return run(unet, first)

    whole_twice = picture(False, True)[:2]
    assert_same(picture(True)[:2], whole_twice)
    expected = picture(True)
    run(unet, second)
    assert_same(picture(True), expected)


@pytest.mark.parametrize("compiled", ["up_blocks.0", "down_blocks.1", "down_blocks.1.attentions.0"])
def test_a_block_that_was_left_out_of_a_choice_has_no_earlier_pictures_choice(unet, make_inputs, compiled):
    """By what wraps it: then it chooses the first time that it is asked, also where parts are compiled."""
    atedm.apply(unet, PUBLISHED, **CHOICES)
    block = unet.down_blocks[1].attentions[0]
    first, second = make_inputs(seed=1), make_inputs(seed=2)
    left_out = leaving_out(block)

    def picture():
        left_out[:] = [True]
        return run(unet, first)

    expected = picture()
    unet.get_submodule(compiled).compile(backend="eager")  # then pictures share their memory
    assert_same(picture(), expected)
    run(unet, second)
    assert_same(picture(), expected)
    raising_once(unet.up_blocks[-1], OSError("stop"))
    with pytest.raises(OSError, match="stop"):  # after the block has chosen
        run(unet, second)
    assert_same(picture(), expected)


def test_a_copy_of_a_unet_with_a_compiled_forward_is_refused(unet, inputs):
    unet.forward = torch.compile(unet.forward, backend="eager")
    atedm.apply(unet, PUBLISHED, **OURS)
    twin = copy.deepcopy(unet)
    with pytest.raises(RuntimeError, match="the UNet2DConditionModel is a copy, and its compiled forward"):
        run(twin, inputs)
    del twin.forward
    expected = expected_of(twin, inputs, **OURS)
    assert_same(run(twin, inputs), expected)
