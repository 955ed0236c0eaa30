"""The README's picture."""

import numpy as np
import torch
from PIL import Image
from typer.testing import CliRunner

from atedm.unet.recording import Ranked, Recording
from atedm_bench import overview
from atedm_bench.cli import app
from tests.helpers.shallow import shallow_pipeline


def test_dropped_tokens_fade_and_kept_ones_stay():
    def ranked(call, index):
        index = torch.tensor(index)
        return Ranked(call, call, "block", 2, 2, 2, torch.rand(len(index), 4), index, None)

    # Both halves of guidance; the prompts' is the second, and the last step counts.
    recording = Recording([("block", 2, True)], [ranked(0, [[0], [1]]), ranked(1, [[2], [3]])], [0, 1])
    pictures = np.random.default_rng(0).random((1, 6, 10, 3))
    shown = overview.kept_only(pictures, recording, "block")
    same = (shown == pictures).all(axis=3)[0]
    assert same[3:, 5:].all() and same.sum() == 15


def test_it_draws_one(tmp_path, monkeypatch):
    monkeypatch.setattr(overview, "STEPS", 12)  # fewer are not pruned
    monkeypatch.setattr(overview, "embedded_pipeline", shallow_pipeline)
    result = CliRunner().invoke(app, ["overview", "--images", "2", "--output", str(tmp_path / "new" / "overview.png")])
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "new" / "overview.png") as image:
        assert image.size[1] > image.size[0] > 300
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 1000
