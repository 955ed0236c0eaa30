"""How the making of pictures is shared out, without a model; and what is known of their steps, with one."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

import atedm
from atedm import RankedNaN
from atedm.app import prompts
from atedm.app.prompts import PromptCase, Sampling
from atedm.app.run_record import OtherRun
from atedm.embedded import embedded_pipeline
from atedm_bench.methods import Ours
from atedm_bench.quality.images import make_setting, picture_paths, read_kinds
from atedm_bench.quality.settings import FULL, Setting

CASES = [PromptCase(f"prompt {n}", n) for n in range(7)]
SAMPLING = Sampling(steps=2, guidance=5.0, width=8, height=8, batch=2)


class Recorder:
    """A pipeline that draws nothing and notes what it was asked for."""

    image_processor = VaeImageProcessor()

    def __init__(self):
        self.prompts = []

    def set_progress_bar_config(self, **_):
        pass

    def __call__(self, prompt, **_):
        self.prompts.append(prompt)
        return SimpleNamespace(images=torch.zeros(len(prompt), 3, 8, 8))


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
    assert all(path.is_file() for path in picture_paths(tmp_path / "shared", FULL, len(CASES)))


def test_a_lab_loses_no_picture_in_silence(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RankedNaN("mid_block.attentions.0", 1, [0], 2)

    monkeypatch.setattr(Recorder, "__call__", fail)
    with pytest.raises(RankedNaN, match="mid_block"):
        made(tmp_path, [])


def test_a_batch_with_a_missing_picture_is_made_again_and_no_other(tmp_path):
    made(tmp_path, [])
    picture_paths(tmp_path, FULL, len(CASES))[3].unlink()
    counts = []
    assert made(tmp_path, counts) == [["prompt 2", "prompt 3"]]
    assert counts == [5, 2]


def test_no_picture_lacks_its_kinds_where_a_run_was_interrupted(tmp_path, monkeypatch):
    setting = Setting("mine", "tried", Ours(atedm.Options(schedule=["whole", "reused"])))

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prompts, "save_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_setting(embedded_pipeline(), setting, CASES[:1], tmp_path, Sampling(2, 5.0, 64, 64, 2))
    assert not list(tmp_path.rglob("*.png"))
    assert read_kinds(tmp_path, setting, 1, 2) == [("whole", "reused")]


def test_kinds_are_those_of_a_pictures_batch(tmp_path):
    (tmp_path / "full").mkdir()
    for start, kinds in ((0, ["whole"]), (2, ["reused"])):
        (tmp_path / "full" / f"{start:05d}.kinds.json").write_text(json.dumps(kinds))
    assert read_kinds(tmp_path, FULL, 3, 2) == [("whole",), ("whole",), ("reused",)]
    for text in ("[", "5", "[]", '["os.system"]', '"whole"', "[" * 100_000):
        (tmp_path / "full" / "00002.kinds.json").write_text(text)
        with pytest.raises(OtherRun, match=r"00002\.kinds\.json is damaged"):
            read_kinds(tmp_path, FULL, 3, 2)
