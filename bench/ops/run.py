"""The measurement: for each shape, in rounds, every variant of every op in turn."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import atedm_kernels
from atedm_bench.measure import Graphs, attention_backend_of, by_turns, error_line, peak_memory_of, seconds_of
from atedm_bench.ops.cases import ATTENTION, COMPILED, COPY, OURS, PLAIN, OpCase, OpInputs, attention_case, cases
from atedm_bench.ops.ceilings import Ceilings, measure_ceilings
from atedm_bench.ops.recording import MAX_ROUNDS, recording_rows
from atedm_bench.ops.shapes import Shape
from atedm_kernels.registry import OPS

REFERENCE = "reference"

# With fewer rounds, the range would say nothing about the spread.
_MIN_ROUNDS = 3

# Copies of the map that plain PyTorch holds at once, during warm-up and in a graph's pool.
_MAPS_OF_PLAIN = 6

Notify = Callable[[str], None]


@dataclass(frozen=True)
class OpsSettings:
    """What is measured.

    Attributes:
        shapes, dtypes: measured in all combinations. iterations: of the ranking. repeats: rounds per shape.
        minutes: time limit for the whole run. A shape with too little time left runs fewer rounds, down to
            ``_MIN_ROUNDS``; the report lists the shapes that were not reached.
        compiled: at the end, also measure plain PyTorch under ``torch.compile`` at the size of the first shape.
        only: names of ops; empty for all.
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
class OpsVariant:
    """One way to run a case."""

    case: OpCase
    name: str
    backend: str
    call: Callable[[], object]
    seconds: list[float] = field(default_factory=list)
    extra_memory: int | None = None
    graph: bool = False


