"""``python -m atedm.bench.training``: train the embedded model, stage by stage."""

from __future__ import annotations

import enum
import functools
from pathlib import Path
from typing import Annotated

import torch
import typer
from accelerate import Accelerator

from atedm.bench.training import config as recipe

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

Recipe = Annotated[Path, typer.Option(help="The recipe.", exists=True, dir_okay=False)]
Out = Annotated[Path, typer.Option(help="Folder of checkpoints, logs and weights; an earlier run there is resumed.")]


class StageName(str, enum.Enum):
    vae = "vae"
    text = "text"
    unet = "unet"


@app.command()
def run(
    out: Out,
    stages: Annotated[list[StageName] | None, typer.Argument(help="Default: all, in their order.")] = None,
    config: Recipe = recipe.DEFAULT,
    precision: Annotated[str, typer.Option(help="accelerate's mixed precision: bf16, fp16 or no.")] = "bf16",
    workers: Annotated[int, typer.Option(min=0, help="Processes that draw scenes; for GPUs.")] = 0,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the UNet: minutes a size, then faster.")] = False,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads a process; 0: torch's own choice.")] = 0,
) -> None:
    """Train. Start it with `accelerate launch` to use several processes or GPUs."""
    from atedm.bench.training.text import train_text
    from atedm.bench.training.unet import train_unet
    from atedm.bench.training.vae import train_vae

    if threads:
        torch.set_num_threads(threads)
    settings = recipe.load(config)
    work = {
        StageName.vae: train_vae,
        StageName.text: train_text,
        StageName.unet: functools.partial(train_unet, compiled=compiled),
    }
    for stage in stages or list(StageName):
        accelerator = Accelerator(mixed_precision=precision)
        torch.manual_seed(settings.seed)
        work[stage](settings, out, accelerator, workers)
        accelerator.free_memory()
    accelerator.end_training()


@app.command(name="export")
def export_command(
    out: Out,
    to: Annotated[Path, typer.Option(help="Folder to write; replaced where it exists.")],
    config: Recipe = recipe.DEFAULT,
) -> None:
    """Write the pipeline from the newest checkpoint, in half precision; a training may go on meanwhile."""
    from atedm.bench.training.export import export

    counter = export(recipe.load(config), out, to)
    print(f"{to}: {counter.step} steps, {counter.images} images, {counter.seconds / 60:.0f} min")


@app.command(name="record")
def record_command(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of `run`, each begun with the weights of the one before.")
    ],
    to: Annotated[Path, typer.Option(help="JSON file to write.")],
) -> None:
    """Write how far each stage came, its wall time and its loss curve."""
    from atedm.bench.training.record import record
    from atedm.report import write_json

    document = record(runs)
    write_json(document, to)
    for stage in document["stages"]:
        print("{stage}, run {run}: {steps} steps, {images} images, {minutes} min".format(**stage))


if __name__ == "__main__":
    app()
