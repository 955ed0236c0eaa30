"""``atedm-bench ops``: times each op on SDXL's shapes; compares with plain PyTorch, fused attention and the floor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from atedm.cli.checks import (
    bad,
    check_file,
    failing_clearly,
    finite,
    parse_count,
    parse_device,
    parse_dtype,
    parse_list,
    parse_size,
)
from atedm.cli.parameters import Device
from atedm.files import is_stream
from atedm_bench.cli.common import check_minutes, check_ratio, run
from atedm_extras import require

# On a CPU only one size and batch: with larger pictures, plain PyTorch takes minutes for the stored map.
_DEFAULTS = {
    "cpu": {"size": "1024", "batch": "2", "dtype": "bf16", "repeats": 5},
    "cuda": {"size": "1024,768,1216x832,2048", "batch": "2,8", "dtype": "bf16,fp16", "repeats": 30},
}


def ops(
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; separate several by commas.")] = None,
    size: Annotated[str | None, typer.Option(help="Image sizes in pixels, such as 1024,1216x832.")] = None,
    batch: Annotated[
        str | None, typer.Option(help="Batch sizes of a UNet call, comma-separated; guidance takes two per image.")
    ] = None,
    op: Annotated[list[str] | None, typer.Option(help="Only this op. Can be repeated.")] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Iterations of the ranking.")] = 5,
    ratio: Annotated[float, typer.Option(callback=finite, help="Fraction of the tokens to drop.")] = 0.63,
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds. Default: 5 on a CPU, 30 on a GPU.")] = None,
    minutes: Annotated[
        float,
        typer.Option(callback=finite, help="Time limit for the whole run; the report lists the shapes not reached."),
    ] = 9.0,
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Also measure plain PyTorch compiled, at the first size.")
    ] = True,
    json: Annotated[Path | None, typer.Option(help="File for the rows. Default: a file in outputs/.")] = None,
    plot: Annotated[Path | None, typer.Option(help="File for the roofline. Default: a PNG beside the rows.")] = None,
) -> None:
    """Measure each op on the shapes of SDXL's levels 2 and 3, all variants in one run, taking turns.

    An interrupted run (Ctrl-C) prints and writes the finished shapes. The exit status is 1 if one of our ops fails.
    """
    require("bench", "psutil", "matplotlib")
    from rich.console import Console

    from atedm.app import report
    from atedm_bench.ops.plots import plot_roofline
    from atedm_bench.ops.run import OpsBench, OpsSettings
    from atedm_bench.ops.shapes import shape_of
    from atedm_kernels.registry import OPS

    place = parse_device(device)
    defaults = _DEFAULTS[place.type]
    for name in op or ():
        if name not in OPS:
            raise bad("op", f"{name!r}; expected one of {', '.join(OPS)}")
    shapes = tuple(
        shape_of(*parse_size(one), level, _count(number), check_ratio(ratio))
        for one in _listed("size", size, defaults["size"])
        for number in _listed("batch", batch, defaults["batch"])
        for level in (2, 3)
    )
    measured = OpsBench(
        OpsSettings(
            device=place,
            shapes=shapes,
            dtypes=tuple(parse_dtype(name) for name in _listed("dtype", dtype, defaults["dtype"])),
            iterations=iterations,
            repeats=repeats or defaults["repeats"],
            minutes=check_minutes(minutes),
            compiled=compile,
            only=tuple(op or ()),
        )
    )
    default = Path("outputs") / f"bench-ops-{place.type}.json"
    path = json or default
    check_file("json", path)
    # There is no place for a picture beside a pipe or a device.
    picture = plot or (default if is_stream(path) else path).with_suffix(".png")
    check_file("plot", picture)
    if picture.resolve() == path.resolve() and not is_stream(path):
        raise bad("json", f"{path} is where the roofline goes; expected another name")

    def save(finished: bool = False) -> dict[str, Any]:
        settings = {**measured.settings_for_report(), "ratio": ratio, "finished": finished}
        document = report.report(report.command_line("atedm-bench"), place, settings, measured.rows())
        document["recording"] = measured.recording
        report.write_json(document, path)
        return document

    with failing_clearly():
        finished = run(measured, save, path)
        document = save(finished)
        if any("seconds" in row for row in document["rows"]):
            plot_roofline(document, picture)
    console = Console()
    _print(document, console)
    console.print(
        f"{'Written to' if finished else 'Interrupted; what was measured is in'} {path} and {picture}", markup=False
    )
    if not finished:
        raise typer.Exit(130)
    if measured.failed:
        raise typer.Exit(1)


def _listed(option: str, text: str | None, default: str) -> list[str]:
    text = default if text is None else text
    found = parse_list(text)
    if not found:
        raise bad(option, f"{text!r} names none; expected one or more, separated by commas")
    return found


def _count(text: str) -> int:
    count = parse_count(text)
    if count is None:
        raise bad("batch", f"{text!r}; expected comma-separated positive integers, such as 2,8")
    return count


def _print(document: dict[str, Any], console: Any) -> None:
    from atedm.app.report import print_table

    columns = {
        **{"name": "", "variant": "variant", "backend": "backend", "ms": "ms", "spread": "range"},
        **{"attention": "× attn", "floor": "× floor", "bound": "bound by", "plain": "over plain", "copy": "× copy"},
        "memory": "extra of map",
    }
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in document["rows"]:
        groups.setdefault(f"{row['shape']} ({row['size']}, level {row['level']}), {row['dtype']}", []).append(row)
    for title, rows in groups.items():
        on_gpu = document["settings"]["device"] != "cpu"
        shown = [_shown(row, on_gpu) for row in rows if "error" not in row]
        if shown:
            print_table(shown, columns, f"{title}, on {document['device']}", console)
        for row in rows:
            if "error" in row:
                _print_failure(f"{row['name']}, {row['variant']}", row, console)
    shown = [row for row in document["recording"] if "error" not in row]
    if shown:
        shown = [
            {
                "name": row["name"],
                "variant": row["variant"],
                "us": f"{1e6 * row['seconds']:.3g}",
                "spread": f"{1e6 * row['seconds_low']:.3g}–{1e6 * row['seconds_high']:.3g}",
                "ratio": f"{row['ratio']:.3g}",
            }
            for row in shown
        ]
        columns = {"name": "", "variant": "variant", "us": "µs", "spread": "range", "ratio": "× no backward"}
        print_table(shown, columns, "Host time of a call that records no gradients, small tensors", console)
    for row in document["recording"]:
        if "error" in row:
            _print_failure(f"{row['name']}, host time", row, console)


def _print_failure(what: str, row: dict[str, Any], console: Any) -> None:
    console.print(f"{what}: could not be measured: {row['error']}", style="yellow", markup=False)


def _shown(row: dict[str, Any], on_gpu: bool) -> dict[str, Any]:
    def times(key: str) -> str | None:
        return None if row[key] is None else f"{row[key]:.3g}"

    part = row["extra_memory_part_of_map"]
    return {
        "name": row["name"],
        "variant": row["variant"] if row["cuda_graph"] or not on_gpu else f"{row['variant']} (no graph)",
        "backend": row["backend"],
        "ms": f"{1e3 * row['seconds']:.4g}",
        "spread": f"{1e3 * row['seconds_low']:.4g}–{1e3 * row['seconds_high']:.4g}",
        "attention": times("ratio_to_attention"),
        "floor": times("ratio_to_floor"),
        "bound": row["floor_bound_by"],
        "plain": times("speedup_over_plain"),
        "copy": times("ratio_to_copy"),
        "memory": None if part is None else f"{100 * part:.2g} %",
    }
