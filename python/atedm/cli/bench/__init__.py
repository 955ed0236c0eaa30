"""``atedm bench``: measurements on this machine, one module a command."""

import typer

from atedm.cli.bench import ops, unet

app = typer.Typer(help="Measure on this machine, every variant in one run.", no_args_is_help=True)
app.command("ops")(ops.ops)
app.command("unet")(unet.unet)
