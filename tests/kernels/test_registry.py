"""Defining an op: what ``define_op`` promises for every op, and the features that no op of the package uses yet."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import atedm_kernels
from atedm_kernels._checks import FLOAT_DTYPES, check_tensor
from atedm_kernels.registry import OPS, Backward, define_op

library = torch.library.Library("atedm_test", "DEF")


def check(x: torch.Tensor, factor: float) -> None:
    check_tensor("x", x, "N", FLOAT_DTYPES)
    if factor < 0:
        raise ValueError(f"factor is {factor}; expected at least 0")


def fake(x: torch.Tensor, factor: float) -> torch.Tensor:
    return torch.empty_like(x)


def setup_context(ctx, inputs, output) -> None:
    ctx.factor = inputs[1]


def backward(ctx, gradient):
    return gradient * ctx.factor, None


@pytest.fixture(scope="module")
def scaled():
    return define_op(
        "scaled(Tensor x, float factor=2.0) -> Tensor",
        check,
        fake,
        {"reference": lambda x, factor: x * factor},
        flops=lambda x, factor: x[0],
        backward=Backward(setup_context, backward),
        library=library,
    )


@pytest.fixture(scope="module")
def added_to():
    """``total += x``, returning ``2 x``: an op that writes an argument in place."""

    def check_added(total: torch.Tensor, x: torch.Tensor) -> None:
        check_tensor("x", x, "N", FLOAT_DTYPES)
        check_tensor("total", total, "N", (x.dtype,), x.device)

    def add(total: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        total.add_(x)
        return x * 2

    return define_op(
        "added_to(Tensor(a!) total, Tensor x) -> Tensor",
        check_added,
        lambda total, x: torch.empty_like(x),
        {"reference": add},
        library=library,
    )


def test_every_op_of_the_package_is_listed_and_has_a_reference():
    assert set(OPS) == set(atedm_kernels.__all__) - {"backend"}
    assert all("reference" in op.backends for op in OPS.values())
    for name, op in OPS.items():
        assert op.overload is getattr(torch.ops.atedm, name).default


def test_gradients(scaled):
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: scaled(x, 3.0), x)
    torch.library.opcheck(scaled.overload, (x, 3.0))
    compiled = torch.compile(lambda x: scaled(x, 3.0).sum(), fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(x), x)
    assert torch.equal(gradient, torch.full_like(x, 3.0))


def test_an_argument_written_in_place(added_to):
    total, x = torch.zeros(5), torch.arange(5.0)
    torch.library.opcheck(added_to.overload, (total.clone(), x))
    version = total._version
    assert torch.equal(added_to(total, x), 2 * x) and torch.equal(total, x)
    assert total._version > version  # so autograd notices that a saved tensor has changed

    def twice(total, x):
        total = total + 1
        return added_to(total, x) + added_to(total, x), total

    for compiler in ("aot_eager", "inductor"):
        out, written = torch.compile(twice, fullgraph=True, backend=compiler)(torch.zeros(5), x)
        assert torch.equal(out, 4 * x) and torch.equal(written, 1 + 2 * x)
    with torch.inference_mode():
        inside = torch.zeros(5)
        added_to(inside, x)
        assert torch.equal(inside, x)


def test_a_saved_tensor_that_is_written_afterwards_is_noticed(added_to):
    weight = torch.ones(5, requires_grad=True)
    total = torch.zeros(5)
    loss = (weight * total).sum()
    added_to(total, torch.ones(5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_an_op_writes_must_not_require_a_gradient(added_to):
    total, x = torch.zeros(5, requires_grad=True), torch.ones(5)
    for written in (total, total * 1):
        with pytest.raises(ValueError, match="total requires a gradient; expected a tensor that does not, as added_to"):
            added_to(written, x)
    with torch.no_grad():
        added_to(total, x)
    assert torch.equal(total, x)
    assert not added_to(torch.zeros(5), x.requires_grad_()).requires_grad


WRONG = {
    "writes x in place and has a backward": ("wrong(Tensor(a!) x) -> Tensor", {"backward": Backward(None, None)}),
    "is a bool in": ("wrong(Tensor x, bool flag) -> Tensor", {}),
    "is keyword-only in": ("wrong(Tensor x, *, float factor) -> Tensor", {}),
    "does not begin with a tensor": ("wrong(float factor) -> Tensor", {}),
    "expected 'reference' among them": ("wrong(Tensor x) -> Tensor", {"implementations": {"native": None}}),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_definition_is_refused_before_anything_is_registered(message):
    schema, changes = WRONG[message]
    with pytest.raises(ValueError, match=message):
        define_op(schema, check, fake, **{"implementations": {"reference": None}, "library": library, **changes})
    assert not hasattr(torch.ops.atedm_test, "wrong")


def test_checks_run_once_a_call_and_defaults_reach_them(scaled):
    with pytest.raises(ValueError, match="factor is -1"):
        scaled(torch.ones(2), -1.0)
    with pytest.raises(TypeError, match="x is a list"):
        scaled([1.0], 1.0)
    assert torch.equal(torch.ops.atedm_test.scaled(torch.ones(2)), torch.full((2,), 2.0))
    assert torch.ops.atedm_test.scaled(torch.ones(2, device="meta"), factor=1.0).shape == (2,)
    seen = []
    op = define_op(
        "seen(Tensor x, float factor=2.0) -> Tensor",
        lambda x, factor: seen.append(factor),
        fake,
        {"reference": lambda x, factor: x * factor},
        library=library,
    )
    op(torch.ones(2), 3.0)
    torch.ops.atedm_test.seen(torch.ones(2))
    torch.ops.atedm_test.seen(torch.ones(2, device="meta"))
    assert seen == [3.0, 2.0, 2.0]


@pytest.mark.parametrize("name", ["attention_column_sums", "similarity_source", "weighted_page_rank"])
def test_the_flops_of_an_op_are_those_that_torch_counts(name):
    q = torch.randn(1, 2, 7, 8)
    _, lse = atedm_kernels.attention_with_logsumexp(q, q, q)
    arguments = {
        "attention_column_sums": (q, q, lse),
        "similarity_source": (q, q, lse, torch.tensor([[0, 3, 5]])),
        "weighted_page_rank": (q, q, lse, None, 3, 0.0),
    }[name]
    columns = {"similarity_source": 3}.get(name, 7)
    expected = {"weighted_page_rank": 3}.get(name, 1) * 2 * 2 * 7 * columns * 8
    with FlopCounterMode(display=False) as counter:
        getattr(torch.ops.atedm, name)(*arguments)
    assert counter.get_total_flops() == OPS[name].flops(*arguments) == expected


FIRST = {
    "the ops": "import atedm_kernels, torch.utils.flop_counter",
    "the counter": "import torch.utils.flop_counter, atedm_kernels",
    "the ops, and the counter asked for": (
        "import atedm_kernels, importlib.util; importlib.util.find_spec('torch.utils.flop_counter')"
    ),
    "the counter, once more": (
        "import atedm_kernels, importlib, torch.utils.flop_counter; importlib.reload(torch.utils.flop_counter)"
    ),
}


@pytest.fixture(scope="module")
def counted():
    """What each order of imports prints, in a process of its own.

    They are forked after the imports of torch, and of slow parts of it that counting needs and that load no triton.
    """
    code = f"""
import os, sys, torch, torch.distributed.fsdp, torch.fx.experimental.symbolic_shapes
for first in {list(FIRST.values())!r}:
    sys.stdout.flush()
    if os.fork() == 0:
        break
    os.wait()
else:
    sys.exit()
assert not {{"atedm_kernels", "triton", "torch.utils.flop_counter"}} & sys.modules.keys()
exec(first)
assert "triton" not in sys.modules or "torch.utils.flop_counter" in sys.modules
from torch.utils.flop_counter import FlopCounterMode
q = torch.randn(1, 1, 3, 8)
with FlopCounterMode(display=False) as counter:
    atedm_kernels.attention_with_logsumexp(q, q, q)
print(first, counter.get_total_flops(), sep=": ")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    return done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize("first", FIRST)
def test_flops_are_counted_whichever_is_imported_first(counted, first):
    lines, errors = counted
    assert f"{FIRST[first]}: {4 * 3 * 3 * 8}" in lines, errors
