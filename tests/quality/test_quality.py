"""``atedm-bench quality``, end to end: on the embedded model, with fewer layers here, and with it as a checkpoint."""

import copy
import functools
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from atedm import embedded
from atedm.app.prompts import picture_path
from atedm.embedded import WEIGHTS, embedded_pipeline
from atedm_bench.cli import app
from atedm_bench.quality import lab, session
from atedm_bench.quality.checker_training import held_out_renders
from atedm_bench.quality.lab import CAPTIONS, CHOSEN, scene_cases
from atedm_bench.quality.samplers import SCHEDULERS, set_scheduler, timesteps_of
from atedm_bench.scenes.split import held_out
from tests.helpers.shallow import save_shallow, shallow_pipeline

IMAGES, STEPS, BATCH = 3, 4, 2
LAYERS = (1, 2, 3)
SETTINGS = "DeepCache 2,ours c,tomesd c,random c"
MINE = json.dumps({"schedule": {"name": "Adaptive", "tolerance": 3.0}})


def call(*arguments):
    result = CliRunner().invoke(app, ["quality", *map(str, arguments)], catch_exceptions=False, env={"TERM": "dumb"})
    return result.exit_code, result.output


def small_pipeline():
    """Half as deep as the embedded model; two of the paper's budgets are still within reach."""
    return shallow_pipeline(layers=LAYERS)


