"""The methods to make a UNet cheaper: what they cost, counted independently, and that they leave nothing behind."""

from types import SimpleNamespace

import pytest
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import atedm
from atedm.app.flops import UNetFlops
from atedm.app.models import SDXL_UNET, unet_inputs
from atedm_bench.methods import Costs, DeepCache, Ours, RandomTokens, ToMe
from atedm_bench.quality.settings import FULL, Plan
from atedm_bench.random_unet import random_unet

SMALL = {
    **SDXL_UNET,
    "block_out_channels": (32, 64, 128),
    "attention_head_dim": (1, 2, 4),
    "transformer_layers_per_block": (1, 1, 2),
    "cross_attention_dim": 32,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
SIZE, TOKENS = 64, 7


@pytest.fixture(scope="module")
def counter():
    return UNetFlops(SMALL, width=SIZE, height=SIZE, tokens=TOKENS)


@pytest.fixture
def unet():
    return random_unet(SMALL, dtype=torch.float32, device=torch.device("cpu"))


def run(unet, scheduler):
    """Call ``unet`` as a pipeline does, once for each of the scheduler's timesteps."""
    (sample, _, text), kwargs = unet_inputs(unet, width=SIZE, height=SIZE, tokens=TOKENS)
    with torch.no_grad():
        return [unet(sample, timestep, text, **kwargs)[0] for timestep in scheduler.timesteps]


# As the embedded model's: some of its timesteps are equal.
KARRAS = DPMSolverMultistepScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    rescale_betas_zero_snr=True,
    timestep_spacing="trailing",
    use_karras_sigmas=True,
)


@pytest.mark.parametrize("interval", [2, 3])
@pytest.mark.parametrize(("scheduler", "steps"), [(EulerDiscreteScheduler(), 7), (KARRAS, 25)], ids=["euler", "karras"])
def test_deepcaches_flops_are_those_of_a_run(counter, unet, scheduler, steps, interval):
    scheduler.set_timesteps(steps)
    helper = DeepCacheSDHelper(pipe=SimpleNamespace(unet=unet, scheduler=scheduler))
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()
    # Torch counts no fused attention of the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as mode:
        run(unet, scheduler)
    helper.disable()
    costs, method = Costs(counter, scheduler.timesteps), DeepCache(interval)
    kinds = method.kinds(costs)
    assert kinds[0] == "whole" and set(kinds) == {"whole", "reused"} and len(kinds) == steps
    assert method.flops(costs, kinds).unet == pytest.approx(mode.get_total_flops() / steps, rel=1e-6)
    assert method.flops(costs, ["whole"]) == counter.full()


def test_deepcache_finds_the_first_of_equal_timesteps(counter):
    """DPM++ with Karras' steps has some, so DeepCache does not compute every second step there."""
    found = DeepCache(2).kinds(Costs(counter, torch.tensor([999, 999, 998, 997, 997, 990])))
    assert "".join(kind[0] for kind in found) == "wwwrrr"


def options(**changes):
    return atedm.Options(ratio=0.5, **changes)


@pytest.mark.parametrize(
    "method",
    [
        DeepCache(2),
        ToMe(0.5),
        Ours(options(schedule=atedm.Every(2))),
        RandomTokens(options(schedule=None, recovery="cached")),
    ],
    ids=lambda method: type(method).__name__,
)
def test_a_method_changes_the_unet_and_leaves_it_as_it_was(unet, method):
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    before = run(unet, scheduler)
    # atedm takes a UNet or a whole pipeline; its peers take what they need of one.
    target = unet if isinstance(method, Ours) else SimpleNamespace(unet=unet, scheduler=scheduler)
    with pytest.raises(KeyboardInterrupt), method.in_force(target) as start:
        start(3)
        changed = run(unet, scheduler)
        raise KeyboardInterrupt
    assert not all(torch.equal(a, b) for a, b in zip(before, changed, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, run(unet, scheduler), strict=True))
    assert not [name for name, module in unet.named_modules() if "forward" in module.__dict__]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"schedule": atedm.DSAP()}, "published"),
        ({"schedule": None, "recovery": "cached"}, "tokens alone"),
        ({"schedule": None, "staleness": "drift"}, "tokens alone"),
        ({"schedule": atedm.Adaptive(0.3)}, "reuse alone"),
        ({"schedule": atedm.Adaptive(0.3, pruned_from=0.5)}, "both"),
    ],
)
def test_lines_of_the_plot(changes, line):
    asked = {"ranking": "self", "recovery": "similarity", "staleness": None, **changes}
    assert Ours(options(**asked)).line == line


@pytest.fixture
def costs(counter):
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    return Costs(counter, scheduler.timesteps)


def test_presets_are_settings_as_they_are(costs):
    found = Plan(costs).settings(["presets"])
    assert found[0] == FULL
    assert {s.name: s.method.options for s in found[1:]} == dict(atedm.PRESETS)


def test_settings_of_a_share_cost_as_much_in_mean_over_a_run(costs):
    plan = Plan(costs)
    wanted = ["tomesd 55 %", "random 55 %", "drift 55 %", "PageRank × drift 55 %"]
    for setting in plan.settings(wanted)[1:]:
        kinds = setting.method.options.kinds_of(10) if setting.method.records else setting.method.kinds(costs)
        part = setting.method.flops(costs, kinds).unet / plan.full
        assert setting.note or part == pytest.approx(0.55, rel=0.02)
        if setting.method.records:
            assert kinds == ["whole"] + ["pruned"] * 9


def test_tried_settings_run_alone_or_beside_those_asked_for(costs):
    mine = options(schedule=atedm.Adaptive(0.4))
    plan = Plan(costs, {"mine": mine})
    assert [s.name for s in plan.settings()] == ["full", "mine"]
    found = plan.settings(["DeepCache 2"])
    assert [(s.name, s.group) for s in found[1:]] == [("DeepCache 2", "peers"), ("mine", "tried")]
    assert found[2].method == Ours(mine)


@pytest.mark.parametrize("name", ["full", "DeepCache 2", "DeepCache--2", "", "%"])
def test_a_tried_name_must_be_new_and_make_a_folder(costs, name):
    with pytest.raises(ValueError, match="try names"):
        Plan(costs, {name: options()}).settings()
