"""Gradients through a pruned UNet, against autograd through the slow implementation; and checkpoints."""

import weakref
from functools import partial

import pytest
import torch
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from torch.utils.checkpoint import checkpoint

import atedm
from atedm.policy.options import PUBLISHED
from atedm.policy.recovery import interpolate_bicubic
from atedm.unet import attention
from tests.helpers.running import timesteps_of
from tests.helpers.slow_pruning import slow_unet

FIXED = {"schedule": None, "tolerance": 0, "max_iterations": 5}


def gradients(unet, inputs, run=None):
    """Of the squared output, by every parameter, the latent and the text."""
    wanted = {name: inputs[name].clone().requires_grad_() for name in ("sample", "encoder_hidden_states")}
    inputs = {**inputs, **wanted}
    out = unet(**inputs).sample if run is None else run(unet, inputs)
    named = {**dict(unet.named_parameters()), **wanted}
    unet.zero_grad()
    out.square().sum().backward()
    return {name: each.grad for name, each in named.items()}


def assert_same(got, expected, tolerance=1e-9):
    assert got.keys() == expected.keys()
    assert all(each is not None for each in (*got.values(), *expected.values()))
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-12, name


@pytest.fixture
def trainable(make_unet):
    return make_unet(torch.float64).requires_grad_(True)


@pytest.mark.parametrize(
    ("placement", "ranking", "recovery"),
    [
        ("early", "self", "similarity"),
        ("paper", "self", "similarity"),
        ("early", "cross", "similarity"),
        ("paper", "cross", "keys"),
        ("early", "keys", "keys"),
    ],
)
def test_equal_those_through_the_slow_implementation(trainable, make_inputs, placement, ranking, recovery):
    inputs, chosen = make_inputs(torch.float64), {"ranking": ranking, "recovery": recovery}
    expected = gradients(trainable, inputs, lambda *a: slow_unet(*a, 0.63, (2, 3), **chosen))
    with atedm.applied(trainable, PUBLISHED, ratio=0.63, placement=placement, **FIXED, **chosen):
        got = gradients(trainable, inputs)
    assert_same(got, expected)
    whole = gradients(trainable, inputs)
    assert (whole["sample"] - got["sample"]).norm() > 0.01 * whole["sample"].norm()


def test_with_convolutional_projections(make_unet, make_inputs):
    unet, inputs = (
        make_unet(torch.float64, use_linear_projection=False).requires_grad_(True),
        make_inputs(torch.float64),
    )
    expected = gradients(unet, inputs, lambda *a: slow_unet(*a, 0.63, (2, 3)))
    with atedm.applied(unet, PUBLISHED, ratio=0.63, **FIXED):
        assert_same(gradients(unet, inputs), expected)


@pytest.mark.parametrize("recovery", ["zeros", "bicubic"])
def test_with_recoveries_that_copy_nothing(trainable, make_inputs, recovery):
    """Both placements compute the same, the one by an op and the other by torch's additions."""
    early, paper = (
        gradients(
            atedm.apply(trainable, PUBLISHED, recovery=recovery, placement=each, **FIXED), make_inputs(torch.float64)
        )
        for each in ("early", "paper")
    )
    assert_same(early, paper)


def test_a_part_that_is_frozen_gets_none(trainable, make_inputs):
    trainable.requires_grad_(False)
    trainable.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q.weight.requires_grad_(True)
    atedm.apply(trainable, PUBLISHED, **FIXED)
    trainable(**make_inputs(torch.float64)).sample.square().sum().backward()
    assert [name for name, each in trainable.named_parameters() if each.grad is not None] == [
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    ]


def gathered(monkeypatch):
    """The storages of what rows are gathered from, and of the rows, as weak references in the order of the calls."""
    memory, gather = [], attention.kernels.gather_tokens

    def gathering(x, index):
        rows = gather(x, index)
        memory.append((weakref.ref(x.untyped_storage()), weakref.ref(rows.untyped_storage())))
        return rows

    monkeypatch.setattr(attention.kernels, "gather_tokens", gathering)
    return memory