@pytest.fixture(scope="module", autouse=True)
def a_small_run():
    """The small model, one round of timing where a real run makes five, few scenes, which all runs share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "embedded_pipeline", small_pipeline)
        patch.setattr(session, "ROUNDS", 1)
        patch.setattr(lab, "REFERENCES", (16, 16))
        for module, name in ((session, "scene_cases"), (lab, "held_out_renders")):
            patch.setattr(module, name, functools.cache(getattr(module, name)))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    arguments = ("--images", IMAGES, "--steps", STEPS, "--batch", BATCH, "--settings", SETTINGS)
    arguments += ("--try", f"mine={MINE}", "--output", folder / "run")
    code, output = call(*arguments)
    assert code == 0, output
    return arguments, folder / "run", output


def test_rows_have_every_figure_with_its_interval(finished):
    _, folder, output = finished
    document = json.loads((folder / "quality.json").read_text())
    assert set(document) == {"command", "device", "versions", "date", "settings", "rows"}
    assert [row["name"] for row in document["rows"]] == ["full", *SETTINGS.split(","), "mine"]
    for row in document["rows"]:
        assert row["images"] == IMAGES
        assert 0 < row["unet_seconds_low"] <= row["unet_seconds"] <= row["unet_seconds_high"]
        assert 0 <= row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] <= 1
        assert row["frechet_distance_low"] <= row["frechet_distance_high"]
        assert row["name"] in output
        if row["name"] == "full":
            assert row["flops_part"] == 1
            assert not {"psnr_db", "accuracy_change"} & row.keys()
        else:
            assert 0.4 < row["flops_part"] < 0.95
            change = 100 * (row["accuracy"] - document["rows"][0]["accuracy"])
            assert row["accuracy_change"] == pytest.approx(change)
            assert row["accuracy_change_low"] <= row["accuracy_change"] <= row["accuracy_change_high"]
            for measure in ("psnr_db", "ssim", "perceptual_distance"):
                assert row[f"{measure}_low"] <= row[measure] <= row[f"{measure}_high"]
    rows = {row["name"]: row for row in document["rows"]}
    assert rows["tomesd c"]["flops_part"] == pytest.approx(rows["ours c"]["flops_part"], rel=0.02)
    assert {name: row["kinds"] for name, row in rows.items() if name != "mine"} == {
        "full": "wwww",
        "DeepCache 2": "wrwr",
        "ours c": "llpp",
        "tomesd c": "mmmm",
        "random c": "llpp",
    }
    # It reuses the same part of the network as DeepCache does.
    kinds = rows["mine"]["kinds"]
    assert kinds[:2] == "ww" and "r" in kinds
    reused = 2 * rows["DeepCache 2"]["flops_part"] - 1
    expected = (kinds.count("w") + kinds.count("r") * reused) / STEPS
    assert rows["mine"]["flops_part"] == pytest.approx(expected, rel=0.02)
    assert document["settings"]["scheduler"] == "euler"
    assert document["settings"]["captions"] == "held-out"


def test_flops_are_the_mean_over_pictures_that_ran_differently(finished, tmp_path):
    """And a run that goes on knows what the earlier one ran."""
    arguments, folder, _ = finished
    again = tmp_path / "run"
    shutil.copytree(folder, again)
    (again / "mine" / "00002.kinds.json").write_text(json.dumps(["whole"] * STEPS))
    code, output = call(*arguments[:-1], again, "--settings", "full", "--no-timing", "--no-convergence")
    assert code == 0, output
    rows, before = (
        {row["name"]: row for row in json.loads((f / "quality.json").read_text())["rows"]} for f in (again, folder)
    )
    assert list(rows) == ["full", "mine"]
    assert rows["mine"]["flops_part"] == pytest.approx((2 * before["mine"]["flops_part"] + 1) / 3)
    assert rows["mine"]["kinds"] == before["mine"]["kinds"]
    assert "unet_seconds" not in rows["mine"]


def test_pictures_differ_between_settings_but_not_between_runs(finished, tmp_path):
    arguments, folder, _ = finished
    pictures = {
        path.name: [np.asarray(Image.open(picture_path(path, n))) for n in range(BATCH)]
        for path in folder.iterdir()
        if path.is_dir()
    }
    assert len(pictures) == 6
    names = list(pictures)
    for n, name in enumerate(names):
        for other in names[n + 1 :]:
            assert any(not np.array_equal(a, b) for a, b in zip(pictures[name], pictures[other], strict=True))
    again = tmp_path / "run"
    # The first batch; the test below makes a second one again.
    code, output = call(*arguments[:-1], again, "--images", BATCH, "--no-timing", "--no-convergence")
    assert code == 0, output
    for name, made in pictures.items():
        for n, picture in enumerate(made):
            assert np.array_equal(np.asarray(Image.open(picture_path(again / name, n))), picture), (name, n)


def test_an_interrupted_run_goes_on_and_ends_the_same(finished, tmp_path):
    arguments, folder, _ = finished
    again = tmp_path / "run"
    shutil.copytree(folder, again)
    names = "random-c", "tomesd-c"  # both draw, and the second batch must draw as if it had followed the first
    before = {path: path.read_bytes() for path in again.rglob("*.png") if path.parent.name in names}
    lost = [path for path in before if path.name == "00002.png"]
    assert len(before) == 2 * IMAGES and len(lost) == 2
    for path in lost:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in before if path not in lost}
    code, output = call(*arguments[:-1], again, "--settings", "random c,tomesd c", "--no-convergence")
    assert code == 0, output
    assert {path: path.read_bytes() for path in before} == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_pictures_of_another_run_are_refused(finished):
    arguments, folder, _ = finished
    code, output = call(*arguments, "--guidance", 2.0)
    assert code == 2
    assert "sampling" in output
    code, output = call(*arguments, "--seed", 7)
    assert code == 2
    assert "cases" in output
    assert len(list(folder.rglob("random-c/*.png"))) == IMAGES


def test_chosen_captions_come_before_the_held_out_ones(tmp_path):
    assert list(CAPTIONS.values()) == sorted(CAPTIONS.values()) and CAPTIONS["fresh"] >= CHOSEN + 2 * 256
    assert scene_cases(3, skip=CHOSEN) == scene_cases(CHOSEN + 3)[CHOSEN:]
    code, output = call("--captions", "chosen", "--images", CHOSEN + 1, "--output", tmp_path / "run")
    assert code == 2
    assert f"at most {CHOSEN} of the chosen captions" in output
    device = torch.device("cpu")
    chosen, held_out = (session.resolved(session.LabRequest(captions=each), device) for each in ("chosen", None))
    assert (chosen.images, held_out.images) == (CHOSEN, 256)
    assert chosen.out != held_out.out


def test_another_sampler_makes_other_pictures_elsewhere(finished):
    arguments = finished[0]
    code, output = call(*arguments, "--scheduler", "dpm++")
    assert code == 2 and "scheduler" in output
    steps, pipe = {}, embedded_pipeline()
    own = pipe.scheduler
    for name in SCHEDULERS:
        pipe.scheduler = copy.deepcopy(own)
        set_scheduler(pipe, name)
        assert dict(pipe.scheduler.config)["prediction_type"] == own.config["prediction_type"]
        steps[name] = timesteps_of(pipe, 25).tolist()
    assert steps["euler"] == steps["dpm++"] and len(set(steps["dpm++"])) == 25
    assert len(set(steps["dpm++-karras"])) < 25
    requests = [session.LabRequest(scheduler=name) for name in SCHEDULERS]
    assert len({session.resolved(request, torch.device("cpu")).out for request in requests}) == 3


def test_convergence_rows(finished):
    _, folder, _ = finished
    rows = json.loads((folder / "quality-convergence.json").read_text())["rows"]
    blocks = [row for row in rows if row["step"] is None and row["run"] == "published, every step"]
    assert len(blocks) == 11  # as SDXL: two down and three up at two levels, and the middle
    for row in rows:
        warm = [row[f"jaccard_warm_{n}"] for n in (1, 2, 3, 5)]
        assert warm == [None] * 4 if row["step"] == 0 else all(x is None or 0 < x <= 1 for x in warm)
    assert {row["step"] for row in rows if row["step"] is not None} == {0, 1, 2, 3}
    for row in rows:
        assert 1 <= row["iterations_to_0.1"] <= row["iterations_to_0.01"] <= row["iterations_to_0.001"] <= 60
        assert 0 <= row["jaccard_1_min"] <= row["jaccard_1"] <= 1
        assert row["jaccard_15"] >= 0.9
        # Hardly any head settles to 1e-4 before 5 iterations, and those that do no longer change.
        assert row["stopped_0.0001_of_5_jaccard"] == pytest.approx(row["jaccard_5"], abs=0.02)
        assert row["stopped_0.0001_of_3_iterations"] <= 3
        assert 1 <= row["stopped_0.1_of_10_iterations"] <= row["stopped_0.001_of_10_iterations"] <= 10
        assert row["stopped_0.1_of_10_iterations"] == pytest.approx(row["iterations_to_0.1"], abs=0.5)


def test_plots_and_sheets_are_written(finished):
    _, folder, output = finished
    for name in ("trade-off.png", "convergence.png", "sheet-presets.png", "sheet-plane.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 200
        assert name in "".join(output.split())


def test_cases_are_held_out_and_longer_runs_begin_alike():
    cases = scene_cases(20)
    assert all(held_out(case.scene) for case in cases)
    assert scene_cases(10) == cases[:10]
    assert len({case.seed for case in cases}) == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--settings", "ours z"), "ours z"),
        (("--settings", ","), "settings names none"),
        (("--settings", ""), "settings names none"),
        (("--scheduler", "ddim"), "scheduler"),
        (("--captions", "all"), "captions"),
        (("--captions", "chosen", "--model", str(WEIGHTS)), "captions"),
        (("--try", "mine"), "NAME=JSON"),
        (("--try", "mine={"), "try"),
        (("--try", 'mine={"colour": 1}'), "colour"),
        (("--try", "ours c={}"), "ours c"),
        (("--prompts", "x.txt"), "--model"),
        (("--model", str(WEIGHTS)), "prompts"),
        (("--dtype", "int8"), "dtype"),
    ],
)
def test_bad_options_are_named(arguments, message, tmp_path):
    code, output = call(*arguments, "--output", tmp_path / "run", "--images", 2)
    assert code == 2
    assert message in output


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """What a user of a real checkpoint has: it, prompts, reference pictures and a CLIP model, all small."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "prompts.txt").write_text("a red circle\n\na blue star on a white background\na green ring\n")
    (folder / "references").mkdir()
    save_shallow(folder / "model", layers=LAYERS)
    for n, picture in enumerate(held_out_renders(5, 64)[1]):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / "references" / f"{n}.png")
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 32,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = small | {"image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder / "clip")
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(processor, tokenizer).save_pretrained(folder / "clip")
    return folder


def checkpoint_run(checkpoint, out):
    return [
        *(
            "--model",
            checkpoint / "model",
            "--prompts",
            checkpoint / "prompts.txt",
            "--references",
            checkpoint / "references",
        ),
        *("--clip-model", checkpoint / "clip", "--fid-features", "checker", "--size", "128", "--steps", 2),
        *("--dtype", "fp32", "--settings", "ours c,random c", "--output", out),
    ]


@pytest.fixture(scope="module")
def checkpoint_rows(checkpoint):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes have that its pictures are compared with, bit for bit
    code, output = call(*checkpoint_run(checkpoint, checkpoint / "run"))
    torch.set_num_threads(threads)
    assert code == 0, output
    return json.loads((checkpoint / "run" / "quality.json").read_text())


def test_a_checkpoint_gets_fid_and_clip_score(checkpoint, checkpoint_rows):
    assert checkpoint_rows["settings"]["guidance"] == 7.0
    assert [row["name"] for row in checkpoint_rows["rows"]] == ["full", "ours c", "random c"]
    for row in checkpoint_rows["rows"]:
        assert row["images"] == 3
        assert row["fid"] > 0
        assert row["clip_score_low"] <= row["clip_score"] <= row["clip_score_high"]
        assert "accuracy" not in row
    assert checkpoint_rows["rows"][1]["psnr_db"] > 0
    assert len(list((checkpoint / "run" / "ours-c").glob("*.png"))) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--prompts", "{folder}/one.txt"), "holds one prompt; expected at least 2"),
        (("--references", "{folder}/none"), "holds 0 pictures; expected at least 2"),
        (("--clip-model", "{folder}/absent"), "clip-model: "),
        (("--fid-features", "inception"), "pip install torch-fidelity"),
    ],
)
def test_what_figures_need_is_checked_before_pictures_are_drawn(checkpoint, tmp_path, monkeypatch, change, message):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    (tmp_path / "none").mkdir()
    (tmp_path / "one.txt").write_text("a star\n")
    code, output = call(
        *checkpoint_run(checkpoint, tmp_path / "run"), *(each.format(folder=tmp_path) for each in change)
    )
    assert code == 2 and message in output, output
    assert not list((tmp_path / "run").rglob("*"))


