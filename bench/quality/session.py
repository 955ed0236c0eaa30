"""Runs ``atedm-bench quality`` from its options to its files, on the embedded model's scenes or a real checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from atedm.app import report
from atedm.app.flops import UNetFlops
from atedm.app.models import LATENT_SCALE
from atedm.app.prompts import PromptCase, Sampling, read_prompts
from atedm.files import UNET_TIMES, is_stream
from atedm.policy.options import PUBLISHED, Options
from atedm_bench.methods import Costs
from atedm_bench.quality import convergence, plots, refills
from atedm_bench.quality.against import Against
from atedm_bench.quality.claims import MEASURES, check_claims
from atedm_bench.quality.lab import CAPTIONS, CHOSEN, SceneFigures, scene_cases
from atedm_bench.quality.reference import ReferenceFigures
from atedm_bench.quality.run import Run
from atedm_bench.quality.samplers import EULER, set_scheduler, timesteps_of
from atedm_bench.quality.settings import FULL, MAIN, Plan
from atedm_bench.quality.timing import ROUNDS, unet_seconds

QUICK_IMAGES, QUICK_STEPS, QUICK_ROUNDS = 8, 10, 2

HELD_OUT = "held-out"

# The file for the rows, in the output folder.
_ROWS = "quality.json"

# The studies made in addition to the pictures, on some of the cases.
STUDIES = ("convergence", "refills")
_WATCHED, _QUICK_WATCHED = 8, 2

# Columns of the contact sheets, and the groups of settings that each sheet shows below the full model's pictures.
_SHEET_PICTURES = 8
SHEETS = {
    "sheet-presets": ("presets", "peers"),
    "sheet-plane": ("plane", "tried"),
    "sheet-published": ("budget", "ablation"),
}

COLUMNS = {
    "name": "setting",
    "flops_part": "FLOPs",
    "accuracy": "accuracy",
    "accuracy_change": "change, points",
    "frechet_distance": "Fréchet",
    "fid": "FID",
    "clip_score": "CLIP",
    "psnr_db": "PSNR",
    "ssim": "SSIM",
    "perceptual_distance": "perceptual",
    "against_psnr_db": "PSNR, other run",
    "unet_seconds": "UNet s",
}


@dataclass(frozen=True)
class LabRequest:
    """The command's options (see its help). None if the default depends on the device or the model."""

    quick: bool = False
    images: int | None = None
    steps: int | None = None
    guidance: float | None = None
    batch: int | None = None
    scheduler: str = EULER
    settings: Sequence[str] | None = None
    tried: Mapping[str, Options] = field(default_factory=dict)
    captions: str | None = None
    seed: int = 0
    out: Path | None = None
    json: Path | None = None
    convergence: bool = True
    timing: bool = True
    model: str | None = None
    prompts: Path | None = None
    references: Path | None = None
    dtype: str | None = None
    clip_model: str = ""
    fid_features: str = "inception"
    allow_pickled: bool = False
    against: Path | None = None


def resolved(request: LabRequest, device: torch.device) -> LabRequest:
    """Return ``request`` with all defaults filled in."""
    real, gpu = request.model is not None, device.type == "cuda"
    captions = None if real else request.captions or HELD_OUT
    defaults = {
        "images": None if real else QUICK_IMAGES if request.quick else CHOSEN if captions == "chosen" else 256,
        "steps": QUICK_STEPS if request.quick else 50 if real or gpu else 25,
        "guidance": 7.0 if real else 5.0,
        "batch": 1 if real else QUICK_IMAGES if request.quick else 32,
        "dtype": "bf16" if real else "fp32",
        "captions": captions,
        "out": Path("outputs") / _folder(request),
    }
    request = dataclasses.replace(
        request, **{key: value for key, value in defaults.items() if getattr(request, key) is None}
    )
    return dataclasses.replace(request, json=request.json or request.out / _ROWS)


