"""Every pipeline that diffusers makes of an SDXL UNet, pruned."""

import copy
import threading

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import atedm
from atedm.policy.options import PUBLISHED
from tests.helpers.running import PROMPT, STEPS, check, latents


def of(base, name, **more):
    """``base``'s parts in another pipeline."""
    pipe = getattr(diffusers, name).from_pipe(base, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def calls_of(recording):
    return len(recording.calls)


def test_text_to_image(base):
    _, _, recording = check(base)
    assert recording.calls == list(range(STEPS))


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_few_steps_without_guidance(base, guidance):
    """SDXL-Turbo and LCM: one row a picture, one to four steps."""
    pipe = of(base, "StableDiffusionXLPipeline")
    pipe.scheduler = diffusers.LCMScheduler.from_config(base.scheduler.config)
    for steps in (1, 4):
        _, _, recording = check(pipe, lambda n=steps: latents(pipe, guidance_scale=guidance, num_inference_steps=n))
        assert recording.steps == steps
        assert recording.ranked[0].index.shape[0] == 1


@pytest.mark.parametrize(
    "scheduler",
    ["EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "DDIMScheduler"],
)
def test_schedulers(base, scheduler):
    pipe = of(base, "StableDiffusionXLPipeline")
    config = {key: value for key, value in base.scheduler.config.items() if key != "trained_betas"}
    pipe.scheduler = getattr(diffusers, scheduler).from_config(config, beta_schedule="scaled_linear")
    # Four steps of theirs make no picture.
    _, _, recording = check(pipe, alike=-1)
    assert recording.calls == list(range(len(pipe.scheduler.timesteps)))


def test_one_choice_for_several_steps(base):
    def run(guidance, **options):
        with atedm.applied(base, PUBLISHED, ratio=0.25, **options), atedm.record(base) as recording:
            image = latents(base, guidance_scale=guidance)
        assert image.isfinite().all()
        return image, recording

    plain, own = run(5.0)
    cheaper, reused = run(5.0, rank_every=2)
    assert torch.cosine_similarity(plain.flatten(), cheaper.flatten(), dim=0) > 0.5
    assert len(reused.ranked) == len(own.ranked)
    ranked_at = {ranked.step for ranked in reused.ranked if ranked.iterations is not None}
    assert ranked_at == {0, 2}  # two of the four steps are light
    # A second image begins with a choice of its own.
    with atedm.applied(base, PUBLISHED, ratio=0.25, rank_every=4, schedule=None):
        first, second = (latents(base, guidance_scale=1.0) for _ in range(2))
    assert torch.equal(first, second)


def test_batches_and_several_images_a_prompt(base):
    _, _, recording = check(base, lambda: latents(base, prompt=[PROMPT, "a green star"], num_images_per_prompt=2))
    assert recording.ranked[0].index.shape[0] == 8


def test_image_to_image_counts_steps_from_where_it_starts(base, picture):
    pipe = of(base, "StableDiffusionXLImg2ImgPipeline")
    _, _, recording = check(pipe, lambda: latents(pipe, image=picture, strength=0.5))
    assert recording.calls == [2, 3]


def test_inpainting(base, picture):
    mask = Image.fromarray(np.pad(np.full((20, 20), 255, np.uint8), 22))
    pipe = of(base, "StableDiffusionXLInpaintPipeline")
    size = {"width": picture.width, "height": picture.height}
    _, pruned, _ = check(pipe, lambda: latents(pipe, image=picture, mask_image=mask, strength=0.9, **size))
    assert pruned.shape[-1] == picture.width // pipe.vae_scale_factor


def test_base_and_refiner(base):
    refiner = of(base, "StableDiffusionXLImg2ImgPipeline", unet=copy.deepcopy(base.unet))
    refiner.scheduler = copy.deepcopy(base.scheduler)

    def both():
        noisy = latents(base, denoising_end=0.5)
        return latents(refiner, image=noisy, denoising_start=0.5)

    full = both()
    with (
        atedm.applied(base, PUBLISHED, ratio=0.5),
        atedm.applied(refiner, PUBLISHED, ratio=0.5),
        atedm.record(base) as first,
        atedm.record(refiner) as second,
    ):
        pruned = both()
    assert first.ranked and second.ranked
    assert first.calls == [0, 1] and second.calls == [2, 3]
    assert pruned.isfinite().all() and not torch.equal(pruned, full)
    assert torch.equal(both(), full)


@pytest.fixture
def controlnet(base):
    torch.manual_seed(0)
    net = diffusers.ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(16, 32, 64)).eval()
    with torch.no_grad():
        for parameter in net.parameters():  # its outputs are zero where it was not trained
            if not parameter.any():
                parameter.normal_(std=0.05)
    return net.requires_grad_(False)


def test_controlnet_residuals_still_add_up(base, picture, controlnet):
    pipe = of(base, "StableDiffusionXLControlNetPipeline", controlnet=controlnet)

    def call(scale=1.0):
        return latents(pipe, image=picture, controlnet_conditioning_scale=scale, num_inference_steps=1)

    full, pruned, _ = check(pipe, call)
    # They count as much for the pruned UNet as for the full one.
    without = call(0.0)
    with atedm.applied(pipe, PUBLISHED, ratio=0.25):
        pruned_without = call(0.0)
    effect = (pruned - pruned_without).flatten(), (full - without).flatten()
    assert torch.cosine_similarity(*effect, dim=0) > 0.5


def test_t2i_adapter(base, picture):
    torch.manual_seed(0)
    adapter = diffusers.T2IAdapter(
        in_channels=3, channels=[24, 48, 96, 96], num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter_xl"
    )
    pipe = of(base, "StableDiffusionXLAdapterPipeline", adapter=adapter.eval().requires_grad_(False))
    check(pipe, lambda: latents(pipe, image=picture))


@pytest.fixture
def with_image_prompt(base):
    """A pipeline with an IP-Adapter of random weights, and the arguments for an image prompt."""
    unet = copy.deepcopy(base.unet)
    width, embedding = unet.config.cross_attention_dim, 16
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator) * 0.1

    attention, key = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            module = unet.get_submodule(name.removesuffix(".processor"))
            attention[f"{key}.to_k_ip.weight"] = normal(module.inner_dim, width)
            attention[f"{key}.to_v_ip.weight"] = normal(module.inner_dim, width)
            key += 2
    projection = {"proj.weight": normal(4 * width, embedding), "proj.bias": normal(4 * width)}
    projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": attention}])
    pipe = of(base, "StableDiffusionXLPipeline", unet=unet)
    return pipe, {"ip_adapter_image_embeds": [torch.ones(2, 1, embedding)]}


