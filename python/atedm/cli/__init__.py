"""The command line ``atedm``: one module a command."""

import typer

from atedm.cli import bench, demo, doctor, flops, generate, quality

app = typer.Typer(
    name="atedm",
    help="Faster Stable Diffusion XL by not computing what does not matter (AT-EDM token pruning).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("generate")(generate.generate)
app.command("flops")(flops.flops)
app.add_typer(bench.app, name="bench")
app.command("quality")(quality.quality)
app.command("doctor")(doctor.doctor)


def main() -> None:
    app()
