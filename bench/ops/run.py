"""The measurement: every op, each variant in turn, round after round, shape by shape."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import atedm_kernels
from atedm.bench.measure import peak_memory_of, seconds_of
from atedm.bench.ops.cases import ATTENTION, COMPILED, COPY, OURS, PLAIN, Case, Inputs, attention_case, cases
from atedm.bench.ops.ceilings import Ceilings, measure_ceilings
from atedm.bench.ops.shapes import Shape
from atedm_kernels._backends import choose
from atedm_kernels._library import IMPLEMENTATIONS

REFERENCE = "reference"

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        shapes, dtypes: each with each. iterations: of the ranking. repeats: rounds a shape; the last ones are left out
            where they would not end within its share of ``minutes``. compiled: also plain PyTorch under
            ``torch.compile``. only: names of ops; all of them where empty.
    """

    device: torch.device
    shapes: tuple[Shape, ...]
    dtypes: tuple[torch.dtype, ...]
    iterations: int = 5
    repeats: int = 5
    minutes: float = 9.0
    compiled: bool = True
    only: tuple[str, ...] = ()
    seed: int = 0


@dataclass
class Variant:
    """One way to run a case."""

    case: Case
    name: str
    backend: str
    call: Callable[[], object]
    seconds: list[float] = field(default_factory=list)
    extra_memory: int | None = None
    graph: bool = False