@pytest.mark.parametrize("ranking", ["self", "keys"])
def test_no_row_is_saved_beside_the_tensor_that_it_was_gathered_from(trainable, make_inputs, monkeypatch, ranking):
    """The kept rows of the attention's output are freed in the forward, and gathered again in the backward."""
    memory = gathered(monkeypatch)
    atedm.apply(trainable, PUBLISHED, ranking=ranking, **FIXED)
    out = trainable(**make_inputs(torch.float64)).sample
    blocks = len(atedm.pruned_blocks(trainable))
    # For each block of the attention's output, and then of the tokens.
    assert len(memory) == 2 * blocks and all(rows() is None for _, rows in memory[::2])
    out.sum().backward()
    assert len(memory) == 3 * blocks


def test_tokens_that_need_no_gradient_are_freed(trainable, make_inputs, monkeypatch):
    """In front of the first trained weight, as without pruning."""
    memory = gathered(monkeypatch)
    for name, parameter in trainable.named_parameters():
        parameter.requires_grad_("attn1" in name)
    atedm.apply(trainable, PUBLISHED, **FIXED)
    out = trainable(**make_inputs(torch.float64)).sample
    (attended, _), (tokens, _) = memory[:2]
    assert out.requires_grad and attended() is not None and tokens() is None


def test_bicubic_saves_no_map():
    x = torch.randn(2, 40, 64, requires_grad=True)
    index = torch.stack([torch.randperm(150)[:40].sort().values for _ in range(2)])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each):
        interpolate_bicubic(x, index, 10, 15)
    assert sum(each.numel() for each in saved if each.is_floating_point()) < 0.1 * x.numel()


def unforeseeable(q, k, lse):
    """Scores that no second call repeats. What it is given is there to choose by."""
    assert not (q.requires_grad or k.requires_grad or lse.requires_grad)
    return torch.rand(q.shape[0], 1, q.shape[2])


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("placement", ["early", "paper"])
def test_a_checkpoint_keeps_the_choice_of_its_call(trainable, make_inputs, placement, use_reentrant):
    atedm.apply(trainable, PUBLISHED, ranking=unforeseeable, placement=placement, schedule=None)
    inputs = make_inputs(torch.float64)
    found = []
    for checkpoints in (False, True):
        if checkpoints:
            trainable.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=use_reentrant))
        torch.manual_seed(0)
        with atedm.record(trainable) as recording:
            found.append((gradients(trainable, inputs), recording))
    (plain, recorded), (again, recorded_again) = found
    assert_same(again, plain)
    assert len(recorded_again.ranked) == len(recorded.ranked) == len(atedm.pruned_blocks(trainable))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_weights_of_a_ranking_get_no_gradient_and_save_nothing(trainable, make_inputs, use_reentrant):
    """Else a checkpoint, which chooses only once, would miss what they have saved."""
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    atedm.apply(trainable, PUBLISHED, ranking=lambda q, k, lse: (q * k * weight).sum(-1).exp(), schedule=None)
    inputs = make_inputs(torch.float64)
    with atedm.record(trainable) as recording:
        plain = gradients(trainable, inputs)
    assert recording.ranked and not any(each.scores.requires_grad for each in recording.ranked)
    trainable.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=use_reentrant))
    assert_same(gradients(trainable, inputs), plain)
    assert weight.grad is None


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("placement", ["early", "paper"])
def test_a_mask_gets_its_gradient_with_checkpoints_too(trainable, make_inputs, placement, use_reentrant):
    inputs = make_inputs(torch.float64)
    processors = dict(trainable.attn_processors)
    for name in (name for name in processors if "attn2" in name):
        width = trainable.get_submodule(name.removesuffix(".processor")).inner_dim
        text = inputs["encoder_hidden_states"].shape[2]
        processors[name] = IPAdapterAttnProcessor2_0(width, text, num_tokens=(4,), scale=[1.0]).double()
    trainable.set_attn_processor(processors)
    trainable.requires_grad_(False)
    mask = torch.rand(1, 1, 16, 24, dtype=torch.float64).requires_grad_()
    text = inputs["encoder_hidden_states"]
    inputs["encoder_hidden_states"] = text, [text[:, None, :4]]
    inputs["cross_attention_kwargs"] = {"ip_adapter_masks": [mask]}
    inputs["sample"].requires_grad_()  # a reentrant checkpoint needs one of its inputs

    def gradient():
        mask.grad = None
        trainable(**inputs).sample.square().sum().backward()
        return mask.grad

    atedm.apply(trainable, PUBLISHED, placement=placement, **FIXED)
    plain = gradient()
    assert plain is not None and plain.any()
    trainable.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=use_reentrant))
    torch.testing.assert_close(gradient(), plain)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_two_calls_with_checkpoints_before_one_backward(trainable, make_inputs, use_reentrant):
    """The second call is of another kind and size."""
    calls = [make_inputs(torch.float64, timestep=900), make_inputs(torch.float64, timestep=100, height=24)]
    atedm.apply(trainable, PUBLISHED, schedule=atedm.DSAP(0.3))

    def both(unet, inputs):
        of_all = inputs["sample"].mean() + inputs["encoder_hidden_states"].mean()
        first, second = (unet(**{**call, "sample": call["sample"] + of_all}).sample for call in calls)
        return torch.cat([first.flatten(), second.flatten()])

    plain = gradients(trainable, calls[0], both)
    trainable.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=use_reentrant))
    assert_same(gradients(trainable, calls[0], both), plain)


