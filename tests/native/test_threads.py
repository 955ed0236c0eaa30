"""Thread counts, forks, and the interpreter's lock."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

import atedm_kernels as ak
from atedm_kernels import native
from tests.helpers import oracle

EVERYTHING = 1 << 40


@pytest.fixture(scope="module")
def problem():
    q, k, lse = oracle.attention_inputs((2, 4, 700, 700, 64), torch.bfloat16, torch.device("cpu"), std=2.5)
    residual = torch.randn(2, 300, 20, 35).bfloat16()
    return q, k, lse, residual


def everything(q, k, lse, residual):
    """Results of every op, and of every route of the ranking."""
    out = []
    for limits in ((EVERYTHING, EVERYTHING), (0, EVERYTHING), (0, 0)):
        with native.map_limits(*limits):
            out += ak.weighted_page_rank(q, k, lse, max_iterations=4, tolerance=1e-3)
            out += ak.weighted_page_rank_cross(q, k[:, :, :77], lse, max_iterations=2)
    out.append(ak.attention_column_sums(q, k, lse, out[0]))
    index = ak.select_tokens(out[0], 260)
    source = ak.similarity_source(q, k, lse, index)
    x = ak.gather_tokens(residual.flatten(2).mT, index)
    cache = torch.zeros(2, 700, 300, dtype=x.dtype)
    updated = ak.update_feature_map(x, index, cache, residual)
    recovered = ak.recover_tokens(x, source), ak.recover_feature_map(x, source, residual)
    return [*out, index, source, x, *recovered, cache, updated]


def test_results_do_not_depend_on_the_threads(problem, threads):
    threads(1)
    with ak.backend("native"):
        alone = everything(*problem)
        for count in (2, 3, 2):
            threads(count)
            for a, b in zip(everything(*problem), alone, strict=True):
                assert torch.equal(a, b)


def test_threads_of_its_own_give_the_same(problem, threads):
    """Without torch's OpenMP runtime, as on macOS."""
    threads(3)
    library, _ = native._load()
    with ak.backend("native"):
        shared = everything(*problem)
        library.atedm_set_openmp(None)
        try:
            own = everything(*problem)
        finally:
            library.atedm_set_openmp(native._torch_openmp())
    for a, b in zip(own, shared, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(sys.platform != "linux", reason="OpenMP is shared on Linux alone")
def test_torchs_threads_are_found():
    assert native._torch_openmp() is not None or "openmp" not in torch.__config__.parallel_info().lower()


FORKS = """
import os, sys, torch
import atedm_kernels as ak

torch.set_num_threads(2)
torch.manual_seed(0)
q, k = torch.randn(2, 1, 4, 700, 64).unbind()
lse = (q @ k.mT / 8).logsumexp(-1)  # by two threads of torch's
with ak.backend("native"):
    if sys.argv[1] == "after":
        ak.attention_column_sums(q, k, lse)
    child = os.fork()
    sums = ak.attention_column_sums(q, k, lse)
    if child == 0:
        # Two threads are asked for, and the runtime's second one did not survive the fork.
        os._exit(0 if torch.isfinite(sums).all() else 1)
    _, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_forked_child_computes(order):
    """It computes whether the library is first used before or after the fork."""
    command = [sys.executable, "-W", "ignore", "-c", FORKS, order]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_interpreter_goes_on(threads, monkeypatch):
    """Another Python thread counts while the library works, not only before and after."""
    threads(1)
    q, k, lse = oracle.attention_inputs((1, 4, 2000, 2000, 64), torch.float32, torch.device("cpu"))
    count, during, done = 0, [], threading.Event()
    call = native.call

    def tick() -> None:
        nonlocal count
        while not done.wait(1e-3):
            count += 1

    def counting_call(*arguments: object) -> None:
        before = count
        call(*arguments)
        during.append(count - before)

    monkeypatch.setattr(native, "call", counting_call)
    counter = threading.Thread(target=tick)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60.0)  # a thread keeps the lock unless it releases it
    try:
        counter.start()
        while count == 0:
            time.sleep(1e-3)
        # The slowest ISA, so that the call far outlasts a wait of the counter.
        with ak.backend("native"), native.forced_isa("portable"):
            ak.attention_column_sums(q, k, lse)
    finally:
        done.set()
        sys.setswitchinterval(interval)
        counter.join()
    assert during and all(during)


def test_calls_from_several_threads(problem):
    q, k, lse, _ = problem
    with ak.backend("native"):
        expected, _ = ak.weighted_page_rank(q, k, lse)
    results: list[torch.Tensor] = []

    def call() -> None:
        with ak.backend("native"):
            results.append(ak.weighted_page_rank(q, k, lse)[0])

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 4 and all(torch.equal(result, expected) for result in results)
