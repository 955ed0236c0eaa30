"""``atedm flops``: count what pruning saves, without weights and without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atedm.cli.checks import (
    bad,
    check_applicable,
    check_json,
    check_options,
    chosen_settings,
    failing_clearly,
    finite,
    local_model,
    parse_levels,
    parse_size,
)
from atedm.cli.loading import load_config
from atedm.cli.parameters import Levels, OptionsFile, Ratio, Size

if TYPE_CHECKING:
    from atedm.app.flops import Flops, UNetFlops
    from atedm.policy.options import Options

PLACEMENTS = ("early", "paper", "both")

# AT-EDM and ToMe on SDXL at guidance 7, COCO 2017, one call at 1024² (AT-EDM, table 2): TFLOPs, FID and CLIP score.
PAPER_ROWS = (
    {"row": "a", "levels": (2, 3), "at_edm": (2.9, 52.00, 0.2784), "tome": (2.9, 58.76, 0.2954)},
    {"row": "b", "levels": (2, 3), "at_edm": (3.6, 29.80, 0.3095), "tome": (3.6, 40.94, 0.3154)},
    {"row": "c", "levels": (2, 3), "at_edm": (4.1, 28.04, 0.3209), "tome": (4.1, 35.27, 0.3198)},
    {"row": "d†", "levels": (3,), "at_edm": (4.5, 27.23, 0.3245), "tome": (4.6, 32.46, 0.3235)},
)
PHASES = {"pruned": "all pruned"}  # the name of a kind of step in the table, if it differs
PAPER_SETTINGS = {"model": "sdxl", "size": "1024x1024", "batch": 1, "tokens": 77}


def flops(
    model: Annotated[str, typer.Option(help="sdxl, or a local diffusers folder (a pipeline's or a UNet's).")] = "sdxl",
    size: Size = "1024",
    preset: Annotated[
        str | None,
        typer.Option(help="Preset: quality, fast, paper or paper-dagger. Default: the published method."),
    ] = None,
    options: OptionsFile = None,
    ratio: Ratio = None,
    levels: Levels = None,
    placement: Annotated[
        str | None,
        typer.Option(help="Where a block drops tokens: early, paper or both. Default: both, or from the settings."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=100_000, help="Denoising steps that the average covers.")] = 50,
    budget: Annotated[
        float | None, typer.Option(callback=finite, help="Find the ratio whose average call takes this many TFLOPs.")
    ] = None,
    paper: Annotated[bool, typer.Option("--paper", help="Compare with rows a to d of the paper (SDXL, 1024).")] = False,
    batch: Annotated[int, typer.Option(min=1, max=65_536, help="Images per call; guidance doubles them.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, max=65_536, help="Text tokens.")] = 77,
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
) -> None:
    """Count the FLOPs of one UNet call, full and pruned, without weights or a GPU (2 FLOPs per multiply-add)."""
    from rich.console import Console

    from atedm import DSAP
    from atedm.app import report
    from atedm.app.flops import UNetFlops
    from atedm.policy.options import PUBLISHED

    if placement is not None and placement not in PLACEMENTS:
        raise bad("placement", f"{placement!r}; expected one of {', '.join(PLACEMENTS)}")
    if budget is not None and budget <= 0:
        raise bad("budget", f"{budget}; expected a positive number of TFLOPs")
    check_json(json, options, local_model(model))
    chosen = parse_levels(levels)
    named = chosen_settings(preset, options)
    base = check_options(PUBLISHED if named is None else named, {"ratio": ratio, "levels": chosen})
    if placement is None:
        placement = "both" if named is None else base.placement
    where = ("early", "paper") if placement == "both" else (placement,)
    variants = [check_options(base, {"placement": each}) for each in where]
    width, height = parse_size(size)
    config = load_config(model)
    settings: dict[str, Any] = {
        **{"model": model, "size": f"{width}x{height}", "batch": batch, "tokens": tokens, "steps": steps},
        **{"light_steps": DSAP().light_steps(steps), "flops_per_multiply_add": 2},
        **base.to_dict(),
    }
    is_papers = all(settings[key] == value for key, value in PAPER_SETTINGS.items())
    if paper and (budget is not None or named is not None or not is_papers):
        raise bad("paper", "the paper's rows are for --model sdxl --size 1024 --batch 1 --tokens 77, without --budget")

    progress = Console(stderr=True)
    with failing_clearly():
        counter = UNetFlops(config, width=width, height=height, batch=batch, tokens=tokens)
        check_applicable(base, counter.unet)
        with progress.status("counting …") as status:
            rows = _counted(counter, variants, settings, budget, paper, status)
        if json is not None:
            report.write_json(report.report(report.command_line(), "meta", settings, rows), json)
    if paper:
        _print_paper(rows, settings)
    else:
        _print(rows, settings, base, budget)


def _counted(
    counter: UNetFlops,
    variants: list[Options],
    settings: dict[str, Any],
    budget: float | None,
    paper: bool,
    status: Any,
) -> list[dict[str, Any]]:
    if paper:
        return list(_paper_rows(counter, settings, status))
    steps = settings["steps"]
    if budget is not None:
        return [row for each in variants for row in _budget_rows(counter, each, steps, budget, status)]
    rows = [_row("full", counter.full(), counter)]
    return rows + [row for each in variants for row in _rows(counter, each, steps, status)]


def _join(levels: Any) -> str:
    return ",".join(map(str, levels))


def _row(name: str, flops: Flops, counter: UNetFlops, **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "tflops": flops.tflops,
        "part_of_full": flops.unet / counter.full().unet,
        "scoring_tflops": flops.scoring_tflops,
        **{"ratio": None, "levels": None, "placement": None, "phase": "full", **fields},
    }


def _rows(counter: UNetFlops, options: Options, steps: int, status: Any) -> Iterator[dict[str, Any]]:
    """One row for each kind of step, and one for the mean of a run, if its kinds are known in advance."""
    from atedm.policy.schedule import KINDS

    status.update(f"counting: {options.placement} placement")
    phases = {PHASES.get(kind, kind): counter.of_kind(options, kind) for kind in KINDS if kind in options.kinds}
    if options.steps.planned(steps) is not None:
        phases["average"] = counter.mean(options, options.kinds_of(steps))
    if not options.prunes:
        for phase, flops in phases.items():
            yield _row(phase, flops, counter, phase=phase)
        return
    ratio = options.ratio if isinstance(options.ratio, float | int) else str(options.ratio)
    where = {"ratio": ratio, "levels": _levels(counter, options.levels), "placement": options.placement}
    for phase, flops in phases.items():
        yield _row(f"{options.placement} placement, {phase}", flops, counter, phase=phase, **where)


def _levels(counter: UNetFlops, levels: tuple[int, ...] | None) -> str:
    from atedm.unet.blocks import attention_blocks

    return _join(levels or sorted({block.level for block in attention_blocks(counter.unet)}))


def _budget_rows(
    counter: UNetFlops, options: Options, steps: int, budget: float, status: Any
) -> Iterator[dict[str, Any]]:
    from atedm.app.flops import MAX_RATIO, solve_decreasing

    name = options.placement

    def average(ratio: float) -> float:
        status.update(f"{name} placement: counting at ratio {ratio:.4f}")
        return counter.mean(replace(options, ratio=ratio), options.kinds_of(steps)).unet

    try:
        ratio = solve_decreasing(average, budget * 1e12, 0.0, MAX_RATIO)
    except ValueError as error:
        raise bad("budget", f"{name} placement: {error}") from error
    for row in _rows(counter, replace(options, ratio=ratio), steps, status):
        yield {**row, "budget_tflops": budget}


def _paper_rows(counter: UNetFlops, settings: dict[str, Any], status: Any) -> Iterator[dict[str, Any]]:
    """For each row of the paper: the ratio with the same TFLOPs under the paper's placement, and our FLOPs there."""
    from atedm.app.flops import MAX_RATIO, solve_decreasing

    for entry in PAPER_ROWS:
        levels, (budget, fid, clip), (tome_tflops, tome_fid, tome_clip) = (
            entry["levels"],
            entry["at_edm"],
            entry["tome"],
        )
        published = {
            **{"paper_tflops": budget, "paper_fid": fid, "paper_clip": clip},
            **{"tome_tflops": tome_tflops, "tome_fid": tome_fid, "tome_clip": tome_clip},
        }

        def all_pruned(ratio: float, levels: tuple[int, ...] = levels, row: str = entry["row"]) -> float:
            status.update(f"AT-EDM-{row}: counting at ratio {ratio:.4f}")
            return counter.pruned(ratio, levels=levels, placement="paper").unet

        ratio = solve_decreasing(all_pruned, budget * 1e12, 0.0, MAX_RATIO)
        for placement in ("paper", "early"):
            options = {"levels": levels, "placement": placement}
            yield _row(
                f"AT-EDM-{entry['row']}, {placement} placement",
                counter.pruned(ratio, **options),
                counter,
                ratio=ratio,
                levels=_join(levels),
                placement=placement,
                phase="all pruned",
                average_tflops=counter.average(ratio, steps=settings["steps"], **options).tflops,
                **published,
            )