def test_pictures_are_compared_with_those_of_another_run(finished, tmp_path):
    arguments, folder, _ = finished
    arguments = [*arguments[:-1], tmp_path / "run"]
    arguments[arguments.index("--settings") + 1] = "ours c"
    shutil.copytree(folder, tmp_path / "run")
    other = tmp_path / "run" / "ours-c" / "00001.png"
    pixels = np.asarray(Image.open(other)).copy()
    pixels[0, 0, 0] ^= 64
    Image.fromarray(pixels).save(other)
    code, output = call(*arguments, "--no-timing", "--no-convergence", "--against", folder)
    assert code == 0, output
    rows = {row["name"]: row for row in json.loads((tmp_path / "run" / "quality.json").read_text())["rows"]}
    assert (rows["full"]["against_same"], rows["full"]["against_psnr_db"]) == (IMAGES, 99)
    assert rows["ours c"]["against_same"] == IMAGES - 1 and rows["mine"]["against_same"] == IMAGES
    expected = 10 * np.log10(255**2 * pixels.size / 64**2)
    assert rows["ours c"]["against_psnr_db"] == pytest.approx((99 * (IMAGES - 1) + expected) / IMAGES)
    assert "PSNR, other run" in output
    (tmp_path / "empty").mkdir()
    for elsewhere, message in ((tmp_path / "empty", "is not the folder of a run"), (folder, "other prompts or seeds")):
        code, output = call(*arguments[:-1], tmp_path / "third", "--seed", 1, "--against", elsewhere)
        assert code == 2 and message in output, output


