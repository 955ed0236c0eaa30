"""The error that names the rows of a batch that rank NaN, so that the other pictures can be made without them."""

from __future__ import annotations


class RankedNaN(ValueError):
    """A block was to choose tokens by scores that are NaN. On a GPU it is raised with ``ATEDM_CHECK=1`` only.

    Attributes:
        block: module path in the UNet. step: denoising step, from 0; None where it is unknown.
        rows: those of the UNet's batch that rank NaN, from 0. batch: how many rows it has. With guidance, Stable
            Diffusion's pipelines hand the UNet all negative prompts and then all prompts: of ``n`` pictures in a batch
            it is number ``row % n``.
    """

    def __init__(self, block: str, step: int | None, rows: list[int], batch: int) -> None:
        super().__init__(block, step, rows, batch)  # what a copy or a pickle is made from
        self.block, self.step, self.rows, self.batch = block, step, rows, batch

    @property
    def place(self) -> str:
        """The step, in words."""
        return "an unknown step" if self.step is None else f"step {self.step}"

    def __str__(self) -> str:
        return (
            f"{self.block} ranks NaN in row {', '.join(map(str, self.rows))} of the batch, at {self.place}; "
            "expected numbers: look at the latent and the prompt of that picture, and at the dtype"
        )