def _title(settings: dict[str, Any]) -> str:
    return "{model}, {size}, batch {batch}, {tokens} text tokens: FLOPs of one UNet call".format(**settings)


def _print(rows: list[dict[str, Any]], settings: dict[str, Any], options: Options, budget: float | None) -> None:
    from rich.console import Console

    from atedm.app.report import print_table

    console, steps = Console(), settings["steps"]
    planned = options.steps.planned(steps)
    kinds = [] if planned is None else options.kinds_of(steps)
    phases = {PHASES.get(kind, kind): f"{PHASES.get(kind, kind)}: {kinds.count(kind)} of {steps}" for kind in kinds}
    shown = [
        {
            "name": row["name"].removesuffix(f", {row['phase']}"),
            "phase": None if row["phase"] == "full" else phases.get(row["phase"], row["phase"]),
            "ratio": f"{row['ratio']:.4g}" if isinstance(row["ratio"], float) else row["ratio"],
            "tflops": f"{row['tflops']:.3f}",
            "part_of_full": f"{row['part_of_full']:.1%}",
            "scoring_tflops": f"{row['scoring_tflops']:.3f}",
        }
        for row in rows
    ]
    columns = {
        **{"name": "", "phase": "phase", "ratio": "ratio", "tflops": "TFLOPs"},
        **{"part_of_full": "of full", "scoring_tflops": "scoring"},
    }
    print_table(shown, columns, _title(settings), console)
    if planned is None:
        console.print(f"{options.steps!r} chooses the kinds as it runs: only a run can tell its FLOPs.")
    if budget is not None:
        for row in rows:
            if row["phase"] == "average":
                console.print(
                    f"{row['placement']} placement: ratio {row['ratio']:.4f} needs {row['tflops']:.3f} TFLOPs per call "
                    f"on average (asked: {budget:g})"
                )
    if not options.prunes:
        return
    console.print(
        f"Levels pruned: {rows[-1]['levels']}. Scoring (ranking and source map, every iteration counted: an upper "
        "bound) is not in TFLOPs.",
        style="dim",
    )