def test_ip_adapter(with_image_prompt):
    pipe, prompt = with_image_prompt
    check(pipe, lambda: latents(pipe, **prompt))


def test_ip_adapter_with_a_mask(with_image_prompt):
    pipe, prompt = with_image_prompt

    def masked(mask):
        return latents(pipe, **prompt, cross_attention_kwargs={"ip_adapter_masks": [mask]})

    left = torch.zeros(1, 1, 64, 64)
    left[..., :32] = 1.0
    check(pipe, lambda: masked(left))
    for placement in ("early", "paper"):
        with atedm.applied(pipe, PUBLISHED, ratio=0.5, placement=placement):
            unmasked = latents(pipe, **prompt)
            torch.testing.assert_close(masked(torch.ones_like(left)), unmasked)
            assert not torch.allclose(masked(left), unmasked, atol=1e-2)
            with pytest.raises(ValueError, match="Number of masks"):
                masked(torch.ones(1, 2, 64, 64))


@pytest.mark.parametrize("layers", ["mid", ["mid_block", "down_blocks.1", "up_blocks.1"]])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_perturbed_attention_guidance(base, layers, guidance):
    parts = {**base.components, "unet": copy.deepcopy(base.unet)}
    pipe = diffusers.StableDiffusionXLPAGPipeline(**parts, pag_applied_layers=layers)
    pipe.set_progress_bar_config(disable=True)
    full, _, recording = check(pipe, lambda: latents(pipe, guidance_scale=guidance, pag_scale=2.0))
    assert recording.ranked[0].index.shape[0] == (3 if guidance > 1 else 2)
    # Queries of the kept tokens alone; the perturbed part takes its own values at those.
    options = {"schedule": None, "ranking": None, "staleness": "steps", "ratio": 0.1}
    with atedm.applied(pipe, **options), atedm.record(pipe) as recording:
        pruned = latents(pipe, guidance_scale=guidance, pag_scale=2.0)
    assert recording.kinds == ["whole", "pruned", "pruned", "pruned"]
    assert not torch.equal(pruned, full) and torch.cosine_similarity(pruned.flatten(), full.flatten(), dim=0) > 0.9


def test_free_u(base):
    pipe = of(base, "StableDiffusionXLPipeline", unet=copy.deepcopy(base.unet))
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4)
    check(pipe)


