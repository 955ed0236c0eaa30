"""``atedm generate`` beyond one image: a file of prompts, presets, the page that explains; ``atedm.plot``."""

import dataclasses
import itertools
import json
import math
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.image_processor import VaeImageProcessor
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

import atedm
from atedm.app import comparison, explain, flops, prompts
from atedm.cli import app
from atedm.policy.options import PUBLISHED, RANKINGS, RECOVERIES
from tests.helpers.counting import shared_counters
from tests.helpers.shallow import shallow_pipeline

STEPS = 3
PROMPTS = ["a red circle", "a large blue square", "a small green star above a red cross"]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture(scope="module", autouse=True)
def counting_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flops, "UNetFlops", shared_counters())
        yield


@pytest.fixture(scope="module")
def pipe():
    return shallow_pipeline(side=64)


@pytest.fixture(scope="module")
def common(pipe, model):
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return ["--model", model, "--dtype", "fp32", "--size", side, "--steps", STEPS, "--device", "cpu"]


@pytest.fixture(scope="module")
def many(common, tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS[:2]) + f"\n\n{PROMPTS[2]}\n")
    arguments = ["generate", *common, "--prompts", prompts, "--seed", 5, "--preset", "paper", "--ratio", 0.5]
    result = run(*arguments, "--batch", 2, "--compare", "--output", folder / "out")
    assert result.exit_code == 0, result.output
    return arguments, folder / "out"


def test_every_prompt_gets_its_picture_full_and_pruned(many, pipe):
    _, out = many
    request = comparison.ImageRequest(PROMPTS[1], steps=STEPS, seed=6)
    alone = np.asarray(comparison.generate_image(pipe, request).image).astype(int)
    assert np.abs(pixels(out / "full" / "00001.png") - alone).max() <= 1  # made in a batch of two
    for name in ("full", "pruned"):
        assert sorted(path.name for path in (out / name).iterdir()) == [f"{n:05d}.png" for n in range(3)]
    assert not np.array_equal(pixels(out / "full" / "00001.png"), pixels(out / "pruned" / "00001.png"))
    document = json.loads((out / "comparison.json").read_text())
    full, pruned = document["rows"]
    assert (full["name"], pruned["name"], pruned["images"]) == ("full", "pruned", 3)
    assert full["tflops"] > pruned["tflops"] > 0 and pruned["unet_seconds_per_image"] > 0
    assert document["settings"]["ratio"] == 0.5


def test_an_interrupted_file_of_prompts_goes_on(many):
    arguments, out = many
    before = {path: path.read_bytes() for path in out.rglob("*.png")}
    lost = out / "pruned" / "00002.png"
    lost.unlink()
    kept = {path: path.stat().st_mtime_ns for path in before if path != lost}
    result = run(*arguments, "--batch", 2, "--compare", "--output", out)
    assert result.exit_code == 0, result.output
    assert {path: path.read_bytes() for path in before} == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_pictures_of_another_run_are_refused(many):
    arguments, out = many
    result = run(*arguments[:-1], 0.6, "--batch", 2, "--output", out)
    assert result.exit_code == 2
    assert "holds pictures of another run (pruned differ)" in result.stderr


@pytest.fixture
def spoil(monkeypatch):
    """Makes NaN of what the text encoders give for a prompt."""
    encode = StableDiffusionXLPipeline.encode_prompt

    def spoil(spoiled):
        def encode_prompt(self, prompt, **arguments):
            embeddings, *others = encode(self, prompt=prompt, **arguments)
            for n, text in enumerate([prompt] if isinstance(prompt, str) else prompt):
                if text == spoiled:
                    embeddings[n] = math.nan
            return embeddings, *others

        monkeypatch.setattr(StableDiffusionXLPipeline, "encode_prompt", encode_prompt)

    return spoil