class OpsBench:
    """Measures one shape after the other. The rows so far are available at any time.

    Attributes:
        failed: whether one of our ops raised; its row has the error.
        recording: the rows of :func:`recording_rows`, of the first dtype.
    """

    def __init__(self, settings: OpsSettings) -> None:
        self.settings = settings
        self.ceilings: dict[str, Ceilings] = {}
        self.failed = False
        self.recording: list[dict[str, Any]] = []
        self._rows: list[dict[str, Any]] = []
        self._left_out: list[str] = []
        # Seconds of eager plain PyTorch by shape, dtype and case, to compare the compiled one with.
        self._plain: dict[tuple[str, str, str], float] = {}
        # Zeroed before every call, so that no variant finds another's data in the GPU's cache.
        self._flushed: torch.Tensor | None = None
        self._graphs: Graphs | None = None

    def _passes(self) -> list[tuple[torch.dtype, Shape, bool]]:
        """Return what is measured together, in order. The last item says whether it is compiled plain PyTorch."""
        s = self.settings
        eager = [(dtype, shape, False) for dtype in s.dtypes for shape in s.shapes]
        first = [shape for shape in s.shapes if shape.size == s.shapes[0].size]
        return eager + [(dtype, shape, True) for dtype in s.dtypes for shape in first if s.compiled]

    def work(self) -> int:
        """Return how often :meth:`run` calls ``notify``."""
        return len(self.settings.dtypes) + len(self._passes())

    def run(self, notify: Notify = lambda what: None) -> None:
        """Measure everything. Calls ``notify`` with what comes next."""
        s = self.settings
        end = time.monotonic() + 60 * s.minutes
        if s.device.type == "cuda":
            size = 2 * torch.cuda.get_device_properties(s.device).L2_cache_size
            self._flushed = torch.empty(size, dtype=torch.uint8, device=s.device)
        with torch.no_grad():
            for dtype in s.dtypes:
                notify(f"{_name(dtype)}: ceilings of this device")
                self.ceilings[_name(dtype)] = measure_ceilings(s.device, dtype)
            rounds = min(max(s.repeats, _MIN_ROUNDS), MAX_ROUNDS)
            self.recording = recording_rows(s.device, s.dtypes[0], rounds, s.only)
            self.failed |= any("error" in row for row in self.recording)
            passes = self._passes()
            for n, (dtype, shape, compiled) in enumerate(passes):
                what = f"{_name(dtype)}, {shape.size}, level {shape.level}, batch {shape.batch}"
                what += ", compiled" if compiled else ""
                notify(what)
                left = end - time.monotonic()
                if left < 0 and n > 0:
                    self._left_out.append(what)
                    continue
                self._measure(shape, dtype, compiled, time.monotonic() + left / (len(passes) - n))

    def _measure(self, shape: Shape, dtype: torch.dtype, compiled: bool, end: float) -> None:
        # Each shape is compiled separately, so drop what was compiled for the last one.
        torch._dynamo.reset()
        # The graphs of the last shape are freed too.
        self._graphs = Graphs(self.settings.device) if self.settings.device.type == "cuda" else None
        inputs = OpInputs(shape, dtype, self.settings.device, self.settings.seed)
        variants = []
        for variant in self._variants(shape, dtype, inputs, compiled):
            if self._tried(variant, shape, dtype, lambda variant=variant: self._warm_up(variant, dtype)):
                variants.append(variant)
        for done in range(self.settings.repeats):
            if done >= _MIN_ROUNDS and time.monotonic() > end:
                break
            for variant in by_turns(variants, done):
                if not self._tried(variant, shape, dtype, lambda variant=variant: self._time(variant)):
                    variants = [other for other in variants if other is not variant]
        self._rows += self._rows_of(variants, shape, dtype, compiled)

    def _tried(self, variant: OpsVariant, shape: Shape, dtype: torch.dtype, action: Callable[[], None]) -> bool:
        """Run ``action``. If it raises, add a row with the error and return False: out of memory is a result too."""
        try:
            action()
        except Exception as error:
            self._rows.append({**self._head(variant, shape, dtype), "error": error_line(error)})
            self.failed |= variant.name.startswith(OURS)
            if self.settings.device.type == "cuda":
                torch.cuda.empty_cache()
            return False
        return True

    def _variants(self, shape: Shape, dtype: torch.dtype, inputs: OpInputs, compiled: bool) -> list[OpsVariant]:
        s = self.settings
        attention = attention_case(shape, dtype, inputs)
        kernel = attention_backend_of(inputs.q, inputs.k, inputs.v)
        found = [OpsVariant(attention, ATTENTION, kernel, attention.calls[ATTENTION])]
        for case in cases(shape, dtype, inputs, s.iterations):
            if s.only and case.op not in s.only:
                continue
            if compiled:
                if PLAIN in case.calls:
                    call = torch.compile(case.calls[PLAIN], dynamic=False)
                    found.append(OpsVariant(case, COMPILED, "torch", call))
                continue
            for name, call in case.calls.items():
                ours = name.startswith(OURS)
                backend = OPS[case.op].backend_for(s.device, dtype)[0] if ours else "torch"
                found.append(OpsVariant(case, name, backend, call))
                if name == OURS and backend not in ("torch", REFERENCE) and s.device.type == "cpu":
                    found.append(OpsVariant(case, OURS, REFERENCE, _on_reference(call)))
        return found

    def _warm_up(self, variant: OpsVariant, dtype: torch.dtype) -> None:
        device = self.settings.device
        if variant.name in (PLAIN, COMPILED):
            _check_memory(variant.case.map_elements * dtype.itemsize, device)
        for _ in range(2 if device.type == "cpu" else 3):
            variant.call()
        if self._graphs is None:
            return
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        variant.extra_memory = max(0, peak_memory_of(variant.call, device) - before - _bytes_of(variant.call()))
        variant.call, variant.graph = self._graphs.capture(variant.call), True

    def _time(self, variant: OpsVariant) -> None:
        before = None if self._flushed is None else self._flushed.zero_
        variant.seconds.append(seconds_of(variant.call, self.settings.device, before))

    def _head(self, variant: OpsVariant, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
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

    def _rows_of(
        self, variants: Sequence[OpsVariant], shape: Shape, dtype: torch.dtype, compiled: bool
    ) -> list[dict[str, Any]]:
        medians = {id(v): statistics.median(v.seconds) for v in variants}
        by_name = {(v.case.name, v.name): medians[id(v)] for v in reversed(variants)}
        attention = next((medians[id(v)] for v in variants if v.name == ATTENTION), None)
        place = (str(shape), _name(dtype))
        if not compiled:
            self._plain.update({(*place, case): s for (case, name), s in by_name.items() if name == PLAIN})
        rows = []
        for v in variants:
            if compiled and v.name == ATTENTION:  # the eager pass already has this row
                continue
            median = medians[id(v)]
            floor, bound = self.ceilings[_name(dtype)].floor(v.case.work)
            plain = self._plain.get((*place, v.case.name))
            copy = by_name.get((v.case.name, COPY))
            map_bytes = v.case.map_elements * dtype.itemsize
            rows.append(
                {
                    **self._head(v, shape, dtype),
                    "seconds": median,
                    "seconds_low": min(v.seconds),
                    "seconds_high": max(v.seconds),
                    "repeats": len(v.seconds),
                    "iterations": v.case.times,
                    "ratio_to_attention": None if attention is None else median / (attention * v.case.times),
                    "ratio_to_floor": median / floor,
                    "floor_seconds": floor,
                    "floor_bound_by": bound,
                    "flops": v.case.work.flops,
                    "exponentials": v.case.work.exponentials,
                    "bytes": v.case.work.bytes,
                    "speedup_over_plain": None if plain is None else plain / median,
                    "ratio_to_copy": None if copy is None else median / copy,
                    "extra_memory_bytes": v.extra_memory,
                    "extra_memory_part_of_map": (
                        None if v.extra_memory is None or not map_bytes else v.extra_memory / map_bytes
                    ),
                    "cuda_graph": v.graph,
                }
            )
        return rows

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat object per case and variant."""
        return list(self._rows)

    def settings_for_report(self) -> dict[str, Any]:
        """Everything that the figures depend on."""
        s = self.settings
        return {
            "device": str(s.device),
            "dtypes": [_name(dtype) for dtype in s.dtypes],
            "iterations": s.iterations,
            "repeats": s.repeats,
            "minutes": s.minutes,
            "seed": s.seed,
            "threads": torch.get_num_threads(),
            "left_out": self._left_out,
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


def _check_memory(map_bytes: int, device: torch.device) -> None:
    """Raise if plain PyTorch's copies of the map do not fit: running out in a capture is hard to recover from."""
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    wanted = _MAPS_OF_PLAIN * map_bytes
    if wanted > free:
        raise MemoryError(f"needs about {wanted / 1e9:.0f} GB, of which {free / 1e9:.0f} GB are free")