class OpsBench:
    """Measures shape after shape; rows of what is done may be asked for at any time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.ceilings: dict[str, Ceilings] = {}
        self._rows: list[dict[str, Any]] = []
        # Zeroed before every call, so that no variant finds in a GPU's cache what another one left there.
        self._flushed: torch.Tensor | None = None

    def work(self) -> int:
        """How many times :meth:`run` notifies."""
        return len(self.settings.dtypes) * (1 + len(self.settings.shapes))

    def run(self, notify: Notify = lambda what: None) -> None:
        """Measure; ``notify`` is called with what comes next."""
        s = self.settings
        start = time.monotonic()
        left = self.work()
        if s.device.type == "cuda":
            size = 2 * torch.cuda.get_device_properties(s.device).L2_cache_size
            self._flushed = torch.empty(size, dtype=torch.uint8, device=s.device)
        with torch.no_grad():
            for dtype in s.dtypes:
                name = _name(dtype)
                notify(f"{name}: ceilings of this device")
                self.ceilings[name] = measure_ceilings(s.device, dtype)
                left -= 1
                for shape in s.shapes:
                    notify(f"{name}, {shape.size}, level {shape.level}, batch {shape.batch}")
                    share = (60 * s.minutes - (time.monotonic() - start)) / left
                    self._measure(shape, dtype, share)
                    left -= 1

    def _measure(self, shape: Shape, dtype: torch.dtype, seconds: float) -> None:
        start = time.monotonic()
        # Each shape is compiled for itself, and what was compiled for another is not wanted any more.
        torch._dynamo.reset()
        inputs = Inputs(shape, dtype, self.settings.device, self.settings.seed)
        variants: list[Variant] = []
        for variant in self._variants(shape, dtype, inputs):
            try:
                self._warm_up(variant)
                variants.append(variant)
            except Exception as error:
                # What plain PyTorch or a peer has no memory for is a result; an error of ours is not.
                if variant.name in (OURS, ATTENTION):
                    raise
                line = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                self._rows.append({**self._head(variant, shape, dtype), "error": line})
                if self.settings.device.type == "cuda":
                    torch.cuda.empty_cache()
        for done in range(self.settings.repeats):
            first = done % len(variants)
            for variant in variants[first:] + variants[:first]:
                variant.seconds.append(self._seconds(variant.call))
            spent = time.monotonic() - start
            a_round = sum(statistics.fmean(variant.seconds) for variant in variants)
            if spent + a_round > seconds:
                break
        self._rows += self._rows_of(variants, shape, dtype)

    def _variants(self, shape: Shape, dtype: torch.dtype, inputs: Inputs) -> list[Variant]:
        s = self.settings
        attention = attention_case(shape, dtype, inputs)
        found = [Variant(attention, ATTENTION, "torch", attention.calls[ATTENTION])]
        for case in cases(shape, dtype, inputs, s.iterations):
            if s.only and case.op not in s.only:
                continue
            for name, call in case.calls.items():
                ours = name.startswith(OURS)
                backend = choose(case.op, IMPLEMENTATIONS[case.op], s.device, dtype)[0] if ours else "torch"
                found.append(Variant(case, name, backend, call))
                if name == OURS and backend not in ("torch", REFERENCE) and s.device.type == "cpu":
                    found.append(Variant(case, OURS, REFERENCE, _on_reference(call)))
                if name == PLAIN and s.compiled:
                    found.append(Variant(case, COMPILED, "torch", torch.compile(call, dynamic=False)))
        return found

    def _warm_up(self, variant: Variant) -> None:
        device = self.settings.device
        for _ in range(2 if device.type == "cpu" else 3):
            out = variant.call()
        if device.type != "cuda":
            return
        torch.cuda.synchronize(device)
        before, kept = torch.cuda.memory_allocated(device), _bytes_of(out)
        del out
        variant.extra_memory = max(0, peak_memory_of(variant.call, device) - before)
        variant.extra_memory -= min(variant.extra_memory, kept)
        variant.call, variant.graph = captured(variant.call, device)

    def _seconds(self, call: Callable[[], object]) -> float:
        before = None if self._flushed is None else self._flushed.zero_
        return seconds_of(call, self.settings.device, before)

    def _head(self, variant: Variant, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "name": variant.case.name,
            "variant": variant.name,
            "backend": variant.backend,
            "shape": str(shape),
            "size": shape.size,
            "level": shape.level,
            "batch": shape.batch,
            "dtype": _name(dtype),
        }

    def _rows_of(self, variants: Sequence[Variant], shape: Shape, dtype: torch.dtype) -> list[dict[str, Any]]:
        seconds = {(v.case.name, v.name, v.backend): statistics.median(v.seconds) for v in variants}
        attention = next(value for (_, name, _), value in seconds.items() if name == ATTENTION)
        map_bytes = shape.batch * shape.heads * shape.tokens**2 * dtype.itemsize
        rows = []
        for v in variants:
            median = seconds[v.case.name, v.name, v.backend]
            floor, bound = self.ceilings[_name(dtype)].floor(v.case.work)
            plain = seconds.get((v.case.name, PLAIN, "torch"))
            copy = seconds.get((v.case.name, COPY, "torch"))
            rows.append(
                {
                    **self._head(v, shape, dtype),
                    "seconds": median,
                    "seconds_low": min(v.seconds),
                    "seconds_high": max(v.seconds),
                    "repeats": len(v.seconds),
                    "iterations": v.case.times,
                    "ratio_to_attention": median / (attention * v.case.times),
                    "ratio_to_floor": median / floor,
                    "floor_seconds": floor,
                    "floor_bound_by": bound,
                    "flops": v.case.work.flops,
                    "exponentials": v.case.work.exponentials,
                    "bytes": v.case.work.bytes,
                    "speedup_over_plain": None if plain is None else plain / median,
                    "ratio_to_copy": None if copy is None else median / copy,
                    "extra_memory_bytes": v.extra_memory,
                    "extra_memory_part_of_map": None if v.extra_memory is None else v.extra_memory / map_bytes,
                    "cuda_graph": v.graph,
                }
            )
        return rows

    def rows(self) -> list[dict[str, Any]]:
        """One flat object a case and variant."""
        return list(self._rows)

    def settings_for_report(self) -> dict[str, Any]:
        """Everything that a figure depends on."""
        s = self.settings
        return {
            "device": str(s.device),
            "dtypes": [_name(dtype) for dtype in s.dtypes],
            "iterations": s.iterations,
            "repeats": s.repeats,
            "minutes": s.minutes,
            "seed": s.seed,
            "threads": torch.get_num_threads(),
            "inputs": "seeded standard normal; logits of standard deviation 2",
            "clock": "device, CUDA graphs, L2 flushed before each call" if s.device.type == "cuda" else "wall",
            "floor": "slowest of FLOPs, exponentials and bytes at the ceilings; the map computed in each iteration",
            "ratio_to_attention": "to one forward of fused attention, or to as many as there are iterations",
            **{
                f"ceiling_{what}_{name}": value
                for name, ceilings in self.ceilings.items()
                for what, value in vars(ceilings).items()
            },
        }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _on_reference(call: Callable[[], object]) -> Callable[[], object]:
    def on_reference() -> object:
        with atedm_kernels.backend(REFERENCE):
            return call()

    return on_reference


def _bytes_of(out: object) -> int:
    tensors = out if isinstance(out, tuple) else (out,)
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors if isinstance(t, torch.Tensor))


def captured(call: Callable[[], object], device: torch.device) -> tuple[Callable[[], object], bool]:
    """``call`` as a CUDA graph, which leaves out what the host does; itself where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize(device)
        return call, False
    return graph.replay, True
