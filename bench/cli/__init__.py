"""The command line ``atedm-bench``: one module per command."""

import typer

from atedm.cli.checks import use_any_terminal
from atedm_bench.cli import ops, overview, quality, train, tune, unet

app = typer.Typer(
    name="atedm-bench",
    help="Measure atedm on this machine, and train its embedded model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("ops")(ops.ops)
app.command("unet")(unet.unet)
app.command("quality")(quality.quality)
app.add_typer(train.app, name="train")
app.command("overview")(overview.overview)
app.command("tune")(tune.tune)


def main() -> None:
    use_any_terminal()
    app()
