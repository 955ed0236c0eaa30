"""The one way to define an op of ``torch.ops.atedm``: schema, checks, implementations, fake kernel, FLOPs, gradients.

Ops are registered through ``torch.library.Library``. ``torch.library.custom_op`` takes more time per call, which
matters with several ops in each attention block.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from atedm_kernels._after_import import after_import
from atedm_kernels.backends import choose

# The public ops, by name. Ops for the package's own use are left out; their names begin with an underscore.
OPS: dict[str, Op] = {}

_library = torch.library.Library("atedm", "DEF")

_NUMBER = (float, int, torch.SymFloat, torch.SymInt)
# The Python types that each type of the schema accepts, by torch's name for the type.
_ACCEPTED: dict[str, tuple[type, ...]] = {
    "Tensor": (Tensor,),
    "Optional[Tensor]": (Tensor, NoneType),
    "float": _NUMBER,
    "Optional[float]": (*_NUMBER, NoneType),
    "int": (int, torch.SymInt),
    "str": (str,),
}


def plain_number(value: Any) -> Any:
    """Convert a NumPy number to a Python number; return anything else as it is."""
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


class Backward(NamedTuple):
    """Gradients of an op, as ``torch.library.register_autograd`` takes them."""

    setup_context: Callable[..., None] | None
    backward: Callable[..., Any]


class Op:
    """A registered op. A call takes the arguments of its schema in order.

    Attributes:
        name: the name in ``torch.ops.atedm``.
        overload: the overload that torch dispatches.
        backends: the backends that implement the op.
        fake: returns uninitialised outputs for the arguments of the schema.
        is_differentiable: whether the op records gradients.
    """

    def __init__(
        self,
        overload: torch._ops.OpOverload,
        backends: tuple[str, ...],
        check: Callable[..., None],
        fake: Callable[..., Any],
        flops: Callable[..., int] | None,
        is_differentiable: bool,
    ) -> None:
        self.overload = overload
        self.name = overload._schema.name.split("::")[1]
        self.backends = backends
        self.fake = fake
        self.is_differentiable = is_differentiable
        self._check = check
        self._flops = flops
        self._declared = overload._schema.arguments
        self._accepted = tuple(_ACCEPTED[str(argument.type)] for argument in self._declared)

    def __call__(self, *arguments: Any) -> Any:
        for argument, accepted in zip(arguments, self._accepted, strict=False):
            is_too_long = type(argument) is int and argument.bit_length() > 63
            if not isinstance(argument, accepted) or isinstance(argument, bool) or is_too_long:
                # For a wrong type, torch's message names only a position; the op's check names the argument.
                arguments = tuple(map(plain_number, arguments))
                self._check(*arguments)
                break
        if torch.compiler.is_compiling() or not self.is_differentiable:
            return self.overload(*arguments)
        if forward_ad._current_level >= 0:
            self._refuse_tangents(arguments)
        if not torch.is_grad_enabled():
            # register_autograd runs a Python function, which takes some 15 microseconds to record nothing.
            with torch._C._AutoDispatchBelowAutograd():
                return self.overload(*arguments)
        return self.overload(*arguments)

    def _refuse_tangents(self, arguments: tuple[Any, ...]) -> None:
        """Forward-mode gradients, which torch would drop in silence."""
        for declared, argument in zip(self._declared, arguments, strict=False):
            if isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None:
                raise NotImplementedError(
                    f"{declared.name} carries a tangent of forward-mode differentiation; expected none, as {self.name} "
                    "is differentiable in reverse mode only"
                )

    def complete(self, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
        """All arguments of the schema, in order. torch omits defaults, and passes keywords to a fake kernel."""
        missing = self._declared[len(arguments) :]
        if not missing:
            return arguments
        return (*arguments, *(named.get(argument.name, argument.default_value) for argument in missing))

    def backend_for(self, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
        """The backend that serves tensors of ``device`` and ``dtype``, and the reason; see :func:`choose`.

        ``"torch"`` stands for torch's own kernel, or for the reference if torch has no kernel for the inputs.
        """
        return choose(self.name, self.backends, device, dtype)

    def flops(self, *arguments: Any, **named: Any) -> int:
        """FLOPs of a call (two per multiply-add), by the op's own formula; 0 if it only copies.

        Args:
            arguments, named: the arguments of the schema; a tensor or its shape.
        """
        if self._flops is None:
            return 0
        complete = self.complete(arguments, named)
        return self._flops(*(a.shape if isinstance(a, Tensor) else a for a in complete))


def lazily(module: str, function: str) -> Callable[..., Any]:
    """``function`` of ``module``, which is imported at the first call: importing the package must not need Triton."""

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*arguments)

    return call


def define_op(
    schema: str,
    check: Callable[..., None],
    fake: Callable[..., Any],
    implementations: Mapping[str, Callable[..., Any]],
    *,
    check_values: Callable[..., None] | None = None,
    prepare: Callable[..., tuple[Any, ...]] | None = None,
    flops: Callable[..., int] | None = None,
    backward: Backward | None = None,
    library: torch.library.Library = _library,
) -> Op:
    """Register an op for CPU and GPU tensors.

    Each function takes all arguments of the schema, in order. A call runs ``check`` and ``check_values``, then the
    implementation of the backend that serves it. Meta tensors and ``torch.compile`` run ``check`` and ``fake``.

    Args:
        schema: the op in torch's schema language, without the namespace; the first argument is a tensor. Mark a
            tensor that the op writes in place, as in ``Tensor(a!) cache``, so that autograd counts it as changed.
        check: raises for an argument that does not fit, without reading data.
        fake: returns uninitialised outputs.
        implementations: by backend, including ``"reference"``. Use :func:`lazily` for Triton's.
        check_values: raises for a value that does not fit.
        prepare: turns the arguments of the schema into those of the implementations, if they differ.
        flops: counts FLOPs from the arguments, with shapes in place of tensors; ``torch.utils.flop_counter`` uses it.
        backward: the gradients. Without it the op records no gradients, and its outputs require none.
        library: where the op is registered.

    Raises:
        ValueError: a schema or implementations that are not supported; nothing is registered then.
    """
    declared = _check_definition(schema, implementations, backward)
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    packet = getattr(getattr(torch.ops, library.ns), name)
    op = Op(packet.default, tuple(implementations), check, fake, flops, backward is not None)
    written = [n for n, argument in enumerate(declared) if _is_written(argument)]

    # A reference may use differentiable operations, and autograd would keep every block of the map alive.
    @torch.no_grad()
    def run(*arguments: Any, **named: Any) -> Any:
        arguments = op.complete(arguments, named)
        check(*arguments)
        if check_values is not None:
            check_values(*arguments)
        implementation = implementations[op.backend_for(arguments[0].device, _kernel_dtype(arguments))[0]]
        out = implementation(*(arguments if prepare is None else prepare(*arguments)))
        for n in written:
            if arguments[n] is not None and not arguments[n].is_inference():
                increment_version(arguments[n])
        return out

    def run_fake(*arguments: Any, **named: Any) -> Any:
        arguments = op.complete(arguments, named)
        check(*arguments)
        return fake(*arguments)

    def refuse_gradients(*arguments: Any, **named: Any) -> Any:
        """Refuse a written tensor that requires a gradient: autograd would differentiate through its old content."""
        arguments = op.complete(arguments, named)
        for n in written:
            if torch.is_grad_enabled() and arguments[n] is not None and arguments[n].requires_grad:
                raise ValueError(
                    f"{declared[n].name} requires a gradient; expected a tensor that does not, as {name} writes it in "
                    "place, or torch.no_grad()"
                )
        with torch._C._AutoDispatchBelowAutograd():
            return packet.default(*arguments)

    qualified = f"{library.ns}::{name}"
    for key in ("CPU", "CUDA"):
        library.impl(name, run, key)
    torch.library.register_fake(qualified, run_fake, lib=library)
    if backward is not None:
        torch.library.register_autograd(qualified, backward.backward, setup_context=backward.setup_context, lib=library)
    else:
        library.impl(name, refuse_gradients if written else torch.library.fallthrough_kernel, "Autograd")
    if flops is not None:

        def count(*shapes: Any, out_shape: object = None, **named: Any) -> int:
            return op.flops(*shapes, **named)

        # Importing torch.utils.flop_counter here would import Triton.
        after_import("torch.utils.flop_counter", lambda counter: counter.register_flop_formula(packet)(count))
    if library is _library and not name.startswith("_"):
        OPS[name] = op
    return op


def _is_written(argument: torch._C.Argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _check_definition(
    schema: str, implementations: Mapping[str, Callable[..., Any]], backward: Backward | None
) -> list[torch._C.Argument]:
    """Return the arguments that ``schema`` declares; raise ValueError for what :func:`define_op` does not support."""
    declared = torch._C.parse_schema(schema).arguments
    for argument in declared:
        if str(argument.type) not in _ACCEPTED:
            raise ValueError(f"{argument.name} is a {argument.type} in {schema!r}; expected one of {set(_ACCEPTED)}")
        if argument.kwarg_only:
            raise ValueError(f"{argument.name} is keyword-only in {schema!r}; expected arguments by position")
        if _is_written(argument) and backward is not None:
            raise ValueError(f"{schema!r} writes {argument.name} in place and has a backward; expected one of the two")
    if not declared or str(declared[0].type) != "Tensor":
        raise ValueError(f"{schema!r} does not begin with a tensor; expected one: its device chooses the backend")
    if "reference" not in implementations:
        raise ValueError(f"{schema!r} is implemented by {set(implementations)}; expected 'reference' among them")
    return declared


def _kernel_dtype(arguments: tuple[Any, ...]) -> torch.dtype:
    """The dtype that the backend must serve: float64 if any argument is, so that the reference serves the call."""
    dtypes = [argument.dtype for argument in arguments if isinstance(argument, Tensor)]
    return torch.float64 if torch.float64 in dtypes else dtypes[0]