@pytest.fixture
def counted(monkeypatch):
    """The kinds whose FLOPs the reports ask for; to count them takes seconds. A call of the UNet takes one here."""
    asked, ticks = [], itertools.count()
    monkeypatch.setattr(comparison.UNetTimer, "_now", lambda _: next(ticks))
    monkeypatch.setattr(
        prompts, "tflops_of", lambda *given: asked.append(Counter(given[-1])) or {"full": 2.0, "pruned": 1.0}
    )
    return asked


def test_a_picture_that_ranks_nan_costs_no_other_and_is_tried_again(many, spoil, counted, tmp_path):
    arguments, expected = many
    spoil(PROMPTS[1])
    result = run(*arguments, "--batch", 2, "--output", tmp_path)
    assert result.exit_code == 1, result.output
    message = "picture 00001: down_blocks.1.attentions.1 ranks NaN at step 0"
    assert f"and were not made; all others were made:\n  pruned, {message}: '{PROMPTS[1]}'\n" in result.stderr
    assert [path.name for path in sorted((tmp_path / "pruned").iterdir())] == ["00000.png", "00002.png"]
    first, last = ((tmp_path / "pruned" / name, expected / "pruned" / name) for name in ("00000.png", "00002.png"))
    assert np.abs(np.subtract(*map(pixels, first), dtype=float)).max() <= 1  # made in a batch of two
    assert last[0].read_bytes() == last[1].read_bytes()
    document = json.loads((tmp_path / "comparison.json").read_text())
    assert document["failed"] == [{"name": "pruned", "number": 1, "prompt": PROMPTS[1], "message": message}]
    # The calls before a failure are no part of a picture.
    assert (document["rows"][0]["images"], document["rows"][0]["unet_seconds_per_image"]) == (2, STEPS)
    assert counted == [{"light": 2, "pruned": 4}]

    spoil(None)
    result = run(*arguments, "--batch", 2, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    for path in sorted((expected / "pruned").iterdir()):
        assert (tmp_path / "pruned" / path.name).read_bytes() == path.read_bytes()
    assert json.loads((tmp_path / "comparison.json").read_text())["failed"] == []


def test_the_time_of_a_picture_counts_those_that_are_not_finite(many, counted, monkeypatch, tmp_path):
    arguments, _ = many
    images_of = prompts.images_of
    monkeypatch.setattr(prompts, "images_of", lambda *given: [None, *images_of(*given)[1:]])
    result = run(*arguments, "--batch", 3, "--output", tmp_path)
    assert result.exit_code == 1, result.output
    (row,) = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    assert (row["images"], row["unet_seconds_per_image"]) == (2, STEPS / 3)


def test_where_every_picture_ranks_nan_nothing_is_left_to_make(many, spoil, counted, monkeypatch, tmp_path):
    arguments, _ = many
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[1]}\n")
    arguments = [tmp_path / "prompts.txt" if str(each).endswith("prompts.txt") else each for each in arguments]
    spoil(PROMPTS[1])
    # Several processes gather what failed, each its own in a row.
    other = prompts.Failure(1, "another's", "picture 00001: of another process")
    monkeypatch.setattr(prompts, "gather_object", lambda failed: [("pruned", other), *failed])
    result = run(*arguments, "--output", tmp_path / "out")
    assert result.exit_code == 1, result.output
    assert 'picture 00001: of another process: "another\'s"' in result.stderr
    document = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [failure["prompt"] for failure in document["failed"]] == [PROMPTS[1], "another's"]
    assert document["rows"][0]["unet_seconds_per_image"] is None and len(counted) == 1
    assert not list(tmp_path.rglob("*.png"))


def test_a_single_image_that_ranks_nan_is_an_error_without_a_traceback(common, spoil, tmp_path):
    spoil(PROMPTS[0])
    result = run("generate", PROMPTS[0], *common, "--preset", "paper", "--no-compare", "--output", tmp_path)
    assert result.exit_code == 1, result.output
    assert result.stderr.strip().splitlines()[-1].startswith("Error: down_blocks.1.attentions.1 ranks NaN in row 1 of")


