"""``atedm demo`` and ``atedm generate``, end to end on the embedded model, small: with fewer layers, for 64 pixels."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import atedm
import atedm_kernels as kernels
from atedm import embedded
from atedm.app import comparison, flops, images, models, pictures
from atedm.cli import app
from atedm.policy.options import PUBLISHED
from tests.helpers.counting import shared_counters
from tests.helpers.shallow import shallow_pipeline

STEPS = 12  # fewer are not pruned
PICTURES = ("full.png", "pruned.png", "tokens.png")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "embedded_pipeline", lambda: shallow_pipeline(side=64))
        patch.setattr(flops, "UNetFlops", shared_counters())
        yield


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    result = run("demo", "--steps", STEPS, "--images", 1, "--prompt", "a red circle", "--output", folder)
    assert result.exit_code == 0, result.output
    assert embedded.ABOUT in result.stdout
    assert "never saw" not in result.stderr
    assert "pruned" in result.stdout
    return folder


@pytest.fixture(scope="module")
def pipe():
    return embedded.embedded_pipeline()


@pytest.fixture(scope="module")
def side(pipe):
    """Of the model's own images, in pixels."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor


@pytest.mark.parametrize("name", PICTURES)
def test_demo_draws_something(demo_folder, side, name):
    values = pixels(demo_folder / name)
    assert values.std() > 10
    if name != "tokens.png":
        assert values.shape == (side, side, 3)


def test_demo_leaves_no_partial_files(demo_folder):
    assert sorted(path.name for path in demo_folder.iterdir()) == sorted([*PICTURES, "comparison.json"])