def _folder(request: LabRequest) -> str:
    """Return the name of the output folder: one per kind of run, because pictures of two runs must not mix."""
    parts = ["quality"] + ["quick"] * request.quick + [request.captions] * (request.captions not in (None, HELD_OUT))
    return "-".join(parts + [request.scheduler] * (request.scheduler != EULER))


def flops_of(pipe: Any, width: int, height: int) -> UNetFlops:
    """Return the FLOP counter of ``pipe``'s UNet at a size in pixels. Equal arguments share one counter."""
    # The counter expects the pixels of an autoencoder with SDXL's scale.
    sides = [side * LATENT_SCALE // pipe.vae_scale_factor for side in (width, height)]
    config = {key: value for key, value in pipe.unet.config.items() if not key.startswith("_")}
    return _flops_of(json.dumps(config), *sides, pipe.tokenizer_2.model_max_length)


@functools.cache
def _flops_of(config: str, width: int, height: int, tokens: int) -> UNetFlops:
    return UNetFlops(json.loads(config), width=width, height=height, tokens=tokens)


def run_embedded(request: LabRequest, device: torch.device) -> None:
    """Run the lab on the embedded model.

    Raises:
        ValueError: more pictures are asked for than there are chosen captions, or the settings are invalid.
    """
    from atedm.embedded import embedded_pipeline

    if request.captions == "chosen" and request.images > CHOSEN:
        raise ValueError(f"images is {request.images}; expected at most {CHOSEN} of the chosen captions")
    pipe = embedded_pipeline().to(device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[request.dtype]
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        torch.nn.Module.to(part, dtype)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    cases = scene_cases(request.images, request.seed, CAPTIONS[request.captions])
    sampling = Sampling(request.steps, request.guidance, side, side, request.batch)
    _run(request, device, pipe, "embedded", cases, sampling, lambda: SceneFigures(cases, side))


def run_checkpoint(request: LabRequest, device: torch.device, pipe: Any, size: tuple[int, int]) -> None:
    """Run the lab on a real checkpoint, with FID and CLIP score.

    Raises:
        ValueError: the prompts, the references, the CLIP model or the settings do not serve; the message names them.
    """
    prompts = read_prompts(request.prompts)[: QUICK_IMAGES if request.quick else request.images]
    if len(prompts) < 2:
        raise ValueError(f"prompts: {request.prompts} holds one prompt; expected at least 2 for FID")
    cases = [PromptCase(prompt, request.seed + n) for n, prompt in enumerate(prompts)]
    sampling = Sampling(request.steps, request.guidance, *size, request.batch)

    def figures() -> ReferenceFigures:
        clip = request.clip_model, device, request.allow_pickled
        return ReferenceFigures(cases, request.references, request.fid_features, *clip)

    _run(request, device, pipe, request.model, cases, sampling, figures)


def _run(
    request: LabRequest,
    device: torch.device,
    pipe: Any,
    model: str,
    cases: Sequence[PromptCase],
    sampling: Sampling,
    make_figures: Callable[[], Any],
) -> None:
    main = PartialState().is_main_process
    console = Console(stderr=True, quiet=not main)
    set_scheduler(pipe, request.scheduler)
    costs = Costs(flops_of(pipe, sampling.width, sampling.height), timesteps_of(pipe, sampling.steps))
    with console.status("counting FLOPs"):
        settings = Plan(costs, request.tried).settings(request.settings)
    run = Run(pipe, model, request.scheduler, settings, cases, sampling, request.out)
    against = None if request.against is None else Against(request.against, cases, sampling)
    if main:
        # Before hours of drawing: a reference or a model that scores may be missing.
        figures = make_figures()
        run.check_root()
    PartialState().wait_for_everyone()
    columns = (
        TextColumn("{task.description:<42}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not main) as progress:
        total = progress.add_task("pictures", total=len(cases) * len(settings))
        processes = PartialState().num_processes

        def on_picture(name: str, count: int) -> None:
            # Assume that the other processes progress at the same pace.
            made = progress.tasks[total].completed + count * processes
            progress.update(total, description=name, completed=min(made, len(cases) * len(settings)))

        run.make(on_picture)
        if not main:
            return
        studies = _studies(request, run, progress) if request.convergence and request.model is None else {}
        seconds = _seconds(request, run, progress) if request.timing else {}
        measured = progress.add_task("figures", total=len(settings))
        rows, samples = run.rows(
            figures,
            costs,
            seconds,
            lambda name: progress.update(measured, description=f"figures: {name}", advance=1),
            against,
        )
    _write(request, device, run, rows, check_claims(rows, samples), studies)


def _studies(request: LabRequest, run: Run, progress: Progress) -> dict[str, list[dict[str, Any]]]:
    """Study the power iteration and the refills, at the ratio of the published method."""
    task = progress.add_task("the power iteration", total=1 + len(refills.WAYS))
    published = next((s.method.options for s in run.settings if s.name == f"ours {MAIN}"), PUBLISHED)
    asked = (run.cases[: _QUICK_WATCHED if request.quick else _WATCHED], published.ratio, run.sampling)
    found = {"convergence": convergence.study(run.pipe, *asked)}
    found["refills"] = refills.study(
        run.pipe, *asked, lambda name: progress.update(task, description=f"refills: {name}", advance=1)
    )
    progress.update(task, advance=1)
    return found


def _seconds(request: LabRequest, run: Run, progress: Progress) -> dict[str, list[float]]:
    rounds = QUICK_ROUNDS if request.quick else ROUNDS
    task = progress.add_task("time", total=rounds * len(run.settings))
    return unet_seconds(
        run.pipe,
        run.settings,
        run.cases,
        run.sampling,
        request.out / UNET_TIMES,
        rounds,
        lambda name: progress.update(task, description=f"time: {name}", advance=1),
    )


def figures_beside(request: LabRequest) -> list[Path]:
    """Return the files of the claims and of each study: beside the rows, or in ``out`` if the rows go into a pipe."""
    path = request.out / _ROWS if is_stream(request.json) else request.json
    return [path.with_name(f"{path.stem}-{name}.json") for name in ("claims", *STUDIES)]


def _write(
    request: LabRequest,
    device: torch.device,
    run: Run,
    rows: list[dict[str, Any]],
    claims: list[dict[str, Any]],
    studies: dict[str, list[dict[str, Any]]],
) -> None:
    described = {"model": run.model, "scheduler": run.scheduler, **dataclasses.asdict(run.sampling)}
    described |= {"images": len(run.cases), "captions": request.captions, "seed": request.seed}
    described |= {"dtype": request.dtype, "fid_features": request.fid_features if request.model else None}
    described |= {} if request.against is None else {"against": str(request.against)}
    command = report.command_line("atedm-bench")
    report.write_json(report.report(command, device, described, rows), request.json, keep_same=True)
    claims_path, *study_paths = figures_beside(request)
    report.write_json(report.report(command, device, described, claims), claims_path, keep_same=True)
    written = [request.json, claims_path]
    plots.plot_trade_off(rows, request.out / "trade-off.png")
    written.append(request.out / "trade-off.png")
    parts = {row["name"]: row["flops_part"] for row in rows}
    for name, groups in SHEETS.items():
        shown = [setting for setting in run.settings if setting == FULL or setting.group in groups]
        if len(shown) > 1:
            cases = run.cases[:_SHEET_PICTURES]
            plots.contact_sheet(shown, parts, cases, run.root, request.out / f"{name}.png")
            written.append(request.out / f"{name}.png")
    for name, path in zip(STUDIES, study_paths, strict=True):
        if name in studies:
            report.write_json(report.report(command, device, described, studies[name]), path, keep_same=True)
            written.append(path)
    if studies:
        plots.plot_convergence(studies["convergence"], request.out / "convergence.png")
        written.append(request.out / "convergence.png")
    _print(rows, claims, studies, described, device)
    Console().print("Written: " + ", ".join(map(str, written)), markup=False)


def _print(
    rows: list[dict[str, Any]],
    claims: list[dict[str, Any]],
    studies: dict[str, list[dict[str, Any]]],
    described: dict[str, Any],
    device: torch.device,
) -> None:
    columns = {key: heading for key, heading in COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    title = "{model}: {images} pictures, {steps} steps ({scheduler}), guidance {guidance:g}, {dtype}".format(
        **described
    )
    report.print_table([_shown(row) for row in rows], columns, f"{title}, on {report.device_name(device)}")
    if claims:
        report.print_table(
            _shown_claims(claims),
            {
                "name": "claim",
                **{key: COLUMNS[key] for key in MEASURES if MEASURES[key].decides and key in claims[0]},
                **{"likeness": "likeness", "verdict": "verdict"},
            },
            "The paper's claims and our own, on this model (at 99 %)",
        )
    if studies:
        report.print_table(
            [row for row in studies["convergence"] if row["step"] is None],
            {
                **{"run": "run", "name": "block", "tokens": "tokens", "iterations_to_0.01": "its. to 1e-2"},
                **{
                    "iterations_to_0.001": "to 1e-3",
                    "jaccard_2": "overlap after 2",
                    "jaccard_3": "3",
                    "jaccard_5": "5",
                    "jaccard_warm_2": "from the step before, after 2",
                    "jaccard_warm_3": "3",
                },
            },
            "The power iteration on this model's maps",
        )
        report.print_table(
            studies["refills"],
            {
                **{"name": "tokens", "level": "level", "side": "side of the map", "distance": "tokens to the source"},
                **{"from_most_used": "refilled by the most used 5 %", "key_cosine": "cosine of keys with it"},
                "kept_again": "kept again at the next step",
            },
            "What refills dropped tokens, at the ratio of ours c",
        )
    for row in rows:
        if row["note"]:
            Console().print(f"{row['name']}: {row['note']}", style="dim", markup=False)


def _shown_claims(claims: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a table row for each claim, followed by one for each pair that was compared: "better / worse"."""
    shown = []
    for n, row in enumerate(claims):
        if n == 0 or claims[n - 1]["name"] != row["name"]:
            whose = "the paper" if row["of"] == "paper" else "ours"
            shown.append({"name": f"{row['name']} ({whose})", "verdict": row["claim_verdict"].upper()})
        pair = {key: f"{row[key]:.3g} / {row[f'{key}_of_worse']:.3g}" for key in MEASURES if key in row}
        shown.append({**row, "name": f"  {row['better']} / {row['worse']}", **pair})
    return [
        {key: "" if row.get(key) is None else row[key] for key in ("name", *MEASURES, "likeness", "verdict")}
        for row in shown
    ]


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    shown = dict(row, flops_part=f"{row['flops_part']:.0%}")
    if len(set(row["kinds"])) > 1:
        shown["name"] = f"{row['name']}\n{row['kinds']}"
    if "accuracy" in row:
        shown["accuracy"] = "{accuracy:.1%}\n{accuracy_low:.1%}–{accuracy_high:.1%}".format(**row)
    for key, digits in (
        ("accuracy_change", 1),
        ("psnr_db", 2),
        ("against_psnr_db", 2),
        ("ssim", 3),
        ("perceptual_distance", 3),
        ("frechet_distance", 2),
        ("clip_score", 2),
        ("unet_seconds", 3),
    ):
        if key in row and f"{key}_low" in row:
            low, high = (f"{row[f'{key}_{end}']:.{digits}f}" for end in ("low", "high"))
            shown[key] = f"{row[key]:.{digits}f}\n{low}–{high}"
    return shown
