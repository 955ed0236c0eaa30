"""What only a GPU can show of the plug-in: the kernels in a UNet, modes of torch.compile that use CUDA graphs."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_map_only

import atedm
import atedm_kernels

pytestmark = pytest.mark.gpu

PUBLISHED = {"schedule": atedm.DSAP(), "recovery": "similarity", "staleness": None}
CACHED = {"schedule": None}
EVERY_KIND = {"schedule": ["whole", "light", "reused", "pruned", "reused", "whole"]}

MODES = {"backend cudagraphs": {"backend": "cudagraphs"}, "reduce-overhead": {"mode": "reduce-overhead"}}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    """Without TF32, whose rounding decides so many near ties otherwise that it hides every other difference."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def scheduler():
    """Its timesteps are on the GPU, as a pipeline's are: one on the host would keep a graph from being captured."""
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(6, device="cuda")
    return scheduler


def samples(unet, inputs, scheduler):
    inputs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("cuda"), inputs)
    # Cloned, because the next call of a CUDA graph writes over what an earlier one gave.
    return [unet(**{**inputs, "timestep": t}).sample.clone() for t in scheduler.timesteps]


def difference(got, expected):
    """Relative, in the l2 norm, of all samples together: a near tie decided otherwise changes a few pixels of one."""
    got, expected = torch.cat(got), torch.cat(expected)
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    "options",
    [
        PUBLISHED,
        CACHED,
        EVERY_KIND,
        {**PUBLISHED, "rank_every": 2},
        {**PUBLISHED, "ranking": "keys", "recovery": "keys", "grid": 2},
        {**CACHED, "ranking": None},
    ],
    ids=str,
)
def test_kernels_and_reference_prune_alike(make_unet, make_inputs, scheduler, options):
    unet, inputs = make_unet().to("cuda"), make_inputs(height=32, width=48)
    full = samples(unet, inputs, scheduler)
    atedm.apply(unet, scheduler=scheduler, **options)
    with atedm_kernels.backend("reference"):
        expected = samples(unet, inputs, scheduler)
    with atedm_kernels.backend("triton"):
        got = samples(unet, inputs, scheduler)
    assert difference(got, expected) < 0.1 * difference(full, expected)


@pytest.mark.parametrize(
    "options", [PUBLISHED, {**PUBLISHED, "schedule": None}, {**PUBLISHED, "rank_every": 3}, CACHED, EVERY_KIND], ids=str
)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_cuda_graph_modes(make_unet, make_inputs, scheduler, mode, options):
    unet, inputs = make_unet().to("cuda"), make_inputs()
    with torch.inference_mode():
        full = samples(unet, inputs, scheduler)
        expected = samples(atedm.apply(unet, scheduler=scheduler, **options), inputs, scheduler)
        compiled = torch.compile(unet, fullgraph=True, **mode)
        atedm.apply(compiled, scheduler=scheduler, **options)
        for _ in range(3):  # to warm up, to capture, to replay
            assert difference(samples(compiled, inputs, scheduler), expected) < 0.1 * difference(full, expected)
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("options", [PUBLISHED, CACHED, EVERY_KIND, {**PUBLISHED, "rank_every": 3}], ids=str)
def test_the_host_never_waits_in_a_pruned_call(make_unet, make_inputs, scheduler, options):
    unet, inputs = make_unet().to("cuda"), make_inputs()
    inputs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("cuda"), inputs)
    timesteps = list(scheduler.timesteps)
    atedm.apply(unet, scheduler=scheduler, **options)
    with torch.inference_mode(), atedm_kernels.backend("triton"):
        for waits in ("default", "error"):  # the first run compiles
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode(waits)
            try:
                for t in timesteps:
                    unet(**{**inputs, "timestep": t})
            finally:
                torch.cuda.set_sync_debug_mode("default")
