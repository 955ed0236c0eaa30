"""The rows of ``atedm-bench ops``: what was measured, compared with attention, plain PyTorch, a copy and the floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from atedm_bench.measure import error_line
from atedm_bench.ops.cases import ATTENTION, COPY, PLAIN
from atedm_bench.ops.ceilings import Ceilings
from atedm_bench.ops.variants import OpsVariant


class OpsRows:
    """The rows so far.

    Attributes:
        ceilings: of the device, by the name of the dtype. rows: one flat object per case and variant.
    """

    def __init__(self, ceilings: Mapping[str, Ceilings]) -> None:
        self.ceilings = ceilings
        self.rows: list[dict[str, Any]] = []
        # Seconds of eager plain PyTorch by case, dtype and shape, to compare the compiled one with.
        self._plain: dict[tuple[str, str, str], float] = {}

    def add(self, variants: Sequence[OpsVariant], compiled: bool) -> None:
        """Add the rows of variants that took turns, on one shape. ``compiled``: the eager ones were added before."""
        attention = next((v.median for v in variants if v.name == ATTENTION), None)
        copies = {v.case.name: v.median for v in variants if v.name == COPY}
        if compiled:
            variants = [v for v in variants if v.name != ATTENTION]  # the eager pass already has this row
        else:
            self._plain.update({_place(v): v.median for v in variants if v.name == PLAIN})
        self.rows += [self._row(v, attention, copies.get(v.case.name)) for v in variants]

    def add_failed(self, variant: OpsVariant, error: Exception) -> None:
        self.rows.append({**_head(variant), "error": error_line(error)})

    def _row(self, v: OpsVariant, attention: float | None, copy: float | None) -> dict[str, Any]:
        """The row of ``v``. ``attention``, ``copy``: the seconds of these, if they were measured."""
        floor, bound = self.ceilings[dtype_name(v.inputs.dtype)].floor(v.case.work)
        plain = self._plain.get(_place(v))
        return {
            **_head(v),
            "seconds": v.median,
            "seconds_low": min(v.seconds),
            "seconds_high": max(v.seconds),
            "repeats": len(v.seconds),
            "iterations": v.case.times,
            "ratio_to_attention": None if attention is None else v.median / (attention * v.case.times),
            "ratio_to_floor": v.median / floor,
            "floor_seconds": floor,
            "floor_bound_by": bound,
            "flops": v.case.work.flops,
            "exponentials": v.case.work.exponentials,
            "bytes": v.case.work.bytes,
            "speedup_over_plain": None if plain is None else plain / v.median,
            "ratio_to_copy": None if copy is None else v.median / copy,
            "extra_memory_bytes": v.extra_memory,
            "extra_memory_part_of_map": (
                None if v.extra_memory is None or not v.map_bytes else v.extra_memory / v.map_bytes
            ),
            "cuda_graph": v.graph,
        }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _place(v: OpsVariant) -> tuple[str, str, str]:
    return v.case.name, dtype_name(v.inputs.dtype), str(v.inputs.shape)


def _head(v: OpsVariant) -> dict[str, Any]:
    shape = v.inputs.shape
    return {
        "name": v.case.name,
        "variant": v.name,
        "backend": v.backend,
        "shape": str(shape),
        "size": shape.size,
        "level": shape.level,
        "batch": shape.batch,
        "dtype": dtype_name(v.inputs.dtype),
    }
