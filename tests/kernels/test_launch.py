"""A kernel that has been compiled is started without Triton's own look-up, where Triton would find the same one."""

from __future__ import annotations

import pytest
import torch
import triton

import atedm_kernels as ak
from atedm_kernels import _launch
from atedm_kernels._launch import Launch
from atedm_kernels.ops.gather_pair import gather_pair


class Kernel:
    """In place of Triton's: notes what it is asked to compile, and how that is started."""

    arg_names = ("BLOCK", "x", "n", "scale", "y")

    def __init__(self):
        self.compiled, self.started = [], []

    def __getitem__(self, grid):
        def compile_and_start(**arguments):
            self.compiled.append((grid, arguments))
            return Compiled(self)

        return compile_and_start


class Compiled:
    function = 1

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.started.append((grid, arguments))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(_launch, "_compiled", {})
    monkeypatch.setattr(_launch, "triton_interprets", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return Kernel()


MEMORY = torch.zeros(64, dtype=torch.float32)


def launch(kernel, grid=5, block=64, warps=4, **changes):
    arguments = {"x": MEMORY[:16], "n": 48, "scale": 0.5, "y": None, **changes}
    return Launch(kernel, grid, arguments, {"BLOCK": block}, num_warps=warps)


def test_the_second_launch_is_of_what_the_first_compiled(kernel):
    launch(kernel).run()
    other = MEMORY[32:]  # aligned like the first
    again = launch(kernel, grid=7, x=other, n=96, scale=2.0)
    again.run()
    again.run()
    assert len(kernel.compiled) == 1
    assert [grid for grid, _ in kernel.started] == [(7, 1, 1)] * 2
    for _, (block, x, n, scale, y) in kernel.started:
        assert (block, n, scale, y) == (64, 96, 2.0, None) and x is other


@pytest.mark.parametrize(
    "change",
    [
        {"n": 1},
        {"n": 50},
        {"n": 2**31},
        {"n": 2**40},
        {"n": True},
        {"x": MEMORY[1:17]},
        {"x": MEMORY[:16].int()},
        {"y": MEMORY[:16]},
        {"block": 128},
        {"warps": 8},
    ],
    ids=str,
)
def test_what_triton_compiles_anew(kernel, change):
    launch(kernel).run()
    launch(kernel, **change).run()
    assert len(kernel.compiled) == 2 and not kernel.started
    launch(kernel, **change).run()
    assert len(kernel.compiled) == 2 and len(kernel.started) == 1


def test_each_device_has_its_own(kernel, monkeypatch):
    launch(kernel).run()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    launch(kernel).run()
    assert len(kernel.compiled) == 2


def test_what_is_still_being_compiled_is_not_kept(kernel, monkeypatch):
    monkeypatch.delattr(Compiled, "function")
    launch(kernel).run()
    launch(kernel).run()
    assert len(kernel.compiled) == 2 and not kernel.started


@pytest.mark.parametrize("why", ["amd", "interpreter", "debugged"])
def test_elsewhere_triton_looks_up(kernel, monkeypatch, why):
    if why == "amd":
        monkeypatch.setattr(torch.version, "hip", "6.4")
    elif why == "debugged":
        monkeypatch.setattr(triton.knobs.runtime, "debug", True)
    else:
        monkeypatch.setattr(_launch, "triton_interprets", lambda: True)
    launch(kernel).run()
    launch(kernel).run()
    assert len(kernel.compiled) == 2 and not kernel.started


@pytest.fixture
def started(monkeypatch):
    """The names of the kernels that are started, in order."""
    found, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda launch: (found.append(launch.kernel.__name__), run(launch)))
    return found


# A small map is not split, so that there is nothing to join: one launch less than SDXL takes.
@pytest.mark.parametrize(("recovery", "launches"), [("similarity", 8), ("cached", 6)])
def test_a_pruned_block_takes_few_launches(started, device, recovery, launches):
    """At two passes. A pass is one kernel, which normalises the scores too."""
    q, k, v = torch.randn(3, 1, 2, 40, 16, generator=torch.Generator().manual_seed(0)).to(device)
    x, residual = torch.randn(2, 1, 40, 8, generator=torch.Generator().manual_seed(1)).to(device)
    with ak.backend("triton"):
        _, lse = ak.attention_with_logsumexp(q, k, v)
        scores, _ = ak.weighted_page_rank(q, k, lse, max_iterations=2, tolerance=0)
        index = ak.select_tokens(scores, 15)
        compact, tokens = gather_pair(x, residual, index)
        residual = residual.mT.unflatten(2, (5, 8))
        if recovery == "similarity":
            ak.recover_feature_map(compact + tokens, ak.similarity_source(q, k, lse, index), residual)
        else:
            ak.update_feature_map(compact + tokens, index, x.clone(), residual)
    assert started.count("_column_sums_kernel") == 2 and "_normalise_kernel" not in started
    assert len(started) == launches, started
