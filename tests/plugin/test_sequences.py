"""Any order of applying, removing, generating and failing ends with the pipeline bit for bit as it was; nothing piles
up."""

import copy
import gc
import pickle

import psutil
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import atedm
from atedm.embedded import embedded_pipeline
from atedm.policy.options import PUBLISHED

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
    },
)
ACTIONS = st.one_of(
    st.tuples(st.just("apply"), OPTIONS),
    st.tuples(st.just("applied"), OPTIONS),
    st.tuples(st.just("refused"), st.sampled_from([{"ratio": 1.0}, {"levels": (9,)}, {"ration": 0.5}])),
    st.tuples(st.sampled_from(["remove", "generate", "record", "interrupt", "fail", "copy", "pickle"]), st.none()),
)


def around(unet, parts):
    pipe = StableDiffusionXLPipeline(**{**parts, "unet": unet})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(make_unet):
    """The embedded model's pipeline around a smaller UNet."""
    parts = embedded_pipeline().components
    first, second = parts["text_encoder"].config, parts["text_encoder_2"].config
    unet = make_unet(
        layers_per_block=1,
        transformer_layers_per_block=(1, 2, 2),
        cross_attention_dim=first.hidden_size + second.hidden_size,
        projection_class_embeddings_input_dim=6 * 8 + second.projection_dim,
    )
    return around(unet, parts)


def generate(pipe, **options):
    """Latents of two steps, of which the first is light, with guidance."""
    arguments = {"prompt": "a red circle", "num_inference_steps": 2, "height": 64, "width": 96, "output_type": "latent"}
    return pipe(**arguments, generator=torch.Generator().manual_seed(0), **options).images


def snapshot(pipe):
    unet = pipe.unet
    modules = {name: (id(module), sorted(module.__dict__)) for name, module in unet.named_modules()}
    parameters = {name: (id(p), p._version) for name, p in unet.named_parameters()}
    parts = {name: id(part) for name, part in pipe.components.items()}
    return modules, parameters, list(unet.state_dict()), parts, sorted(pipe.__dict__), dict(pipe.config)


@pytest.fixture
def as_it_was(pipe):
    """Before the first of all sequences: one pipeline goes through them in turn."""
    full = generate(pipe)
    return snapshot(pipe), full


def interrupt(pipe, step, timestep, tensors):
    pipe._interrupt = True
    return tensors


def fail(pipe, step, timestep, tensors):
    raise RuntimeError("stopped by hand")


def do(pipe, full, action, argument):
    if action == "apply":
        atedm.apply(pipe, PUBLISHED, **argument)
    elif action == "applied":
        with atedm.applied(pipe, PUBLISHED, **argument):
            generate(pipe)
    elif action == "refused":
        with pytest.raises((ValueError, TypeError)):
            atedm.apply(pipe, PUBLISHED, **argument)
    elif action == "remove":
        atedm.remove(pipe)
    elif action == "generate":
        assert generate(pipe).isfinite().all()
    elif action == "record" and atedm.pruned_blocks(pipe):
        with atedm.record(pipe) as recording:
            generate(pipe)
        assert recording.calls == [0, 1]
    elif action == "interrupt":
        generate(pipe, callback_on_step_end=interrupt)
    elif action == "fail":
        with pytest.raises(RuntimeError, match="stopped by hand"):
            generate(pipe, callback_on_step_end=fail)
    elif action == "copy":
        twin = copy.deepcopy(pipe)
        assert torch.equal(generate(twin), generate(pipe))
        assert torch.equal(generate(atedm.remove(twin)), full)
    elif action == "pickle":  # the UNet, because text encoders of transformers cannot be
        unet = pickle.loads(pickle.dumps(pipe.unet))
        assert atedm.pruned_blocks(unet) == atedm.pruned_blocks(pipe)
        assert torch.equal(generate(around(atedm.remove(unet), pipe.components)), full)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(actions=st.lists(ACTIONS, max_size=8))
def test_any_sequence_ends_where_it_began(pipe, as_it_was, actions):
    before, full = as_it_was
    for action, argument in actions:
        do(pipe, full, action, argument)
    atedm.remove(pipe)
    assert snapshot(pipe) == before
    assert not pipe.unet._forward_pre_hooks
    assert torch.equal(generate(pipe), full)


def test_two_hundred_calls_take_no_more_memory_than_twenty(unet_to_compile, inputs):
    unet, process = unet_to_compile, psutil.Process()
    atedm.apply(unet, PUBLISHED)

    def after(calls):
        for n in range(calls):
            unet(**{**inputs, "timestep": 999 - 4 * n})
        gc.collect()
        return process.memory_info().rss, len(gc.get_objects())

    memory, objects = after(20)
    later_memory, later_objects = after(200)
    assert later_objects - objects < 50
    assert later_memory - memory < 8 * 2**20  # a call's activations take more