MEMORY = {
    "cached": {"recovery": "cached", "staleness": "drift", "schedule": None},
    "reused": {"schedule": atedm.Every(2), "ratio": 0},
    "adaptive": {"schedule": atedm.Adaptive()},
}


@pytest.mark.parametrize("name", MEMORY)
def test_where_something_is_remembered_a_call_for_gradients_is_whole(trainable, make_inputs, caplog, name):
    inputs = make_inputs(torch.float64)
    expected = gradients(trainable, inputs)
    atedm.apply(trainable, PUBLISHED, **MEMORY[name])
    with atedm.record(trainable) as recording:
        for _ in range(2):
            assert_same(gradients(trainable, inputs), expected, tolerance=0)
    assert recording.kinds == ["whole"] * 2
    said = [message for message in caplog.messages if "records gradients" in message]
    assert len(said) == len(caplog.messages) == 1 and said[0].endswith("it is computed whole")


@pytest.mark.parametrize(("name", "kinds"), [("cached", "wppp"), ("reused", "wrwr")])
def test_it_touches_nothing_that_is_remembered(trainable, make_inputs, name, kinds):
    inputs = make_inputs(torch.float64)
    atedm.apply(trainable, PUBLISHED, **MEMORY[name])

    def run(interrupts):
        outs = []
        for n, timestep in enumerate(timesteps_of(4)):
            call = {**inputs, "sample": inputs["sample"] + n, "timestep": timestep}
            with torch.no_grad():
                outs.append(trainable(**call).sample)
            if interrupts:
                gradients(trainable, {**call, "sample": call["sample"] + 1})
        return outs

    with atedm.record(trainable, tokens=False) as recording:
        plain = run(False)
    assert "".join(kind[0] for kind in recording.kinds) == kinds
    with atedm.record(trainable, tokens=False) as interrupted:
        assert all(torch.equal(a, b) for a, b in zip(run(True), plain, strict=True))
    assert interrupted.kinds[1::2] == ["whole"] * 4
    assert interrupted.schedule() == recording.schedule() == recording.kinds


