"""Times whole runs of diffusers' SDXL pipeline: full, the presets, DeepCache and tomesd, in turn.

Features of random weights do not change as a trained model's do, so a schedule that chooses as it runs would choose
different steps here. Such a preset runs the steps that it chose most often for the embedded model instead.
"""

from __future__ import annotations

import collections
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from torch import nn

import atedm
from atedm.app.flops import UNetFlops
from atedm.app.models import TIME_IDS, latent_size
from atedm.policy.options import Options, resolve
from atedm_bench.measure import by_turns, error_line, seconds_of
from atedm_bench.methods import Costs, DeepCache, Method, Ours, ToMe

PREFIX = "run: "
FULL, TOMESD = f"{PREFIX}full", f"{PREFIX}tomesd"
_DEEPCACHE = {f"{PREFIX}DeepCache {n}": n for n in (2, 3)}
_OURS = {f"{PREFIX}{name}": name for name in ("default", "quality", "fast", "paper")}
# The first letters of the kinds that a preset chose most often in 25 Euler steps of the embedded model (the column
# "kinds" of `atedm-bench quality`). A run with another number of steps takes them at the same fractions of the run.
_CHOSEN = {
    f"{PREFIX}default": "wwwwwwwwrprrwrrprrwrrprrw",
    f"{PREFIX}quality": "wwwwwwwwwrwrrwrrwrrrwrrrw",
    f"{PREFIX}fast": "wrwrwrwrwrrwrrrwrrrwrrrrw",
}
_LETTERS = {kind[0]: kind for kind in atedm.KINDS}
RUNS = (FULL, *_OURS, *_DEEPCACHE, TOMESD)

GUIDANCE = 5.0
_WARM_UP_STEPS = 3  # on a CPU

# SDXL's own (scheduler/scheduler_config.json of stabilityai/stable-diffusion-xl-base-1.0).
_SCHEDULER = {
    **{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    **{"timestep_spacing": "leading", "steps_offset": 1},
}

Notify = Callable[[str], None]


def _options(name: str, ratio: float) -> Options:
    chosen = [_LETTERS[letter] for letter in _CHOSEN.get(name, "")]
    return resolve(_OURS[name], {"ratio": ratio, **({"schedule": chosen} if chosen else {})})


@dataclass
class _Run:
    """One method and its timed runs."""

    name: str
    method: Method
    kinds: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class WholeRuns:
    """Times runs of ``steps`` steps on one UNet, which each method patches for its own runs.

    Args:
        unet: SDXL's UNet, or one with the same conditions (``addition_embed_type="text_time"``).
        counter: counts the UNet's FLOPs, for this size and batch.
        width, height: image size in pixels. tokens: text tokens.
        batch: batch of a UNet call. With an even one, half of it has the prompt and half does not (guidance).
        ratio: fraction of the tokens that a pruned step drops. merge_ratio: tomesd's ratio.
        only: names from :data:`RUNS`.
    """

    def __init__(
        self,
        unet: nn.Module,
        counter: UNetFlops,
        *,
        steps: int,
        width: int,
        height: int,
        batch: int,
        tokens: int,
        ratio: float,
        merge_ratio: float,
        only: tuple[str, ...],
    ) -> None:
        self.failed: dict[str, str] = {}
        self._steps = steps
        scheduler = EulerDiscreteScheduler(**_SCHEDULER)
        scheduler.set_timesteps(steps)
        self._costs = Costs(counter, scheduler.timesteps)
        modules = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        self._pipe = StableDiffusionXLPipeline(**modules, unet=unet, scheduler=scheduler, add_watermarker=False)
        self._pipe.set_progress_bar_config(disable=True)
        self._arguments = self._inputs(width, height, batch, tokens)
        methods: dict[str, Method] = {
            FULL: Method(),
            **{name: Ours(_options(name, ratio)) for name in _OURS},
            **{name: DeepCache(interval) for name, interval in _DEEPCACHE.items()},
            TOMESD: ToMe(merge_ratio),
        }
        self._runs = [_Run(name, methods[name]) for name in RUNS if name in only]

    def _inputs(self, width: int, height: int, batch: int, tokens: int) -> dict[str, Any]:
        unet = self._pipe.unet
        guided = batch % 2 == 0
        images = batch // 2 if guided else batch
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(images, *size, generator=generator).to(unet.device, unet.dtype)

        pooled = unet.config.projection_class_embeddings_input_dim - TIME_IDS * unet.config.addition_time_embed_dim
        text = tokens, unet.config.cross_attention_dim
        arguments = {
            "prompt_embeds": normal(*text),
            "pooled_prompt_embeds": normal(pooled),
            "latents": normal(unet.config.in_channels, *latent_size(width, height)),
            "guidance_scale": GUIDANCE if guided else 1.0,
            **{"width": width, "height": height, "output_type": "latent"},
        }
        if guided:
            arguments |= {"negative_prompt_embeds": normal(*text), "negative_pooled_prompt_embeds": normal(pooled)}
        return arguments

    def measure(self, repeats: int, end: float, notify: Notify) -> None:
        """Warm up, then time round by round. A round starts only if it can end by ``end``, the first one always."""
        for run in list(self._runs):
            notify(f"{run.name}: warming up")
            try:
                self._warm_up(run)
            except Exception as error:
                # A peer that is missing or fails is a result; an error in atedm is not.
                if isinstance(run.method, Ours) or type(run.method) is Method:
                    raise
                self.failed[run.name] = error_line(error)
                self._runs.remove(run)
        done = 0
        while done < repeats and (done == 0 or sum(r.seconds[-1] for r in self._runs) < end - time.monotonic()):
            for run in by_turns(self._runs, done):
                notify(f"{run.name}: round {done + 1} of {repeats}")
                self._time(run)
            done += 1

    def _warm_up(self, run: _Run) -> None:
        # A GPU tunes and compiles kernels for each kind of step. A CPU does not, and a run takes it minutes.
        is_cpu = self._pipe.unet.device.type == "cpu"
        steps = min(_WARM_UP_STEPS, self._steps) if is_cpu else self._steps
        with run.method.in_force(self._pipe):
            self._pipe(**self._arguments, num_inference_steps=steps)

    def _time(self, run: _Run) -> None:
        def call() -> None:
            self._pipe(**self._arguments, num_inference_steps=self._steps)

        device = self._pipe.unet.device
        with run.method.in_force(self._pipe):
            if not run.method.records:
                run.seconds.append(seconds_of(call, device))
                run.kinds = run.method.kinds(self._costs)
                return
            with atedm.record(self._pipe, tokens=False) as recording:  # costs microseconds per call
                run.seconds.append(seconds_of(call, device))
            run.kinds = recording.kinds

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat object per method that has been timed; ``tflops`` is that of its mean call."""
        done = {run.name: statistics.median(run.seconds) for run in self._runs if run.seconds}
        rows = []
        for run in self._runs:
            if not run.seconds:
                continue
            flops = run.method.flops(self._costs, run.kinds)
            counts = collections.Counter(run.kinds)
            rows.append(
                {
                    "name": run.name,
                    "run_seconds": done[run.name],
                    "run_seconds_low": min(run.seconds),
                    "run_seconds_high": max(run.seconds),
                    "run_steps": self._steps,
                    "repeats": len(run.seconds),
                    "derived": False,
                    "tflops": flops.tflops,
                    "scoring_tflops": flops.scoring_tflops,
                    "run_speedup": done[FULL] / done[run.name] if FULL in done else None,
                    "kinds": " ".join(f"{count} {kind}" for kind, count in counts.items()),
                }
            )
        return rows