class Failing:
    """A pipeline whose UNet has ``rows`` rows a picture, and ranks NaN in those of ``bad``.

    ``pixels``: of its pictures, by prompt.
    """

    image_processor = VaeImageProcessor()

    def __init__(self, rows, bad, pixels=None, watermark=None):
        self.rows, self.bad, self.pixels, self.tried = rows, bad, pixels or {}, []
        self.watermark = watermark

    def set_progress_bar_config(self, **_):
        pass

    def __call__(self, prompt, **_):
        self.tried.append(prompt)
        own = len(prompt) * (self.rows - 1)  # after those of the negative prompts
        rows = [own + n for n, text in enumerate(prompt) if text in self.bad]
        if rows:
            raise atedm.RankedNaN("mid_block.attentions.0", None, rows, len(prompt) * self.rows)
        images = torch.stack([torch.full((3, 8, 8), self.pixels.get(text, 0.5)) for text in prompt])
        return SimpleNamespace(images=self.watermark.apply_watermark(images) if self.watermark else images)


@pytest.mark.parametrize("guidance", [1, 5])
def test_rows_of_the_unet_are_pictures_of_the_batch(tmp_path, guidance):
    pipe, counts, failed, begun = Failing(1 if guidance == 1 else 2, {"b", "c"}), [], [], []
    cases = [prompts.PromptCase(text, n) for n, text in enumerate("abcdbe")]
    watched = {"on_picture": counts.append, "on_failure": failed.append, "before_batch": begun.append}
    prompts.make_pictures(pipe, cases, prompts.Sampling(1, guidance, 8, 8, batch=4), tmp_path, **watched)
    assert pipe.tried == [["a", "b", "c", "d"], ["a", "d"], ["b", "e"], ["e"]]
    assert begun == [0, 0, 4, 4] and counts == [0, 2, 1]
    assert [(failure.number, failure.prompt) for failure in failed] == [(1, "b"), (2, "c"), (4, "b")]
    assert failed[2].message == "picture 00004: mid_block.attentions.0 ranks NaN at an unknown step"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.png", "00003.png", "00005.png"]


def test_rows_that_are_no_pictures_are_not_guessed(tmp_path):
    cases, sampling = [prompts.PromptCase(text, 0) for text in "ab"], prompts.Sampling(1, 5, 8, 8, batch=2)
    with pytest.raises(RuntimeError, match="has 6 rows for 2 pictures, so it cannot be told which one fails"):
        prompts.make_pictures(Failing(3, {"b"}), cases, sampling, tmp_path, on_failure=print)
    with pytest.raises(atedm.RankedNaN, match="mid_block"):  # where nobody asks for failures
        prompts.make_pictures(Failing(2, {"b"}), cases, sampling, tmp_path)


class Watermark:
    """Darkens a picture and clamps it, as the watermarker of diffusers does; a double."""

    def apply_watermark(self, images):
        return (images.double() - 1).clamp(-1, 1)