def test_after_a_last_step_for_gradients_the_timesteps_may_serve_again(trainable, make_inputs, caplog):
    inputs, timesteps = make_inputs(torch.float64), timesteps_of(4)
    atedm.apply(trainable, PUBLISHED, **MEMORY["reused"])
    with atedm.record(trainable, tokens=False) as recording:
        for n, timestep in [*enumerate(timesteps)] * 2:
            with torch.set_grad_enabled(n == 3):
                trainable(**{**inputs, "timestep": timestep})
    assert "".join(kind[0] for kind in recording.kinds) == "wrww" * 2
    assert not [message for message in caplog.messages if "share these timesteps" in message]


@pytest.mark.parametrize("name", MEMORY)
def test_gradients_that_come_in_unseen_are_refused_not_cut(unet, make_inputs, name):
    """By a forward that brings in weights of its own, as some LoRA tools do. Without memory none is cut."""
    inputs, timesteps = make_inputs(), timesteps_of(14)
    added = torch.zeros(1, requires_grad=True)
    linear = unet.mid_block.attentions[0].transformer_blocks[0].ff.net[2]
    linear.forward = lambda x: type(linear).forward(linear, x) * (1 + added)
    atedm.apply(unet, PUBLISHED, **MEMORY[name])
    with pytest.raises(RuntimeError, match="records gradients of something that is neither"):
        unet(**{**inputs, "timestep": timesteps[0]})
    with torch.no_grad():
        for timestep in timesteps_of(14):
            unet(**{**inputs, "timestep": timestep})
    atedm.apply(unet, PUBLISHED, schedule=None)
    unet(**inputs).sample.sum().backward()
    assert added.grad is not None


@pytest.mark.parametrize("of", ["the timestep", "the text", "an adapter's text"])
def test_a_reused_step_refuses_those_that_come_in_on_the_way(unet, make_inputs, of):
    """They would go through the feature that it reuses."""
    added = torch.zeros(1, requires_grad=True)

    def change(module, args, kwargs):
        text = kwargs["encoder_hidden_states"] + added
        return args, {**kwargs, "encoder_hidden_states": text if of == "the text" else (text, [])}

    if of == "the timestep":
        unet.time_embedding.register_forward_hook(lambda module, args, out: out * (1 + added))
    atedm.apply(unet, PUBLISHED, **MEMORY["reused"])
    first, second, *_ = ({**make_inputs(), "timestep": timestep} for timestep in timesteps_of(4))
    with torch.no_grad():
        unet(**first)
    if of != "the timestep":
        unet.mid_block.register_forward_pre_hook(change, with_kwargs=True)
    with pytest.raises(RuntimeError, match="records gradients of something that is neither"):
        unet(**second)


def test_inputs_by_position_are_seen(unet, inputs, caplog):
    atedm.apply(unet, PUBLISHED, **MEMORY["cached"])
    sample = inputs["sample"].requires_grad_()
    known = inputs["added_cond_kwargs"]
    out = unet(sample, inputs["timestep"], inputs["encoder_hidden_states"], added_cond_kwargs=known).sample
    assert out.requires_grad and "records gradients" in caplog.messages[0]


@pytest.mark.parametrize("name", ["cached", "reused"])
def test_a_checkpoint_around_the_unet_is_right_or_refused(trainable, make_inputs, name):
    inputs = make_inputs(torch.float64)
    trainable.requires_grad_(False)
    atedm.apply(trainable, PUBLISHED, **MEMORY[name])

    def gradient(call, timesteps):
        x = start = inputs["sample"].clone().requires_grad_()
        for timestep in timesteps:
            x = call(lambda x, t=timestep: trainable(**{**inputs, "sample": x, "timestep": t}).sample, x)
        x.square().sum().backward()
        return start.grad

    again = timesteps_of(3)
    expected = gradient(lambda function, x: function(x), again)
    torch.testing.assert_close(gradient(partial(checkpoint, use_reentrant=False), again), expected)
    for timesteps in (timesteps_of(3), again):  # a later run, also one that the same timesteps serve
        with pytest.raises(RuntimeError, match="a reentrant checkpoint computes the UNet again"):
            gradient(partial(checkpoint, use_reentrant=True), timesteps)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("ranking", ["cross", unforeseeable], ids=["cross", "random"])
