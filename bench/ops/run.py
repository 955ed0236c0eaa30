"""The measurement: for each shape, in rounds, every variant of every op in turn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from atedm_bench.measure import Graphs, by_turns, peak_memory_of, seconds_of
from atedm_bench.ops.cases import COMPILED, OURS, PLAIN, OpInputs
from atedm_bench.ops.ceilings import Ceilings, measure_ceilings
from atedm_bench.ops.recording import MAX_ROUNDS, recording_rows
from atedm_bench.ops.rows import OpsRows, dtype_name
from atedm_bench.ops.shapes import Shape
from atedm_bench.ops.variants import OpsVariant, variants_of

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
        self._rows = OpsRows(self.ceilings)
        self._left_out: list[str] = []
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
                notify(f"{dtype_name(dtype)}: ceilings of this device")
                self.ceilings[dtype_name(dtype)] = measure_ceilings(s.device, dtype)
            rounds = min(max(s.repeats, _MIN_ROUNDS), MAX_ROUNDS)
            self.recording = recording_rows(s.device, s.dtypes[0], rounds, s.only)
            self.failed |= any("error" in row for row in self.recording)
            passes = self._passes()
            for n, (dtype, shape, compiled) in enumerate(passes):
                what = f"{dtype_name(dtype)}, {shape.size}, level {shape.level}, batch {shape.batch}"
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
        variants = variants_of(inputs, self.settings.iterations, self.settings.only, compiled)
        variants = [variant for variant in variants if self._tried(variant, self._warm_up)]
        for done in range(self.settings.repeats):
            if done >= _MIN_ROUNDS and time.monotonic() > end:
                break
            for variant in by_turns(variants, done):
                if not self._tried(variant, self._time):
                    variants = [other for other in variants if other is not variant]
        self._rows.add(variants, compiled)

    def _tried(self, variant: OpsVariant, action: Callable[[OpsVariant], None]) -> bool:
        """Run ``action``. If it raises, add a row with the error and return False: out of memory is a result too."""
        try:
            action(variant)
        except Exception as error:
            self._rows.add_failed(variant, error)
            self.failed |= variant.name.startswith(OURS)
            if self.settings.device.type == "cuda":
                torch.cuda.empty_cache()
            return False
        return True

    def _warm_up(self, variant: OpsVariant) -> None:
        device = self.settings.device
        if variant.name in (PLAIN, COMPILED):
            _check_memory(variant.map_bytes, device)
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

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat object per case and variant."""
        return list(self._rows.rows)

    def settings_for_report(self) -> dict[str, Any]:
        """Everything that the figures depend on."""
        s = self.settings
        return {
            "device": str(s.device),
            "dtypes": [dtype_name(dtype) for dtype in s.dtypes],
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
