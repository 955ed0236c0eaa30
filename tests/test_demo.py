"""``atedm demo`` and ``atedm generate``, end to end on the embedded model."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import atedm
import atedm_kernels as kernels
from atedm import comparison, embedded, pictures
from atedm.cli import app

STEPS = 2
PICTURES = ("full.png", "pruned.png", "tokens.png")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def message(result):
    """The text of a usage error, without the box that it is drawn in."""
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    result = run("demo", "--steps", STEPS, "--prompt", "a fox", "--output", folder)
    assert result.exit_code == 0, result.output
    assert embedded.WEIGHTS_NOTE in result.stdout
    assert "pruned" in result.stdout
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    embedded.embedded_pipeline().save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def pipe():
    return embedded.embedded_pipeline()


@pytest.mark.parametrize("name", PICTURES)
def test_demo_draws_something(demo_folder, name):
    values = pixels(demo_folder / name)
    assert values.std() > 10
    if name != "tokens.png":
        assert values.shape == (512, 512, 3)


def test_demo_leaves_no_partial_files(demo_folder):
    assert sorted(path.name for path in demo_folder.iterdir()) == sorted([*PICTURES, "comparison.json"])


def test_demo_report(demo_folder):
    document = json.loads((demo_folder / "comparison.json").read_text())
    assert set(document) == {"command", "device", "versions", "date", "settings", "rows"}
    assert document["settings"]["prompt"] == "a fox"
    assert document["settings"]["ratio"] == 0.63
    full, pruned = document["rows"]
    assert (full["name"], pruned["name"]) == ("full", "pruned")
    assert full.keys() == pruned.keys()
    for row in (full, pruned):
        assert not any(isinstance(value, (dict, list)) for value in row.values())
        assert row["steps"] == row["unet_calls"] == STEPS
        assert row["batch"] == 2
        assert row["unet_seconds"] == pytest.approx(row["seconds_per_call"] * STEPS)
    assert (full["kept_tokens_level_2"], full["kept_tokens_level_3"]) == (1024, 256)
    assert (pruned["kept_tokens_level_2"], pruned["kept_tokens_level_3"]) == (379, 95)
    assert 0 < pruned["tflops"] < full["tflops"]
    assert pruned["speedup"] == pytest.approx(full["unet_seconds"] / pruned["unet_seconds"])
    assert (full["speedup"], full["psnr_db"]) == (1, None)
    assert 10 < pruned["psnr_db"] < 60


def test_generate_on_a_saved_folder_gives_the_demo_images(demo_folder, model_folder, tmp_path):
    report = tmp_path / "figures" / "report.json"
    result = run(
        *("generate", "a fox", "--model", model_folder, "--size", 512, "--steps", STEPS, "--dtype", "fp32"),
        *("--device", "cpu", "--output", tmp_path / "out", "--json", report),
    )
    assert result.exit_code == 0, result.output
    for name in PICTURES:
        assert np.array_equal(pixels(tmp_path / "out" / name), pixels(demo_folder / name)), name
    assert json.loads(report.read_text())["settings"]["model"] == str(model_folder)


def test_generate_pruned_only_with_other_settings(model_folder, tmp_path):
    result = run(
        *("generate", "a fox", "--model", model_folder, "--size", "256x128", "--steps", STEPS, "--no-compare"),
        *("--levels", "3", "--ratio", "0.5", "--placement", "paper", "--guidance", "1", "--recovery", "zeros"),
        *("--ranking", "cross", "--negative-prompt", "blur", "--device", "cpu", "--output", tmp_path),
    )
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "full.png").exists()
    assert pixels(tmp_path / "pruned.png").shape == (128, 256, 3)
    (row,) = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    assert (row["batch"], row["speedup"], row["psnr_db"]) == (1, None, None)
    assert (row["kept_tokens_level_2"], row["kept_tokens_level_3"]) == (128, 16)


def test_same_seed_same_image(pipe):
    def image(seed, model=pipe):
        request = comparison.Request("a fox", steps=STEPS, seed=seed, width=128, height=64)
        return np.asarray(comparison.generate_image(model, request).image)

    first = image(3)
    assert np.array_equal(first, image(3))
    assert np.array_equal(first, image(3, embedded.embedded_pipeline()))
    assert not np.array_equal(first, image(4))


def test_embedded_pipeline_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    embedded.embedded_pipeline(seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_any_prompt_is_tokenized_without_unknowns(pipe):
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        for prompt in ("a photo of a cat", "Ünïcode 日本語 🎉", "4k!? (x:1.2)\n\ttab"):
            ids = tokenizer(prompt).input_ids
            assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
            # The end token doubles as the unknown one, as in CLIP.
            assert tokenizer.eos_token_id not in ids[1:-1]
            assert tokenizer.decode(ids[1:-1]).replace(" ", "") == "".join(prompt.lower().split())
        assert len(tokenizer("a photo of a cat").input_ids) == 7


def test_finished_full_image_survives_a_failure(pipe, tmp_path, monkeypatch):
    request = comparison.Request("a fox", steps=1, guidance=1, width=128, height=64)

    rank = kernels.weighted_page_rank

    def break_down(q, *args, **kwargs):
        if q.device.type == "meta":  # counting FLOPs needs no memory
            return rank(q, *args, **kwargs)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(kernels, "weighted_page_rank", break_down)
    with pytest.raises(torch.OutOfMemoryError):
        comparison.compare(pipe, request, {"ratio": 0.5}, tmp_path)
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


@pytest.mark.parametrize(
    ("full", "pruned", "expected"),
    [((1.0, 0.9), (2.0, 1.9), "too small"), ((9.0, 0.9), (1.0, 0.9), "Do not trust"), ((2.0, 1.9), (1.0, 0.9), "")],
)
def test_report_says_what_the_times_are_worth(tmp_path, capsys, full, pruned, expected):
    rows = [
        {"name": name, "seconds_per_call": mean, "fastest_call_seconds": fastest, "speedup": full[0] / mean}
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
    assert expected in message(result)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["", "--model", "{model}"], "PROMPT"),
        (["a fox"], "--model"),
        (["a fox", "--model", "./nowhere"], "--model"),
        (["a fox", "--model", "{empty}"], "model_index.json"),
        (["a fox", "--model", "{other}"], "StableDiffusionPipeline"),
        (["a fox", "--model", "{model}", "--size", "1001"], "--size"),
        (["a fox", "--model", "{model}", "--size", "large"], "--size"),
        (["a fox", "--model", "{model}", "--dtype", "int8"], "--dtype"),
        (["a fox", "--model", "{model}", "--levels", "two"], "--levels"),
        (["a fox", "--model", "{model}", "--levels", "7"], "--levels"),
        (["a fox", "--model", "{model}", "--placement", "late"], "--placement"),
        (["a fox", "--model", "{model}", "--output", "{file}"], "--output"),
        (["a fox", "--model", "{model}", "--json", "{empty}"], "--json"),
    ],
)
def test_generate_refuses(model_folder, tmp_path, arguments, expected):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    names = {name: tmp_path / name for name in ("empty", "file", "other")}
    arguments = [argument.format(model=model_folder, **names) for argument in arguments]
    if "--output" not in arguments:
        arguments += ["--output", str(tmp_path / "out")]
    result = run("generate", *arguments, "--device", "cpu")
    assert result.exit_code == 2, result.output
    assert expected in message(result)


def test_generate_wants_safetensors(model_folder, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    for file in (folder / "unet").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    result = run("generate", "a fox", "--model", folder, "--size", 64, "--device", "cpu", "--output", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert "cannot be loaded" in message(result)


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
    assert comparison.psnr_db(black, black) is None
    assert comparison.psnr_db(black, gray) == pytest.approx(20 * np.log10(5))