@pytest.mark.parametrize("size", [(64, 64), (64, 192), (104, 72), (256, 32)])
def test_sizes_and_shapes(base, size):
    width, height = size
    _, _, recording = check(base, lambda: latents(base, width=width, height=height, num_inference_steps=1), alike=0.3)
    side = base.vae_scale_factor * 2
    assert (recording.ranked[0].width, recording.ranked[0].height) == (-(-width // side), -(-height // side))


def test_callbacks_and_interrupted_generation(base):
    seen = []

    def stop(pipe, step, timestep, tensors):
        seen.append(step)
        pipe._interrupt = step >= 1
        return tensors

    with atedm.applied(base, PUBLISHED, ratio=0.5), atedm.record(base) as recording:
        latents(base, callback_on_step_end=stop)
    assert calls_of(recording) == 2 and seen == [0, 1]
    full = latents(base)
    with atedm.applied(base, PUBLISHED, ratio=0.5):

        def fail(pipe, step, timestep, tensors):
            raise RuntimeError("stopped by hand")

        with pytest.raises(RuntimeError, match="stopped by hand"):
            latents(base, callback_on_step_end=fail)
    assert torch.equal(latents(base), full)


def test_two_pipelines_in_two_threads(base):
    pipes = [of(base, "StableDiffusionXLPipeline", unet=copy.deepcopy(base.unet)) for _ in range(2)]
    for pipe, ratio in zip(pipes, (0.3, 0.7), strict=True):
        # A pipeline a thread shares neither: both keep state between calls, a fast tokenizer its padding.
        for part in ("scheduler", "tokenizer", "tokenizer_2"):
            setattr(pipe, part, copy.deepcopy(getattr(base, part)))
        atedm.apply(pipe, PUBLISHED, ratio=ratio)
    alone = [latents(pipe) for pipe in pipes]
    together = [None, None]

    def run(n):
        together[n] = latents(pipes[n])

    threads = [threading.Thread(target=run, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not torch.equal(*alone)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_another_attention_processor(base):
    unet = copy.deepcopy(base.unet)
    pipe = of(base, "StableDiffusionXLPipeline", unet=unet)
    unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    check(pipe)
    unet.fuse_qkv_projections()
    check(pipe)
    with diffusers.models.attention_dispatch.attention_backend("native"):
        check(pipe)


def test_attention_slicing(base):
    pipe = of(base, "StableDiffusionXLPipeline", unet=copy.deepcopy(base.unet))
    pipe.enable_attention_slicing()
    check(pipe)


def test_a_scheduler_exchanged_after_apply_is_followed(base):
    pipe = of(base, "StableDiffusionXLPipeline")
    with atedm.applied(pipe, PUBLISHED, ratio=0.5), atedm.record(pipe) as recording:
        pipe.scheduler = diffusers.DDIMScheduler.from_config(base.scheduler.config, beta_schedule="scaled_linear")
        latents(pipe, num_inference_steps=10)
    assert recording.calls == list(range(10))
    whole = [name for name, _, _ in recording.blocks if sum(r.block == name for r in recording.ranked) == 7]
    assert "down_blocks.1.attentions.0" in whole  # left whole in the first 3 of 10


def test_nothing_to_prune_is_said_once(base, caplog):
    with atedm.applied(base, PUBLISHED, ratio=0.5, keep_multiple=4096), caplog.at_level("WARNING", logger="atedm"):
        latents(base)
        latents(base)
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and "nothing is pruned there" in said[0]


# On the CPU the hooks are the same, and move nothing.
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_model_offload(base, device):
    pipe = diffusers.StableDiffusionXLPipeline(**copy.deepcopy(base.components))
    pipe.enable_model_cpu_offload(device=device)
    full, _, _ = check(pipe)
    if device == "cpu":
        # On top of what has been applied, and taken away before it.
        pipe.remove_all_hooks()
        pruned = latents(atedm.apply(pipe, PUBLISHED, ratio=0.25))
        pipe.enable_model_cpu_offload(device=device)
        assert torch.equal(latents(pipe), pruned)
        assert torch.equal(latents(atedm.remove(pipe)), full)


def test_sequential_offload_of_a_pruned_unet(base):
    """Every module of the UNet gets a hook of accelerate's around its forward, ours too."""
    pipe = diffusers.StableDiffusionXLPipeline(**copy.deepcopy(base.components))
    full = latents(pipe)
    pruned = latents(atedm.apply(pipe, PUBLISHED, ratio=0.25))
    accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    assert pipe.unet.conv_in.weight.is_meta
    assert torch.equal(latents(pipe), pruned)
    assert torch.equal(latents(atedm.remove(pipe)), full)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offload(base, offload_type):
    pipe = diffusers.StableDiffusionXLPipeline(**copy.deepcopy(base.components))
    cpu = torch.device("cpu")
    pipe.unet.enable_group_offload(cpu, cpu, offload_type=offload_type, num_blocks_per_group=1)
    if offload_type == "block_level":  # a group is a whole stage, which a reused step would leave out
        with pytest.raises(
            ValueError, match=r"forward of down_blocks\.0 .*; expected a schedule without 'reused' steps"
        ):
            atedm.apply(pipe)
    check(pipe, schedule=None)