# As a launcher starts them, by their environment, but forked from one process that has imported everything.
TWO_PROCESSES = """
import multiprocessing, os, runpy, socket, sys
import atedm_bench.quality.session, torch, torchmetrics
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPModel, CLIPProcessor

def work(rank):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    sys.argv = ["atedm-bench", "quality", *sys.argv[1:]]
    runpy.run_module("atedm_bench", run_name="__main__")

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
started = [multiprocessing.get_context("fork").Process(target=work, args=(rank,)) for rank in range(2)]
for process in started:
    process.start()
for process in started:
    process.join()
sys.exit(any(process.exitcode for process in started))
"""


def test_several_processes_share_the_work_and_change_nothing(checkpoint, checkpoint_rows, tmp_path):
    arguments = map(str, checkpoint_run(checkpoint, tmp_path / "run"))
    # accelerate chooses gloo where it is told to use the CPU.
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TWO_PROCESSES, *arguments, "--device", "cpu"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Written:") == 1  # by the main one
    document = json.loads((tmp_path / "run" / "quality.json").read_text())
    for path in (checkpoint / "run").rglob("*.png"):
        if path.parent != checkpoint / "run":
            assert (tmp_path / "run" / path.parent.name / path.name).read_bytes() == path.read_bytes(), path
    for row, expected in zip(document["rows"], checkpoint_rows["rows"], strict=True):
        for figure in {"fid", "clip_score", "psnr_db", "ssim"} & expected.keys():
            assert row[figure] == pytest.approx(expected[figure], rel=1e-3), figure