def test_demo_report(demo_folder, pipe, side):
    document = json.loads((demo_folder / "comparison.json").read_text())
    assert set(document) == {"command", "device", "versions", "date", "settings", "rows"}
    assert document["settings"]["prompt"] == "a red circle"
    assert document["settings"]["ratio"] == 0.63
    assert (document["settings"]["width"], document["settings"]["height"]) == (side, side)
    full, pruned = document["rows"]
    assert (full["name"], pruned["name"]) == ("full", "pruned")
    assert full.keys() == pruned.keys()
    for row in (full, pruned):
        assert not any(isinstance(value, (dict, list)) for value in row.values())
        assert row["steps"] == row["unet_calls"] == STEPS
        assert row["batch"] == 2
        assert row["unet_seconds"] == pytest.approx(row["seconds_per_call"] * STEPS)
    for level in (2, 3):
        tokens = (pipe.unet.config.sample_size // 2 ** (level - 1)) ** 2
        assert full[f"kept_tokens_level_{level}"] == tokens
        assert pruned[f"kept_tokens_level_{level}"] == round(0.37 * tokens)
    assert 0 < pruned["tflops"] < full["tflops"]
    assert pruned["speedup"] == pytest.approx(full["unet_seconds"] / pruned["unet_seconds"])
    assert (full["speedup"], full["psnr_db"]) == (1, None)
    assert 10 < pruned["psnr_db"] < 60


def test_demo_draws_several_at_once_side_by_side(demo_folder, side, tmp_path):
    arguments = ["demo", "--steps", STEPS, "--images", 2, "--prompt", "a red circle", "--output", tmp_path]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    several = pixels(tmp_path / "full.png").astype(int)
    assert several.shape == (side, 2 * side, 3)
    assert np.abs(several[:, :side] - pixels(demo_folder / "full.png")).max() <= 1
    assert np.abs(several[:, :side] - several[:, side:]).max() > 10
    row = json.loads((tmp_path / "comparison.json").read_text())["rows"][0]
    assert row["batch"] == 4 and row["tflops_per_image"] == pytest.approx(row["tflops"] * 2 * STEPS)


def test_demo_counts_the_flops_of_the_calls_it_makes(demo_folder, pipe):
    # On the meta device: torch's counter does not know the attention that runs on a CPU.
    unet = models.meta_unet(pipe.unet.config)
    states, _, pooled, _ = pipe.encode_prompt("a red circle", device="cpu", do_classifier_free_guidance=False)
    added = {"text_embeds": pooled.to("meta"), "time_ids": torch.zeros(1, 6, device="meta")}
    latent = torch.zeros(1, 4, unet.config.sample_size, unet.config.sample_size, device="meta")
    counted = flops.count_flops(lambda: unet(latent, 1, states.to("meta"), added_cond_kwargs=added))
    full, _ = json.loads((demo_folder / "comparison.json").read_text())["rows"]
    assert full["tflops"] == counted.tflops


def test_demo_names_words_that_the_model_never_saw(tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise OSError("far enough")

    monkeypatch.setattr(comparison, "compare", stop)
    result = run("demo", "--prompt", "a red fox above a blue wolf", "--output", tmp_path)
    assert "never saw these words: fox, wolf\n" in result.stderr
    assert result.stdout == ""  # it may be closed or full, which must not cost the pictures


def test_generate_on_a_saved_folder_gives_the_demo_images(demo_folder, model, side, tmp_path):
    report = tmp_path / "figures" / "report.json"
    result = run(
        *("generate", "a red circle", "--model", model, "--size", side, "--steps", STEPS, "--dtype", "fp32"),
        *("--device", "cpu", "--output", tmp_path / "out", "--json", report),
    )
    assert result.exit_code == 0, result.output
    for name in PICTURES:
        assert np.array_equal(pixels(tmp_path / "out" / name), pixels(demo_folder / name)), name
    assert json.loads(report.read_text())["settings"]["model"] == str(model)


def test_generate_pruned_only_with_other_settings(model, pipe, tmp_path):
    result = run(
        *("generate", "a red circle", "--model", model, "--size", "128x64", "--steps", STEPS, "--no-compare"),
        *("--levels", "3", "--ratio", "0.5", "--placement", "paper", "--guidance", "1", "--recovery", "zeros"),
        *("--ranking", "cross", "--negative-prompt", "blur", "--device", "cpu", "--output", tmp_path),
    )
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "full.png").exists()
    assert pixels(tmp_path / "pruned.png").shape == (64, 128, 3)
    (row,) = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    assert (row["batch"], row["speedup"], row["psnr_db"]) == (1, None, None)
    tokens = 128 * 64 // pipe.vae_scale_factor**2
    assert (row["kept_tokens_level_2"], row["kept_tokens_level_3"]) == (tokens // 4, tokens // 16 // 2)


def test_same_seed_same_image(pipe):
    def image(seed, model=pipe):
        request = comparison.ImageRequest("a red circle", steps=3, seed=seed, width=128, height=64)
        return np.asarray(comparison.generate_image(model, request).image)

    first = image(3)
    assert np.array_equal(first, image(3))
    assert np.array_equal(first, image(3, embedded.embedded_pipeline()))
    assert not np.array_equal(first, image(4))


def test_size_is_the_models_own_unless_given(pipe, side):
    request = comparison.sized(comparison.ImageRequest("a red circle", height=64), pipe)
    assert (request.width, request.height) == (side, 64)


def test_finished_full_image_survives_a_failure(pipe, tmp_path, monkeypatch):
    request = comparison.ImageRequest("a red circle", steps=1, guidance=1, width=128, height=64)

    rank = kernels.weighted_page_rank

    def break_down(q, *args, **kwargs):
        if q.device.type == "meta":  # counting FLOPs needs no memory
            return rank(q, *args, **kwargs)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(kernels, "weighted_page_rank", break_down)
    with pytest.raises(torch.OutOfMemoryError):
        comparison.compare(pipe, request, replace(PUBLISHED, ratio=0.5), tmp_path)
    assert pixels(tmp_path / "full.png").shape == (64, 128, 3)
    assert not (tmp_path / "pruned.png").exists()
    assert atedm.pruned_blocks(pipe) == []


def test_out_of_memory_is_a_message(tmp_path, monkeypatch):
    def break_down(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(comparison, "compare", break_down)
    result = run("demo", "--steps", 1, "--output", tmp_path)
    assert result.exit_code == 1
    assert "out of memory" in result.stderr


def test_a_call_is_compared_with_those_of_its_kind():
    kinds = ["whole", "reused", "whole", "reused"]
    assert comparison._undisturbed([1.0, 0.1, 1.2, 0.3], kinds) == pytest.approx(0.55)
    assert comparison._undisturbed([1.0, 2.0], ["whole"] * 2) == 1.0


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        (PUBLISHED, ["light", "pruned"]),
        (atedm.Options(), ["whole", "pruned", "reused"]),
        (replace(PUBLISHED, schedule=None), ["pruned", "pruned"]),
        (atedm.PRESETS["fast"], ["whole", "reused"]),
    ],
    ids=["published", "default", "one kind", "fast"],
)
def test_a_warm_up_meets_every_kind_of_step(options, kinds):
    assert comparison.warm_up_kinds(options) == kinds


@pytest.mark.parametrize(
    ("options", "tokens", "expected"),
    [
        (PUBLISHED, {2: 256, 3: 64}, "--levels 3 leaves it whole"),
        (PUBLISHED, {2: 256, 3: 64, 4: 16}, "--levels 3,4 leaves it whole"),
        (PUBLISHED, {2: 4096, 3: 1024}, None),
        (replace(PUBLISHED, levels=(3,)), {2: 256, 3: 64}, None),
        (replace(PUBLISHED, ratio={3: 0.6}), {2: 256, 3: 64}, None),
        (atedm.Options(), {2: 256, 3: 64}, None),
        (atedm.PRESETS["fast"], {2: 256, 3: 64}, None),
    ],
)
def test_a_level_that_is_too_small_is_told(options, tokens, expected):
    told = comparison.advice(options, tokens)
    assert told is None if expected is None else expected in told


@pytest.mark.parametrize(
    ("full", "pruned", "expected"),
    [((1.0, 0.9), (2.0, 1.9), "too small"), ((9.0, 0.9), (1.0, 0.9), "Do not trust"), ((2.0, 1.9), (1.0, 0.9), "")],
)
def test_report_says_what_the_times_are_worth(tmp_path, capsys, full, pruned, expected):
    rows = [
        {"name": name, "seconds_per_call": mean, "undisturbed_seconds_per_call": fastest, "speedup": full[0] / mean}
        for name, (mean, fastest) in (("full", full), ("pruned", pruned))
    ]
    found = comparison.Comparison(rows)
    comparison.write_report(found, torch.device("cpu"), {}, tmp_path / "x.json", "title", "too small")
    printed = capsys.readouterr().out
    assert [text for text in ("too small", "Do not trust") if text in printed] == ([expected] if expected else [])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--prompt", " "], "--prompt"),
        (["--ratio", "1.5"], "--ratio"),
        (["--steps", "0"], "--steps"),
        (["--device", "abacus"], "--device"),
        (["--device", "cuda:99"], "--device"),
    ],
)
def test_demo_refuses(tmp_path, arguments, expected):
    result = run("demo", "--output", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert expected in result.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["", "--model", "{model}"], "PROMPT"),
        (["a red circle"], "--model"),
        (["a red circle", "--model", "./nowhere"], "--model"),
        (["a red circle", "--model", "{empty}"], "model_index.json"),
        (["a red circle", "--model", "{other}"], "StableDiffusionPipeline"),
        (["a red circle", "--model", "{model}", "--size", "1001"], "--size"),
        (["a red circle", "--model", "{model}", "--size", "large"], "--size"),
        (["a red circle", "--model", "{model}", "--dtype", "int8"], "--dtype"),
        (["a red circle", "--model", "{model}", "--levels", "two"], "--levels"),
        (["a red circle", "--model", "{model}", "--levels", "7"], "--levels"),
        (["a red circle", "--model", "{model}", "--placement", "late"], "--placement"),
        (["a red circle", "--model", "{model}", "--output", "{file}"], "--output"),
        (["a red circle", "--model", "{model}", "--json", "{empty}"], "--json"),
    ],
)
def test_generate_refuses(model, tmp_path, arguments, expected):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    names = {name: tmp_path / name for name in ("empty", "file", "other")}
    arguments = [argument.format(model=model, **names) for argument in arguments]
    if "--output" not in arguments:
        arguments += ["--output", str(tmp_path / "out")]
    result = run("generate", *arguments, "--device", "cpu")
    assert result.exit_code == 2, result.output
    assert expected in result.stderr


def test_generate_wants_safetensors_unless_asked(model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    arguments = ["generate", "a star", "--model", folder, "--size", 64, "--device", "cpu", "--steps", 1, "--no-compare"]
    result = run(*arguments, "--output", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert "cannot be loaded" in result.stderr and "--allow-pickled" in result.stderr
    result = run(*arguments, "--allow-pickled", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "pruned.png").is_file()


@pytest.mark.parametrize(("total", "light"), [(50, 15), (50, 0), (4, 2), (1, 1), (10, 9), (1000, 1)])
def test_steps_to_show(total, light):
    shown = pictures.steps_to_show(total, light)
    assert shown == sorted(set(shown))
    assert len(shown) == min(total, 9)
    assert {0, total - 1} <= set(shown)
    if 0 < light < total:
        assert {light - 1, light} <= set(shown)


def test_psnr():
    black, gray = (Image.new("RGB", (4, 4), (value,) * 3) for value in (0, 51))
    assert images.psnr_db(black, black) is None
    assert images.psnr_db(black, gray) == pytest.approx(20 * np.log10(5))
