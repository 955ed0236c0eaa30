"""The ways to run each op that are measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch

import atedm_kernels
from atedm_bench.measure import attention_backend_of
from atedm_bench.ops.cases import ATTENTION, COMPILED, OURS, PLAIN, OpCase, OpInputs, attention_case, cases
from atedm_kernels.registry import OPS

_REFERENCE = "reference"


@dataclass
class OpsVariant:
    """One way to run a case on ``inputs``."""

    inputs: OpInputs
    case: OpCase
    name: str
    backend: str
    call: Callable[[], object]
    seconds: list[float] = field(default_factory=list)
    extra_memory: int | None = None
    graph: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def map_bytes(self) -> int:
        """Bytes of the attention map that plain PyTorch stores; 0 if there is no map."""
        return self.case.map_elements * self.inputs.dtype.itemsize


def variants_of(inputs: OpInputs, iterations: int, only: Collection[str], compiled: bool) -> list[OpsVariant]:
    """Return fused attention, and then every way to run each op; if ``compiled``, only plain PyTorch, compiled.

    Args:
        iterations: of the ranking. only: names of ops; empty for all.
    """
    device, attention = inputs.q.device, attention_case(inputs)
    kernel = attention_backend_of(inputs.q, inputs.k, inputs.v)
    found = [OpsVariant(inputs, attention, ATTENTION, kernel, attention.calls[ATTENTION])]
    for case in cases(inputs, iterations):
        if only and case.op not in only:
            continue
        if compiled:
            if PLAIN in case.calls:
                call = torch.compile(case.calls[PLAIN], dynamic=False)
                found.append(OpsVariant(inputs, case, COMPILED, "torch", call))
            continue
        for name, call in case.calls.items():
            ours = name.startswith(OURS)
            backend = OPS[case.op].backend_for(device, inputs.dtype)[0] if ours else "torch"
            found.append(OpsVariant(inputs, case, name, backend, call))
            if name == OURS and backend not in ("torch", _REFERENCE) and device.type == "cpu":
                found.append(OpsVariant(inputs, case, OURS, _REFERENCE, _on_reference(call)))
    return found


def _on_reference(call: Callable[[], object]) -> Callable[[], object]:
    def on_reference() -> object:
        with atedm_kernels.backend(_REFERENCE):
            return call()

    return on_reference