@pytest.mark.parametrize("watermark", [None, Watermark()], ids=["plain", "marked"])
@pytest.mark.parametrize("pixel", [float("nan"), float("inf")])
def test_a_picture_that_is_not_finite_is_named_and_the_others_are_made(tmp_path, pixel, watermark):
    failed, sampling = [], prompts.Sampling(1, 5, 8, 8, batch=3)
    cases = [prompts.PromptCase(text, 0) for text in "abc"]
    prompts.make_pictures(Failing(2, {}, {"b": pixel}, watermark), cases, sampling, tmp_path, on_failure=failed.append)
    assert [(failure.number, failure.message) for failure in failed] == [
        (1, "picture 00001 has pixels that are not finite")
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.png", "00002.png"]
    assert (pixels(tmp_path / "00000.png") == (191 if watermark is None else 64)).all()
    with pytest.raises(FloatingPointError, match=r"picture 00001 has pixels that are not finite; .*b"):
        prompts.make_pictures(Failing(2, {}, {"b": pixel}, watermark), cases, sampling, tmp_path)


def test_a_preset_and_an_options_file_give_the_same(common, tmp_path):
    replace(PUBLISHED, placement="paper", levels=(3,)).save(tmp_path / "mine.json")
    for name, chosen in (("preset", ["--preset", "paper-dagger"]), ("file", ["--options", tmp_path / "mine.json"])):
        result = run("generate", PROMPTS[0], *common, *chosen, "--no-compare", "--output", tmp_path / name)
        assert result.exit_code == 0, result.output
    assert np.array_equal(pixels(tmp_path / "preset" / "pruned.png"), pixels(tmp_path / "file" / "pruned.png"))
    settings = json.loads((tmp_path / "preset" / "comparison.json").read_text())["settings"]
    assert (settings["placement"], settings["levels"]) == ("paper", [3])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "expected either a prompt or --prompts FILE"),
        ([PROMPTS[0], "--prompts", "{folder}/prompts.txt"], "expected either a prompt or --prompts FILE"),
        (["--prompts", "{folder}/absent.txt"], "No such file"),
        (["--prompts", "{folder}/empty.txt"], "holds no prompt; expected one per line"),
        (["--prompts", "{folder}/binary.txt"], "is not UTF-8 text"),
        (["--prompts", "{folder}/prompts.txt", "--explain"], "expected it with a single PROMPT"),
        (
            [PROMPTS[0], "--preset", "papper"],
            "--preset: options is 'papper'; expected an atedm.Options or a preset: default",
        ),
        ([PROMPTS[0], "--rank-every", "0"], "--rank-every: rank_every is 0; expected an integer, 1 to"),
        ([PROMPTS[0], "--preset", "paper", "--options", "{folder}/empty.txt"], "expected one of the two"),
        ([PROMPTS[0], "--options", "{folder}/empty.txt"], "holds no options of atedm.apply"),
        ([PROMPTS[0], "--options", "{folder}/absent.txt"], "No such file"),
    ],
)
def test_generate_refuses(common, tmp_path, arguments, expected):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    result = run("generate", *common, *(a.format(folder=tmp_path) for a in arguments), "--output", tmp_path / "out")
    assert result.exit_code in (1, 2), result.output
    assert expected in result.stderr
    assert not list(tmp_path.rglob("*.png"))


def test_the_page_holds_all_that_it_shows(common, tmp_path):
    prompt = 'a red circle <b>left</b> of a "blue" square'
    result = run("generate", prompt, *common, "--explain", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "explain.html").read_text()
    assert "a red circle &lt;b&gt;left&lt;/b&gt; of a &quot;blue&quot; square" in page
    sources = re.findall(r'src="([^"]{,40})', page)
    assert len(sources) == 4 and all(source.startswith("data:image/png;base64,") for source in sources)
    without_pictures = re.sub(r'"data:[^"]*"', "", page)
    assert "http" not in without_pictures and "<link" not in page
    for block in ("down_blocks.1.attentions.0", "mid_block.attentions.0"):
        assert block in page


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("recovery", RECOVERIES)
def test_the_page_says_how_tokens_were_chosen(ranking, recovery):
    said = explain._method(atedm.Options(ranking=ranking, recovery=recovery, grid=3).to_dict())
    assert said.count("keys") == (ranking == "keys") + (recovery == "keys")
    assert "in each square of 3×3" in said
    assert "square" not in explain._method(atedm.Options(ranking=ranking, recovery=recovery).to_dict())


def test_the_page_says_what_the_steps_did():
    settings = atedm.Options().to_dict()
    told = explain._told(["whole", "pruned", "reused", "whole"], settings)
    assert told.startswith("Of 4 calls of the UNet, 2 computed every token, 1 dropped tokens in every pruned block,")
    assert "PageRank" in told and "last computed" in told
    assert "PageRank" not in explain._told(["whole", "reused"], settings)


