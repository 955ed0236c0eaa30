"""``atedm-bench train``: train the embedded model, stage by stage."""

from __future__ import annotations

import enum
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atedm.cli.checks import bad, check_file, check_folder, failing_clearly, naming_path
from atedm.files import is_stream
from atedm_extras import require

if TYPE_CHECKING:
    from atedm_bench.training.config import Config

app = typer.Typer(no_args_is_help=True, help="Train the embedded model, stage by stage.")

_RECIPE = Path(__file__).parents[1] / "training" / "config.yaml"
Recipe = Annotated[Path, typer.Option(help="The recipe.", exists=True, dir_okay=False)]
Out = Annotated[Path, typer.Option(help="Folder for checkpoints, logs and weights; resumes an earlier run there.")]


class StageName(str, enum.Enum):
    vae = "vae"
    text = "text"
    unet = "unet"


PRECISIONS = ("bf16", "fp16", "no")

_PACKAGES = ("accelerate", "transformers", "pillow", "pyyaml")


@app.command()
def run(
    out: Out,
    stages: Annotated[list[StageName] | None, typer.Argument(help="Default: all, in order.")] = None,
    config: Recipe = _RECIPE,
    precision: Annotated[str, typer.Option(help="accelerate's mixed precision: bf16, fp16 or no.")] = "bf16",
    workers: Annotated[int, typer.Option(min=0, max=1024, help="Processes that draw scenes; useful with GPUs.")] = 0,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the UNet; takes minutes per size.")] = False,
    threads: Annotated[int, typer.Option(min=0, max=1024, help="CPU threads per process; 0: torch's default.")] = 0,
) -> None:
    """Train. Start it with `accelerate launch --no_python atedm-bench train run …` to use several processes or GPUs."""
    require("quality", *_PACKAGES)
    import torch
    from accelerate import Accelerator

    from atedm_bench.training.text import train_text
    from atedm_bench.training.unet import train_unet
    from atedm_bench.training.vae import train_vae

    if precision not in PRECISIONS:
        raise bad("precision", f"{precision!r}; expected one of {', '.join(PRECISIONS)}")
    if precision == "fp16" and not torch.cuda.is_available():
        raise bad("precision", "fp16 needs a GPU; expected bf16 or no")
    check_folder("out", out)
    if threads:
        torch.set_num_threads(threads)
    settings = _recipe(config)
    work = {
        StageName.vae: train_vae,
        StageName.text: train_text,
        StageName.unet: functools.partial(train_unet, compiled=compiled),
    }
    with failing_clearly():
        for stage in stages or list(StageName):
            accelerator = Accelerator(mixed_precision=precision)
            torch.manual_seed(settings.seed)
            work[stage](settings, out, accelerator, workers)
            accelerator.free_memory()
        accelerator.end_training()


def _recipe(path: Path) -> Config:
    """Read the recipe in a file. Usage error if the file holds none."""
    import yaml

    from atedm_bench.training import config

    try:
        return config.load(path)
    except (yaml.YAMLError, ValueError, TypeError, KeyError, RecursionError) as error:
        first = str(error).partition("\n")[0]
        raise bad("config", f"{path} holds no recipe: {first}") from None


@app.command()
def export(
    out: Out,
    to: Annotated[Path, typer.Option(help="Folder to write; replaced if it exists.")],
    config: Recipe = _RECIPE,
) -> None:
    """Write the pipeline from the newest checkpoint, in half precision. Training may run at the same time."""
    require("quality", *_PACKAGES)
    from atedm_bench.training.export import export as export_pipeline

    _check_target(to, out)
    with failing_clearly():
        counter = export_pipeline(_recipe(config), out, to)
    typer.echo(f"{to}: {counter.step} steps, {counter.images} images, {counter.seconds / 60:.0f} min")


def _check_target(to: Path, out: Path) -> None:
    """Usage error for a folder that must not be replaced: one with the training in it, or anything but a model."""
    with naming_path("to", to):
        target, source = to.resolve(), out.resolve()
        if target.is_relative_to(source) or source.is_relative_to(target):
            raise bad("to", f"{to} and the training in {out} contain one another; expected another folder")
        is_model = (target / "model_index.json").is_file()
        if target.exists() and not is_model and not (target.is_dir() and not any(target.iterdir())):
            raise bad("to", f"{to} exists and is not a model; expected an earlier export, an empty folder or none")
    check_folder("to", target.parent)


@app.command()
def record(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of `run`, each started from the weights of the previous one.")
    ],
    to: Annotated[Path, typer.Option(help="JSON file to write.")],
) -> None:
    """Write each stage's progress, wall time and loss curve."""
    require("quality", *_PACKAGES)
    from atedm.app.report import write_json
    from atedm_bench.training.record import record as record_runs

    check_file("to", to, *runs)
    with failing_clearly():
        document = record_runs(runs)
        write_json(document, to)
    for stage in document["stages"]:
        typer.echo("{stage}, run {run}: {steps} steps, {images} images, {minutes} min".format(**stage))


@app.command()
def checker(
    out: Annotated[Path, typer.Option(help="File for the weights. The figures go beside it, as .json.")],
    steps: Annotated[int, typer.Option(min=1)] = 1500,
    batch: Annotated[int, typer.Option(min=1)] = 48,
    test: Annotated[int, typer.Option(min=1, help="Held-out renders.")] = 2000,
) -> None:
    """Train the checker of the quality lab on renders, and measure it on held-out ones."""
    require("quality", *_PACKAGES)
    from atedm_bench.quality.checker_training import train_and_report

    if is_stream(out):
        raise bad("out", f"{out} is no regular file; expected a name such as checker.safetensors")
    check_file("out", out)
    figures = out.with_suffix(".json")
    if figures.resolve() == out.resolve():
        raise bad("out", f"{out} is the file for the figures; expected a name such as checker.safetensors")
    check_file("out", figures)
    with failing_clearly():
        train_and_report(steps, batch, test, out)
