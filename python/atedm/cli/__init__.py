"""The command line ``atedm``: one module per command."""

import typer

from atedm.cli import demo, doctor, flops, generate
from atedm.cli.checks import use_any_terminal

app = typer.Typer(
    name="atedm",
    help="Make Stable Diffusion XL faster without training: feature reuse and token pruning (AT-EDM).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("generate")(generate.generate)
app.command("flops")(flops.flops)
app.command("doctor")(doctor.doctor)


def main() -> None:
    use_any_terminal()
    app()
