"""What other tools do to a UNet after ``apply`` is refused at the next call, as ``apply`` refuses it afterwards."""

import asyncio
import contextlib
import copy
import functools
import pickle
import re
import threading

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import Transformer2DModel
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from torch import nn

import atedm
from atedm.policy.options import PUBLISHED
from atedm.unet.block import PrunedBlock
from tests.helpers.other_tools import BLOCK, CHANGES, FIRST_BLOCK, OF_EVERY_BLOCK, block_of, double, replace_forward


@pytest.fixture
def unet(make_unet):
    """Every level and kind of block, in half the time."""
    return make_unet(layers_per_block=1)


@pytest.fixture
def unet_to_compile(make_unet):
    """Attention in the middle alone, where the changes are made: compiled in half the time."""
    return make_unet(
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(1, 2),
        layers_per_block=1,
    )


def test_another_output_of_the_blocks_class_is_refused_too(unet, inputs, monkeypatch):
    atedm.apply(unet, PUBLISHED, schedule=None)
    expected = unet(**inputs).sample
    kind, name = type(block_of(unet)), "_get_output_for_continuous_inputs"
    own = getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda *args, **kwargs: own(*args, **kwargs))
    with pytest.raises(ValueError, match="its class, or the forward of its class, has changed"):
        unet(**inputs)
    monkeypatch.undo()
    assert torch.equal(unet(**inputs).sample, expected)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_refused_in_either_order(unet, inputs, name):
    change, reason = CHANGES[name]
    block, reason = re.escape(FIRST_BLOCK if name in OF_EVERY_BLOCK else BLOCK), re.escape(reason)
    atedm.apply(unet, PUBLISHED, schedule=None)
    unet(**inputs)
    change(unet)
    with pytest.raises(ValueError, match=f"^{block} can no longer be pruned: {reason}.*; undo that, or call atedm"):
        unet(**inputs)
    atedm.remove(unet)
    with pytest.raises(ValueError, match=f"^{block} cannot be pruned: {reason}"):
        atedm.apply(unet, PUBLISHED, schedule=None)


@pytest.mark.parametrize("name", ["forward of every attention", "pyramid attention broadcast"])
def test_so_is_what_counts_the_steps_where_steps_are_reused(unet, inputs, name):
    options = {"schedule": ["whole", "reused"], "ratio": 0}
    change, reason = CHANGES[name]
    block, reason = re.escape(FIRST_BLOCK), re.escape(reason)
    atedm.apply(unet, PUBLISHED, **options)
    unet(**inputs)
    change(unet)
    with pytest.raises(ValueError, match=f"^{block} can no longer be left out of reused steps: {reason}"):
        unet(**inputs)
    atedm.remove(unet)
    with pytest.raises(
        ValueError, match=f"^the UNet's features cannot be reused: {block} must run in every step: {reason}"
    ):
        atedm.apply(unet, PUBLISHED, **options)


@pytest.mark.parametrize("kind", [BasicTransformerBlock, Attention, FeedForward])
def test_a_forward_replaced_in_a_class_of_diffusers_is_refused_in_either_order(monkeypatch, unet, inputs, kind):
    atedm.apply(unet, PUBLISHED, schedule=None)
    unet(**inputs)
    original = kind.forward

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", forward)
    reason = f"the forward of the class {kind.__name__} has been replaced by another tool"
    with pytest.raises(ValueError, match=f"can no longer be pruned: {reason}"):
        unet(**inputs)
    atedm.remove(unet)
    with pytest.raises(ValueError, match=f"cannot be pruned: {reason}"):
        atedm.apply(unet, PUBLISHED, schedule=None)
    monkeypatch.undo()
    atedm.apply(unet, PUBLISHED, schedule=None)
    unet(**inputs)


