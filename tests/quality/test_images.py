"""How the making of pictures is shared out, without a model."""

from types import SimpleNamespace

import pytest
from PIL import Image

from atedm import RankedNaN
from atedm.app.prompts import PromptCase, Sampling
from atedm_bench.quality.images import make_setting, picture_paths
from atedm_bench.quality.settings import Setting

FULL = Setting("full", "full")
CASES = [PromptCase(f"prompt {n}", n) for n in range(7)]
SAMPLING = Sampling(steps=2, guidance=5.0, width=8, height=8, batch=2)


class Recorder:
    """A pipeline that draws nothing and notes what it was asked for."""

    def __init__(self):
        self.prompts = []

    def set_progress_bar_config(self, **_):
        pass

    def __call__(self, prompt, **_):
        self.prompts.append(prompt)
        return SimpleNamespace(images=[Image.new("RGB", (8, 8)) for _ in prompt])


def made(root, counts, **options):
    pipe = Recorder()
    make_setting(pipe, FULL, CASES, root, SAMPLING, on_picture=counts.append, **options)
    return pipe.prompts


def test_processes_make_every_picture_once_in_the_batches_of_one(tmp_path):
    alone = made(tmp_path / "alone", [])
    counts = [[], []]
    shared = [made(tmp_path / "shared", counts[n], process=n, processes=2) for n in range(2)]
    assert shared == [alone[0::2], alone[1::2]]
    assert [sum(count) for count in counts] == [4, 3]
    assert all(path.is_file() for path in picture_paths(tmp_path / "shared", FULL, range(len(CASES))))


def test_a_lab_loses_no_picture_in_silence(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RankedNaN("mid_block.attentions.0", 1, [0], 2)

    monkeypatch.setattr(Recorder, "__call__", fail)
    with pytest.raises(RankedNaN, match="mid_block"):
        made(tmp_path, [])


def test_a_batch_with_a_missing_picture_is_made_again_and_no_other(tmp_path):
    made(tmp_path, [])
    picture_paths(tmp_path, FULL, range(len(CASES)))[3].unlink()
    counts = []
    assert made(tmp_path, counts) == [["prompt 2", "prompt 3"]]
    assert counts == [5, 2]