@pytest.mark.parametrize(
    ("name", "speedup", "is_trusted", "gains"),
    [
        ("full", 1.0, True, 0),
        ("pruned", 1.31, True, 1),
        ("pruned", 1.004, True, 0),  # shown as 1.00×
        ("pruned", 0.8, True, 0),
        ("pruned", 1.31, False, 0),
        ("pruned", None, True, 0),
    ],
)
def test_the_page_marks_what_is_a_gain_and_nothing_else(tmp_path, name, speedup, is_trusted, gains):
    Image.new("RGB", (2, 2)).save(tmp_path / "picture.png")
    row = {"name": name, "image": "picture.png", "unet_seconds": 2.0, "speedup": speedup}
    shown = explain._figure(row, tmp_path, is_trusted)
    assert shown.count('class="gain"') == gains
    assert (f"{speedup:.2f}× as fast" in shown) if name != "full" and speedup else "as fast" not in shown
    assert ("something else" in shown) != is_trusted
    # Nothing else of the page has that colour.
    assert explain._PAGE.template.count("var(--accent)") == explain._PAGE.template.count(".gain {") == 1


@pytest.fixture(scope="module")
def recorded(pipe):
    with atedm.applied(pipe, PUBLISHED), atedm.record(pipe) as recording:
        image = comparison.generate_image(pipe, comparison.ImageRequest(PROMPTS[0], steps=STEPS)).image
    return recording, image


def test_a_recording_holds_scores_masks_and_iterations(recorded, pipe):
    recording, _ = recorded
    assert recording.calls == [0, 1, 2] and recording.steps == STEPS
    assert recording.blocks[0][0] == "down_blocks.1.attentions.0"
    for ranked in recording.ranked:
        assert ranked.scores.shape == (2, ranked.tokens)  # with guidance: two rows
        keep = ranked.index.shape[1]
        best = ranked.scores.double().sort(dim=1, descending=True).values[:, keep - 1 : keep]
        assert (ranked.scores.double().gather(1, ranked.index) >= best - 1e-12).all()
        assert ranked.mask().sum() == 2 * keep
        assert ranked.iterations.shape[0] == 2 and (ranked.iterations >= 1).all()


@pytest.mark.parametrize("what", ["kept", "scores"])
def test_plot_draws_every_block(recorded, tmp_path, what):
    recording, image = recorded
    figure = atedm.plot(recording, image, what=what, path=tmp_path / "plot.png")
    assert isinstance(figure, Figure)
    assert pixels(tmp_path / "plot.png").std() > 10
    assert len(figure.axes) == len(recording.blocks) * (STEPS + 1)
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
    assert isinstance(atedm.plot(recording, what=what, row=0), Figure)  # without a picture


def test_colours_are_as_wide_as_the_scores(recorded):
    def key(recording):
        return next(t.get_text() for t in atedm.plot(recording, what="scores").texts if "bright" in t.get_text())

    def flattened(power):
        ranked = [dataclasses.replace(r, scores=r.scores**power) for r in recorded[0].ranked]
        return dataclasses.replace(recorded[0], ranked=ranked)

    assert key(flattened(0)) == "bright: 1.2 times the mean score and more · dark: 1/1.2 of it and less"
    assert key(flattened(50)) == "bright: 10 times the mean score and more · dark: 1/10 of it and less"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [({"what": "mask"}, "what is 'mask'; expected one of 'kept', 'scores'"), ({"row": 2}, "row is 2; expected one of")],
)
def test_plot_refuses(recorded, arguments, expected):
    with pytest.raises(ValueError, match=expected):
        atedm.plot(recorded[0], **arguments)


def test_plot_of_nothing_is_refused(pipe):
    with atedm.applied(pipe, PUBLISHED), atedm.record(pipe) as recording:
        pass
    with pytest.raises(ValueError, match="recording is empty"):
        atedm.plot(recording)
