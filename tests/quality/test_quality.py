"""``atedm-bench quality``, end to end: on the embedded model, and with it standing in for a real checkpoint."""

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

from atedm.app.flops import UNetFlops
from atedm.app.models import LATENT_SCALE, unet_config
from atedm.app.prompts import picture_path
from atedm.embedded import WEIGHTS
from atedm_bench.cli import app
from atedm_bench.quality import session
from atedm_bench.quality.checker_training import held_out_renders
from atedm_bench.quality.claims import CLAIMS
from atedm_bench.quality.lab import scene_cases
from atedm_bench.quality.settings import BUDGETS, Plan
from atedm_bench.scenes.split import held_out

SETTINGS = "ours c,tomesd c,random c,ranked every 2 steps"


def call(*arguments):
    result = CliRunner().invoke(app, ["quality", *map(str, arguments)], catch_exceptions=False, env={"TERM": "dumb"})
    return result.exit_code, result.output


@pytest.fixture(scope="module", autouse=True)
def two_rounds():
    """Of timing, where a real run makes five."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "ROUNDS", session.QUICK_ROUNDS)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    arguments = ("--images", 4, "--steps", 4, "--batch", 2, "--settings", SETTINGS, "--output", folder / "run")
    code, output = call(*arguments)
    assert code == 0, output
    return arguments, folder / "run", output


def test_rows_have_every_figure_with_its_interval(finished):
    _, folder, output = finished
    document = json.loads((folder / "quality.json").read_text())
    assert set(document) == {"command", "device", "versions", "date", "settings", "rows"}
    assert [row["name"] for row in document["rows"]] == ["full", *SETTINGS.split(",")]
    for row in document["rows"]:
        assert row["images"] == 4
        assert 0 < row["unet_seconds_low"] <= row["unet_seconds"] <= row["unet_seconds_high"]
        assert 0 <= row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] <= 1
        assert row["frechet_distance_low"] <= row["frechet_distance_high"]
        assert row["name"] in output
        if row["name"] == "full":
            assert row["flops_part"] == 1
            assert "psnr_db" not in row
        else:
            assert 0.4 < row["flops_part"] < 0.95
            for measure in ("psnr_db", "ssim", "perceptual_distance"):
                assert row[f"{measure}_low"] <= row[measure] <= row[f"{measure}_high"]
    ours, merged = (next(r for r in document["rows"] if r["name"] == name) for name in ("ours c", "tomesd c"))
    assert merged["flops_part"] == pytest.approx(ours["flops_part"], rel=0.02)


def test_pictures_differ_between_settings_but_not_between_runs(finished, tmp_path):
    arguments, folder, _ = finished
    pictures = {
        path.name: [np.asarray(Image.open(picture_path(path, n))) for n in range(4)]
        for path in folder.iterdir()
        if path.is_dir()
    }
    assert len(pictures) == 5
    names = list(pictures)
    for n, name in enumerate(names):
        for other in names[n + 1 :]:
            assert any(not np.array_equal(a, b) for a, b in zip(pictures[name], pictures[other], strict=True))
    again = tmp_path / "run"
    code, output = call(*arguments[:-1], again, "--no-convergence")
    assert code == 0, output
    for name, made in pictures.items():
        for n, picture in enumerate(made):
            assert np.array_equal(np.asarray(Image.open(picture_path(again / name, n))), picture), (name, n)


def test_an_interrupted_run_goes_on_and_ends_the_same(finished, tmp_path):
    arguments, folder, _ = finished
    again = tmp_path / "run"
    shutil.copytree(folder, again)
    before = {path: path.read_bytes() for path in again.rglob("*.png") if path.parent.name == "random-c"}
    lost = [path for n, path in enumerate(sorted(before)) if n >= 2]
    for path in lost:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in before if path not in lost}
    code, output = call(*arguments[:-1], again, "--no-convergence")
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
    assert len(list(folder.rglob("random-c/*.png"))) == 4


def test_skipped_cases_are_made_and_left_out_of_the_figures(finished, tmp_path):
    arguments, folder, _ = finished
    again = tmp_path / "run"
    shutil.copytree(folder, again)
    times = json.loads((again / "unet-seconds.json").read_text())
    code, output = call(*arguments[:-1], again, "--images", 2, "--skip", 2, "--no-convergence")
    assert code == 0, output
    document = json.loads((again / "quality.json").read_text())
    assert (document["settings"]["images"], document["settings"]["skipped"]) == (2, 2)
    rows, before = (json.loads((f / "quality.json").read_text())["rows"] for f in (again, folder))
    assert [row["images"] for row in rows] == [2] * len(rows)
    assert [row["frechet_distance"] for row in rows] != [row["frechet_distance"] for row in before]
    # Times are of the same setting, device and size, so they are not taken again.
    assert json.loads((again / "unet-seconds.json").read_text()) == times
    assert [row["unet_seconds"] for row in rows] == [row["unet_seconds"] for row in before]


def test_convergence_rows(finished):
    _, folder, _ = finished
    rows = json.loads((folder / "quality-convergence.json").read_text())["rows"]
    blocks = [row for row in rows if row["step"] is None]
    assert len(blocks) == 11  # as SDXL: two down and three up at two levels, and the middle
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
    for name in ("trade-off.png", "convergence.png", "sheet-budgets.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 200
        assert name in "".join(output.split())


def test_settings_cover_the_budgets_and_ablations_at_their_flops():
    # The embedded model's UNet with half of its blocks.
    config = {**unet_config(str(WEIGHTS)), "layers_per_block": 1}
    size = config["sample_size"]
    flops = UNetFlops(config, width=size * LATENT_SCALE, height=size * LATENT_SCALE, tokens=24)
    found = {setting.name: setting for setting in Plan(flops, 25, (size // 2) ** 2).settings()}
    full = flops.full().unet
    for budget, part in BUDGETS.items():
        ours = found[f"ours {budget}"]
        assert flops.pruned(ours.ratio).unet / full == pytest.approx(part, rel=0.01)
        assert found[f"tomesd {budget}"].flops == pytest.approx(ours.flops, rel=0.02)
        assert found[f"random {budget}"].flops == ours.flops
        assert found[f"keys {budget}"].flops == ours.flops
    for name in ("DSAP off, same FLOPs", "level 2 whole, same FLOPs", "by keys, DSAP off, same FLOPs"):
        assert found[name].note or found[name].flops == pytest.approx(found["ours c"].flops, rel=0.01)
    for name, setting in found.items():
        if name.startswith("level 2 whole, r"):
            assert setting.ratio == found["level 2 whole, same FLOPs"].ratio
        if name.startswith("random, "):
            assert setting.ratio == found["ours c"].ratio
    # PageRank's iterations; one pass by keys; the source map alone.
    scoring = [found[name].scoring_flops for name in ("ours c", "keys c", "random c")]
    assert scoring[0] > 2 * scoring[1] > 4 * scoring[2] > 0
    base = found["level 2 whole, same FLOPs"].scoring_flops
    saved = [base - found[f"ranked every {n} steps"].scoring_flops for n in (2, 3, 5)]
    assert 0 < saved[0] < saved[1] < saved[2] < base
    assert found["level 2 ranked on 2×2-pooled maps"].scoring_flops < found["recovery: keys"].scoring_flops / 2
    assert found["DSAP off, same ratio"].flops < found["ours c"].flops < found["level 2 whole, same ratio"].flops
    assert found["placement: paper"].flops > found["ours c"].flops
    assert {name for claim in CLAIMS for pair in claim.pairs for name in pair} <= set(found)


def test_cases_are_held_out_and_longer_runs_begin_alike():
    cases = scene_cases(20)
    assert all(held_out(case.scene) for case in cases)
    assert scene_cases(10) == cases[:10]
    assert len({case.seed for case in cases}) == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--settings", "ours z"), "ours z"),
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
    """What a user of a real checkpoint has: prompts, reference pictures and a CLIP model, all small."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "prompts.txt").write_text("a red circle\n\na blue star on a white background\na green ring\n")
    (folder / "references").mkdir()
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
        *("--model", WEIGHTS, "--prompts", checkpoint / "prompts.txt", "--references", checkpoint / "references"),
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


def test_several_processes_share_the_work_and_change_nothing(checkpoint, checkpoint_rows, tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "atedm_bench", "quality"]
    # accelerate chooses gloo where it is told to use the CPU.
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    arguments = map(str, checkpoint_run(checkpoint, tmp_path / "run"))
    done = subprocess.run(
        [sys.executable, *command, *arguments, "--device", "cpu"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "run" / "quality.json").read_text())
    for path in (checkpoint / "run").rglob("*.png"):
        if path.parent != checkpoint / "run":
            assert (tmp_path / "run" / path.parent.name / path.name).read_bytes() == path.read_bytes(), path
    for row, expected in zip(document["rows"], checkpoint_rows["rows"], strict=True):
        for figure in {"fid", "clip_score", "psnr_db", "ssim"} & expected.keys():
            assert row[figure] == pytest.approx(expected[figure], rel=1e-3), figure