def _print_paper(rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    from rich.console import Console

    from atedm.app.report import print_table

    console, shown = Console(), []
    for ours, early in zip(rows[::2], rows[1::2], strict=True):
        shown.append(
            {
                "name": ours["name"].split(",")[0].removeprefix("AT-EDM-"),
                "paper": f"{ours['paper_tflops']:.1f}",
                "quality": f"{ours['paper_fid']:.2f} / {ours['paper_clip']:.4f}",
                "tome": f"{ours['tome_fid']:.2f} / {ours['tome_clip']:.4f}",
                "ratio": f"{ours['ratio']:.3f}",
                "ours": f"{ours['tflops']:.3f}",
                "early": f"{early['tflops']:.3f}",
                "average": f"{early['average_tflops']:.2f}",
            }
        )
    columns = {
        **{"name": "", "paper": "paper", "quality": "AT-EDM", "tome": "ToMe"},
        **{"ratio": "ratio", "ours": "ours", "early": "early", "average": "avg"},
    }
    print_table(shown, columns, _title(settings), console)
    console.print(
        "TFLOPs: paper, as published; ours, with the paper's placement and every block pruned, at the ratio whose "
        "TFLOPs are nearest; early, with early placement at that ratio; avg, the mean of early over the run "
        f"({settings['light_steps']} of {settings['steps']} steps light). Scoring is not included. AT-EDM and ToMe: "
        "published FID / CLIP score at guidance 7 (ToMe-d needs 4.6 TFLOPs). † leaves level 2 whole.",
        style="dim",
    )
