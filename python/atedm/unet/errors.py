"""The error that names the rows of a batch whose scores are NaN, so that the other pictures can still be made."""

from __future__ import annotations


class RankedNaN(ValueError):
    """The scores by which a block chooses tokens are NaN. On a GPU this is raised only with ``ATEDM_CHECK=1``.

    Attributes:
        block: module path in the UNet. step: denoising step, from 0; None if unknown.
        rows: the rows of the UNet's batch whose scores are NaN, from 0. batch: number of rows. With guidance, Stable
            Diffusion's pipelines hand the UNet all negative prompts and then all prompts, so with ``n`` pictures in a
            batch, row ``row`` belongs to picture ``row % n``.
    """

    def __init__(self, block: str, step: int | None, rows: list[int], batch: int) -> None:
        super().__init__(block, step, rows, batch)  # copy and pickle read these
        self.block, self.step, self.rows, self.batch = block, step, rows, batch

    def set_step(self, step: int | None) -> None:
        """Set the step, which may become known only after the error was raised."""
        self.step = step
        self.args = (self.block, step, self.rows, self.batch)

    @property
    def place(self) -> str:
        """The step, in words."""
        return "an unknown step" if self.step is None else f"step {self.step}"

    def __str__(self) -> str:
        return (
            f"{self.block} ranks NaN in row {', '.join(map(str, self.rows))} of the batch, at {self.place}; "
            "expected numbers: look at the latent and the prompt of that picture, and at the dtype"
        )