def test_a_subclass_that_calls_super_is_refused(unet):
    class Own(Transformer2DModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    block_of(unet).__class__ = Own
    with pytest.raises(ValueError, match=r"mid_block\.attentions\.0 cannot be pruned: the forward of its class Own"):
        atedm.apply(unet, PUBLISHED, schedule=None)


def compile_forward(unet):
    unet.forward = torch.compile(unet.forward, backend="eager")


COMPILED = {
    "UNet": lambda unet: unet.compile(backend="eager"),
    "forward": compile_forward,
    "stages": lambda unet: [stage.compile(backend="eager") for stage in (*unet.down_blocks, unet.mid_block)],
    "blocks": lambda unet: [unet.get_submodule(name).compile(backend="eager") for name in atedm.pruned_blocks(unet)],
    "layers": lambda unet: unet.compile_repeated_blocks(backend="eager"),
}


@pytest.mark.parametrize(
    ("compiled", "change"),
    [
        ("UNet", "forward of a later attention"),
        *((part, "processor of a cross-attention") for part in COMPILED if part != "UNet"),
    ],
)
def test_a_compiled_unet_refuses_it_too(unet_to_compile, fresh_compiler, inputs, compiled, change):
    unet = unet_to_compile
    if compiled == "UNet":
        COMPILED[compiled](unet)
    atedm.apply(unet, PUBLISHED, schedule=None)
    if compiled != "UNet":
        COMPILED[compiled](unet)
    unet(**inputs)
    CHANGES[change][0](unet)
    with pytest.raises(ValueError, match=r"attentions\.\d can no longer be pruned"):
        unet(**inputs)


def test_an_exchanged_class_is_refused_or_taken_never_left_out(unet, inputs):
    options = {"schedule": None}
    atedm.apply(unet, PUBLISHED, **options)
    unet(**inputs)
    kind = type(block_of(unet))
    double(block_of(unet))
    with pytest.raises(
        ValueError, match=r"mid_block\.attentions\.0 can no longer be pruned: its class, or the forward"
    ):
        unet(**inputs)
    atedm.remove(unet)
    atedm.apply(unet, PUBLISHED, **options)  # the same settings as those that were removed, but of another class
    doubled = unet(**inputs).sample
    block_of(unet).__class__ = kind
    atedm.apply(unet, PUBLISHED, **options)
    assert not torch.allclose(unet(**inputs).sample, doubled)


@pytest.mark.parametrize("place", ["mid_block.attentions.0", "mid_block", "up_blocks.0"])
def test_an_exchanged_block_is_refused(make_unet, unet, inputs, place):
    atedm.apply(unet, PUBLISHED, schedule=None)
    pruned = unet(**inputs).sample
    own, other = unet.get_submodule(place), make_unet(seed=9, layers_per_block=1)
    unet.set_submodule(place, other.get_submodule(place))
    with pytest.raises(ValueError, match="can no longer be pruned: another module has taken its place"):
        unet(**inputs)
    unet.set_submodule(place, own)
    assert torch.equal(unet(**inputs).sample, pruned)
    unet.set_submodule(place, other.get_submodule(place))
    atedm.apply(unet, PUBLISHED, schedule=None)
    assert not torch.equal(unet(**inputs).sample, pruned)


def test_so_is_an_exchanged_block_that_counts_the_steps_though_it_is_not_pruned(make_unet, unet, inputs):
    atedm.apply(unet, PUBLISHED, schedule=["whole", "reused"], ratio=0)
    expected = unet(**inputs).sample
    own, other = unet.get_submodule(FIRST_BLOCK), make_unet(layers_per_block=1).get_submodule(FIRST_BLOCK)
    unet.set_submodule(FIRST_BLOCK, other)
    assert torch.equal(unet(**inputs).sample, expected)
    replace_forward(other.transformer_blocks[0].attn2)
    with pytest.raises(ValueError, match=f"^{re.escape(FIRST_BLOCK)} can no longer be left out of reused steps"):
        unet(**inputs)
    unet.set_submodule(FIRST_BLOCK, own)
    assert torch.equal(unet(**inputs).sample, expected)


@pytest.mark.parametrize("change", ["class", "module"])
def test_an_exchanged_stage_is_refused(make_unet, unet, inputs, change):
    options, timesteps = {"schedule": ["whole", "reused"], "ratio": 0}, torch.tensor([999.0, 1.0])
    atedm.apply(unet, PUBLISHED, **options)
    for timestep in timesteps:
        unet(**{**inputs, "timestep": timestep})
    if change == "class":
        double(unet.down_blocks[1])
    else:
        unet.up_blocks[-1] = make_unet(seed=9, layers_per_block=1).up_blocks[-1]
    with pytest.raises(ValueError, match="can no longer be reused: it or its class has changed"):
        unet(**inputs)
    if change == "module":
        atedm.apply(unet, PUBLISHED, **options)  # equal settings, another module
        for timestep in timesteps.clone():
            assert unet(**{**inputs, "timestep": timestep}).sample.isfinite().all()


def test_projections_that_diffusers_left_behind_fused_are_not_used(unet, inputs):
    unet.fuse_qkv_projections()
    unet.unfuse_qkv_projections()
    atedm.apply(unet, PUBLISHED, schedule=None, ratio=0.5)
    before = unet(**inputs).sample
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith(("attn1.to_v.weight", "attn1.to_q.weight")):
                parameter.mul_(1.5)
    after = unet(**inputs).sample
    assert not torch.allclose(after, before)
    unet.fuse_qkv_projections()  # anew, from the weights as they are
    torch.testing.assert_close(unet(**inputs).sample, after, rtol=1e-4, atol=1e-4)


def test_any_cleared_hook_is_said_under_hooks_of_accelerate_too(unet, inputs):
    full = unet(**inputs).sample
    atedm.apply(unet, PUBLISHED, schedule=None, recovery="cached")
    unet._forward_hooks.clear()
    with pytest.raises(RuntimeError, match=r"the forward hooks that atedm\.apply put on the UNet are gone"):
        unet(**inputs)
    for name in atedm.pruned_blocks(unet):
        add_hook_to_module(unet.get_submodule(name), AlignDevicesHook(execution_device="cpu"))
    unet._forward_pre_hooks.clear()
    atedm.remove(unet)
    assert torch.equal(unet(**inputs).sample, full)
    assert not any(isinstance(x, PrunedBlock) for module in unet.modules() for x in vars(module).values())


def test_cleared_hooks_are_said_and_apply_and_remove_still_work(unet, inputs):
    full = unet(**inputs).sample
    for options in ({}, {"schedule": None}, {"schedule": ["whole", "reused"], "ratio": 0}):
        atedm.apply(unet, PUBLISHED, **options)
        unet._forward_pre_hooks.clear()
        with pytest.raises(RuntimeError, match=r"the forward hooks that atedm\.apply put on the UNet are gone"):
            unet(**inputs)
    atedm.apply(unet, PUBLISHED)
    assert not torch.equal(unet(**inputs).sample, full)
    unet._forward_pre_hooks.clear()
    unet._forward_hooks.clear()
    atedm.remove(unet)
    assert all("forward" not in module.__dict__ for module in unet.modules())
    assert torch.equal(unet(**inputs).sample, full)


def test_hooks_of_accelerate_are_no_change(unet, inputs):
    atedm.apply(unet, PUBLISHED, schedule=None)
    expected = unet(**inputs).sample
    for name, module in unet.named_modules():
        if name.endswith(("attn1", "attn2", "ff")):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    assert torch.equal(unet(**inputs).sample, expected)
    atedm.remove(unet)
    atedm.apply(unet, PUBLISHED, schedule=None)
    assert torch.equal(unet(**inputs).sample, expected)


def test_a_block_exchanged_for_a_copy_of_itself_is_restored(unet, inputs):
    full = unet(**inputs).sample
    atedm.apply(unet, PUBLISHED, schedule=None)
    unet.mid_block.attentions[0] = copy.deepcopy(block_of(unet))
    atedm.remove(unet)
    assert all("forward" not in module.__dict__ for module in unet.modules())
    assert torch.equal(unet(**inputs).sample, full)
    atedm.apply(unet, PUBLISHED, schedule=None)
    assert len(atedm.pruned_blocks(unet)) == 7


def test_tracing_keeps_one_call_so_calls_must_be_alike(unet_to_compile, inputs):
    unet = unet_to_compile

    def trace():
        sample, text = inputs["sample"], inputs["encoder_hidden_states"]
        conditions = inputs["added_cond_kwargs"]
        wrapped = Traced(unet, conditions)
        return torch.jit.trace(wrapped, (sample, torch.tensor(500.0), text), check_trace=False), (sample, text)

    atedm.apply(unet, PUBLISHED)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace records a single call"):
        trace()
    atedm.apply(unet, PUBLISHED, schedule=None)
    traced, (sample, text) = trace()
    assert torch.allclose(traced(sample, torch.tensor(500.0), text), unet(**inputs).sample, rtol=1e-4, atol=1e-5)


class Traced(nn.Module):
    def __init__(self, unet, conditions):
        super().__init__()
        self.unet, self.conditions = unet, conditions

    def forward(self, sample, timestep, text):
        return self.unet(sample, timestep, text, added_cond_kwargs=self.conditions, return_dict=False)[0]


def test_exporting_keeps_one_call_too(unet_to_compile, inputs):
    unet = unet_to_compile
    arguments = ({**inputs, "timestep": torch.tensor(500.0)},)
    atedm.apply(unet, PUBLISHED, schedule=atedm.DSAP())
    with pytest.raises(Exception, match=r"for torch\.export, settings with which every step is alike"):
        torch.export.export(unet, (), *arguments, strict=False)
    atedm.apply(unet, PUBLISHED, schedule=None, recovery="similarity", staleness=None)
    torch.export.export(unet, (), *arguments, strict=False)


def test_blocks_of_applied_end_in_any_order(unet):
    first, second = atedm.applied(unet, PUBLISHED, ratio=0.3), atedm.applied(unet, PUBLISHED, levels=(3,))
    atedm.apply(unet, PUBLISHED, ratio=0.5)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert len(atedm.pruned_blocks(unet)) == 4  # those of the second
    second.__exit__(None, None, None)
    assert len(atedm.pruned_blocks(unet)) == 7  # what was applied before both
    atedm.remove(unet)


def test_another_task_inside_applied_is_refused(unet):
    async def job(ratio, seconds):
        with atedm.applied(unet, PUBLISHED, ratio=ratio):
            await asyncio.sleep(seconds)
            return len(atedm.pruned_blocks(unet))

    async def both():
        return await asyncio.gather(job(0.3, 0.02), job(0.5, 0.04), return_exceptions=True)

    first, second = asyncio.run(both())
    assert first == 7 and isinstance(second, RuntimeError) and "another task or thread" in str(second)
    assert atedm.pruned_blocks(unet) == []


def test_so_is_another_thread(unet):
    found = []

    def job():
        try:
            with atedm.applied(unet, PUBLISHED, ratio=0.5):
                found.append("applied")
        except RuntimeError as error:
            found.append(str(error))

    with atedm.applied(unet, PUBLISHED, ratio=0.3):
        thread = threading.Thread(target=job)
        thread.start()
        thread.join()
    assert len(found) == 1 and "another task or thread" in found[0]
    assert atedm.pruned_blocks(unet) == []


def test_a_scope_that_could_not_be_left_does_not_lock_the_unet(unet):
    with pytest.raises(RuntimeError, match="has been replaced since"), atedm.applied(unet, PUBLISHED, ratio=0.3):
        pruned = block_of(unet).forward
        block_of(unet).forward = lambda *args, **kwargs: None
    block_of(unet).forward = pruned
    atedm.remove(unet)
    with atedm.applied(unet, PUBLISHED, ratio=0.3):
        assert len(atedm.pruned_blocks(unet)) == 7


def test_recordings_end_in_any_order_and_compiling_works_again(unet):
    atedm.apply(unet, PUBLISHED)
    first, second = atedm.record(unet), atedm.record(unet)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    seen = []
    torch.compile(lambda x: x + 1, backend=lambda graph, _: seen.append(graph) or graph.forward)(torch.ones(1))
    assert seen


def test_nan_is_named_by_row_block_and_step(unet, inputs):
    timesteps = torch.tensor([999.0, 500.0, 1.0])
    atedm.apply(unet, PUBLISHED, schedule=None)
    inputs["sample"][1, 0, 0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"blocks\.1\.attentions\.0 ranks NaN in row 1 of the batch, at an unknown step"
    ):
        unet(**inputs)
    for recorded in (False, True):
        recording = atedm.record(unet) if recorded else contextlib.nullcontext()
        with recording, pytest.raises(atedm.RankedNaN, match="at step 2; expected numbers") as raised:
            unet(**{**inputs, "timestep": timesteps[2]})
        for error in (raised.value, pickle.loads(pickle.dumps(raised.value))):
            assert (error.block, error.step) == ("down_blocks.1.attentions.0", 2)
            assert (error.rows, error.batch) == ([1], 2)


def test_a_block_without_layers_stays_whole_and_a_warning_says_so(unet, inputs, caplog):
    block_of(unet).transformer_blocks = nn.ModuleList()
    atedm.apply(unet, PUBLISHED, schedule=None)
    assert "mid_block.attentions.0" not in atedm.pruned_blocks(unet)
    assert caplog.messages == ["mid_block.attentions.0: without layers there is nothing to prune, so it stays whole"]
    assert unet(**inputs).sample.isfinite().all()