def test_a_checkpoint_draws_the_numbers_of_its_call(make_unet, make_inputs, ranking, use_reentrant):
    """Also those after a choice that has drawn some itself, by the dropout of its projections."""
    unet, inputs = make_unet(torch.float64, dropout=0.3).requires_grad_(True).train(), make_inputs(torch.float64)
    for layer in unet.modules():
        if isinstance(layer, Attention):
            layer.to_q = torch.nn.Sequential(layer.to_q, torch.nn.Dropout(0.3))
    atedm.apply(unet, PUBLISHED, ranking=ranking, schedule=None)
    found = []
    for checkpoints in (False, True):
        if checkpoints:
            unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=use_reentrant))
        torch.manual_seed(0)
        found.append(gradients(unet, inputs))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("options", [{"warm_start": True}, {"rank_every": 3}])
def test_without_a_start_of_its_own_a_ranking_prunes_all_the_same(trainable, make_inputs, caplog, options):
    inputs = make_inputs(torch.float64)
    expected = gradients(atedm.apply(trainable, PUBLISHED, schedule=None), inputs)
    atedm.apply(trainable, PUBLISHED, schedule=None, **options)
    assert_same(gradients(trainable, inputs), expected)
    assert len(caplog.messages) == 1 and "neither reads nor writes what is remembered" in caplog.messages[0]


@pytest.mark.parametrize("wanted", ["a parameter's", "an input's"])
def test_a_call_without_gradients_is_as_before_in_every_mode(unet, inputs, caplog, wanted):
    """Nothing asks for gradients: the memory is in use though they are enabled."""
    atedm.apply(unet, PUBLISHED, **MEMORY["cached"])
    unet(**inputs)
    assert not [message for message in caplog.messages if "records gradients" in message]
    unet.requires_grad_(True)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            unet(**inputs)
    assert not [message for message in caplog.messages if "records gradients" in message]
    caplog.clear()
    if wanted == "an input's":
        unet.requires_grad_(False)
        inputs["added_cond_kwargs"]["text_embeds"].requires_grad_()
    unet(**inputs)
    assert [message for message in caplog.messages if "records gradients" in message]


def test_compiled_forward_and_backward(unet_to_compile, make_inputs, fresh_compiler):
    """Pruned; and whole where something is remembered."""
    unet, inputs = unet_to_compile.requires_grad_(True), make_inputs()
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    whole = gradients(unet, inputs)
    with atedm.applied(compiled, PUBLISHED, schedule=None):
        expected = gradients(unet, inputs)
        got = gradients(unet, inputs, lambda _, inputs: compiled(**inputs).sample)
    assert_same(got, expected, tolerance=1e-4)
    assert (whole["sample"] - got["sample"]).norm() > 0.01 * whole["sample"].norm()
    with atedm.applied(compiled, PUBLISHED, **MEMORY["cached"]):
        assert_same(gradients(unet, inputs, lambda _, inputs: compiled(**inputs).sample), whole, tolerance=1e-4)


def test_a_ranking_that_breaks_the_graph(unet_to_compile, make_inputs, fresh_compiler):
    """torch cannot make a detached view again that its first part returns."""
    unet, inputs, asked = unet_to_compile.requires_grad_(True), make_inputs(), []

    @torch._dynamo.disable
    def agreement(q, k, lse):
        asked.append(q.requires_grad or k.requires_grad or lse.requires_grad)
        return (q * k).sum(-1)

    compiled = torch.compile(unet, backend="aot_eager")
    with atedm.applied(compiled, PUBLISHED, schedule=None, ranking=agreement):
        expected = gradients(unet, inputs)
        got = gradients(unet, inputs, lambda _, inputs: compiled(**inputs).sample)
    assert_same(got, expected, tolerance=1e-4)
    assert asked and not any(asked)
