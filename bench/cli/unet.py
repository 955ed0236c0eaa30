"""``atedm-bench unet``: times one call of the UNet, full, pruned and merged, and whole runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from atedm.cli.checks import (
    bad,
    check_applicable,
    check_json,
    check_options,
    failing_clearly,
    finite,
    local_model,
    parse_device,
    parse_dtype,
    parse_size,
)
from atedm.cli.loading import load_config
from atedm.cli.parameters import Device, Dtype, Size
from atedm_bench.cli.common import check_minutes, check_ratio, run
from atedm_extras import require

DEFAULT_REPEATS = {"cpu": 5, "cuda": 20}


def unet(
    device: Device = None,
    dtype: Dtype = "bf16",
    size: Size = "1024",
    batch: Annotated[int, typer.Option(min=1, max=65_536, help="Batch of the call; guidance takes two per image.")] = 1,
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds. Default: 5 on a CPU, 20 on a GPU.")] = None,
    minutes: Annotated[
        float, typer.Option(callback=finite, help="Time limit for the whole run; the first round always runs.")
    ] = 9.0,
    compile: Annotated[
        bool, typer.Option("--compile", help="Also measure each variant compiled (minutes each).")
    ] = False,
    regional: Annotated[bool, typer.Option(help="Compile the transformer layers only, which is quick.")] = False,
    compile_mode: Annotated[str, typer.Option(help="Mode of torch.compile.")] = "default",
    ratio: Annotated[float, typer.Option(callback=finite, help="Fraction of the tokens to drop.")] = 0.63,
    steps: Annotated[int, typer.Option(min=1, max=100_000, help="Denoising steps that DSAP's average covers.")] = 50,
    run_steps: Annotated[
        int | None, typer.Option("--run", min=1, max=100_000, help="Also time whole runs of this many steps.")
    ] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Only this variant. Can be repeated.")] = None,
    channels_last: Annotated[
        bool, typer.Option(help="Whether convolutions use the channels-last memory format.")
    ] = True,
    model: Annotated[str, typer.Option(help="sdxl, or a local diffusers folder (only its configuration).")] = "sdxl",
    json: Annotated[Path | None, typer.Option(help="File for the rows. Default: a file in outputs/.")] = None,
) -> None:
    """Measure one call of SDXL's UNet (random weights): full, pruned and merged by tomesd, in turn.

    `--run 25` times whole runs of 25 steps in the same way: full, the presets, DeepCache and tomesd.
    If you press Ctrl-C, it prints and writes what it has.
    """
    # torch reads this when it is loaded. Without it, its profiler writes across the progress bar.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    require("bench", "psutil")
    import torch
    from rich.console import Console

    from atedm.app import report
    from atedm.app.models import meta_unet
    from atedm_bench.unet import UNetBench
    from atedm_bench.unet_calls import UNetSettings
    from atedm_bench.unet_variants import VARIANTS
    from atedm_bench.whole_runs import RUNS

    if compile_mode not in torch._inductor.list_mode_options():
        raise bad("compile-mode", f"{compile_mode!r}; expected one of {', '.join(torch._inductor.list_mode_options())}")
    known = (*VARIANTS, *RUNS) if run_steps else VARIANTS
    for name in variant or ():
        if name not in known:
            raise bad("variant", f"{name!r}; expected one of {', '.join(known)}")
    place = parse_device(device)
    width, height = parse_size(size)
    path = json or Path("outputs") / f"bench-unet-{place.type}-{dtype}-{width}x{height}-b{batch}.json"
    check_json(path, local_model(model))
    config = load_config(model)
    if run_steps and config.get("addition_embed_type") != "text_time":
        raise bad("run", f"{run_steps}; expected none: the UNet of {model} does not fit SDXL's pipeline")

    check_applicable(check_options(None, {"ratio": check_ratio(ratio)}), meta_unet(config))

    measured = UNetBench(
        config,
        UNetSettings(
            device=place,
            dtype=parse_dtype(dtype),
            width=width,
            height=height,
            batch=batch,
            ratio=ratio,
            steps=steps,
            repeats=repeats or DEFAULT_REPEATS[place.type],
            minutes=check_minutes(minutes),
            compiled=("regional" if regional else "whole") if compile or regional else None,
            compile_mode=compile_mode,
            channels_last=channels_last,
            run_steps=run_steps or 0,
            only=tuple(variant or ()),
        ),
    )

    def save(finished: bool = False) -> dict[str, Any]:
        settings = {"model": model, **measured.settings_for_report(), "finished": finished}
        document = report.report(report.command_line("atedm-bench"), place, settings, measured.rows())
        report.write_json(document, path)
        return document

    with failing_clearly():
        finished = run(measured, save, path)
        document = save(finished)
    console = Console()
    _print(document, console)
    console.print(f"{'Written to' if finished else 'Interrupted; what was measured is in'} {path}", markup=False)
    if not finished:
        raise typer.Exit(130)


def _print(document: dict[str, Any], console: Any) -> None:
    from atedm.app.report import print_table

    settings, rows = document["settings"], document["rows"]
    if not rows:
        console.print("Nothing was measured.")
        return
    what = "{model}, {size}, batch {batch}, {dtype}, {memory_format}".format(**settings)
    title = f"{what}: one UNet call, median of {settings['rounds']} rounds, on {document['device']}"
    calls = [_shown(row) for row in rows if "speedup" in row]
    if calls:
        columns = {"name": "", "seconds": "seconds", "range": "range", "speedup": "speed-up", "tflops": "TFLOPs"}
        print_table(calls, {**columns, "memory": "peak GB"}, title, console)
    runs = [_shown_run(row) for row in rows if "run_steps" in row]
    if runs:
        columns = {
            **{"name": "", "seconds": "seconds", "range": "range", "speedup": "speed-up"},
            **{"tflops": "TFLOPs a call", "kinds": "steps"},
        }
        print_table(runs, columns, f"Whole runs of {settings['run_steps']} steps", console)
    stages = [_shown_stages(row) for row in rows if row.get("stage_ranking_seconds") is not None]
    if stages:
        columns = {
            **{"name": "", "attention": "attn", "ranking": "G-WPR", "selection": "masks", "source_map": "source"},
            **{"gather": "prune", "recovery": "recover", "overhead": "sum", "part": "of call"},
            "iterations": "iter.",
        }
        print_table(stages, columns, "Stages, ms per call (sum: all but attention)", console)
    for row in rows:
        if "error" in row:
            console.print(f"{row['name']}: could not be measured: {row['error']}", style="yellow", markup=False)
        elif "full_host_seconds" in row:
            console.print(
                f"{row['name']}: {1e3 * row['seconds']:.2f} ms of CPU time per call for Python and dispatch, on top of "
                f"the full UNet's {1e3 * row['full_host_seconds']:.1f} ms (every kernel left out)",
                style="dim",
            )
        elif row["derived"]:
            console.print(
                f"{row['name']}: {row['light_steps']} of {row['steps']} steps light; a run of {row['steps']} calls "
                f"takes {row['run_seconds']:.2f} s (computed from the two phases)",
                style="dim",
            )


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    memory = row.get("peak_memory_bytes")
    return {
        "name": row["name"],
        "seconds": f"{row['seconds']:.3f}",
        "range": f"{row['seconds_low']:.3f}–{row['seconds_high']:.3f}" if "seconds_low" in row else None,
        "speedup": None if row["speedup"] is None else f"{row['speedup']:.3f}×",
        "tflops": f"{row['tflops']:.3f}",
        "memory": None if memory is None else f"{memory / 1e9:.2f}",
    }


def _shown_run(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": row["name"],
        "seconds": f"{row['run_seconds']:.2f}",
        "range": f"{row['run_seconds_low']:.2f}–{row['run_seconds_high']:.2f}",
        "speedup": None if row["run_speedup"] is None else f"{row['run_speedup']:.2f}×",
        "tflops": f"{row['tflops']:.3f}",
        "kinds": row["kinds"],
    }


def _shown_stages(row: dict[str, Any]) -> dict[str, Any]:
    from atedm.app.flops import STAGES

    seconds = {stage: row[f"stage_{stage}_seconds"] for stage in STAGES}
    iterations = row.get("page_rank_iterations")
    return {
        "name": row["name"],
        **{stage: f"{1e3 * value:.1f}" for stage, value in seconds.items()},
        "overhead": f"{1e3 * (sum(seconds.values()) - seconds['attention']):.1f}",
        "part": None if row.get("stages_part_of_seconds") is None else f"{100 * row['stages_part_of_seconds']:.1f} %",
        "iterations": None if iterations is None else f"{iterations:.1f}",
    }
