"""``atedm generate`` beyond one image: a file of prompts, presets, the page that explains; ``atedm.plot``."""

import dataclasses
import json
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

import atedm
from atedm import embedded
from atedm.app import comparison, explain
from atedm.cli import app
from atedm.policy.options import RANKINGS, RECOVERIES

STEPS = 3
PROMPTS = ["a red circle", "a large blue square", "a small green star above a red cross"]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def pipe():
    return embedded.embedded_pipeline()


@pytest.fixture(scope="module")
def common(pipe):
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return ["--model", embedded.WEIGHTS, "--dtype", "fp32", "--size", side, "--steps", STEPS, "--device", "cpu"]


@pytest.fixture(scope="module")
def many(common, tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS[:2]) + f"\n\n{PROMPTS[2]}\n")
    arguments = ["generate", *common, "--prompts", prompts, "--seed", 5, "--ratio", 0.5]
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


def test_a_preset_and_an_options_file_give_the_same(common, tmp_path):
    atedm.Options(placement="paper", levels=(3,)).save(tmp_path / "mine.json")
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
        (["--prompts", "{folder}/empty.txt"], "holds no prompt; expected one a line"),
        (["--prompts", "{folder}/binary.txt"], "is no UTF-8 text"),
        (["--prompts", "{folder}/prompts.txt", "--explain"], "expected it with a single PROMPT"),
        (
            [PROMPTS[0], "--preset", "papper"],
            "--preset: options is 'papper'; expected an atedm.Options or a preset: paper",
        ),
        ([PROMPTS[0], "--rank-every", "0"], "--rank-every: rank_every is 0; expected an integer of at least 1"),
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
    assert "http" not in page and "<link" not in page
    for block in ("down_blocks.1.attentions.0", "mid_block.attentions.0"):
        assert block in page


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("recovery", RECOVERIES)
def test_the_page_says_how_tokens_were_chosen(ranking, recovery):
    said = explain._method(atedm.Options(ranking=ranking, recovery=recovery, grid=3).to_dict())
    assert said.count("keys") == (ranking == "keys") + (recovery == "keys")
    assert "in each square of 3×3" in said
    assert "square" not in explain._method(atedm.Options(ranking=ranking, recovery=recovery).to_dict())


@pytest.fixture(scope="module")
def recorded(pipe):
    with atedm.applied(pipe), atedm.record(pipe) as recording:
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
    with atedm.applied(pipe), atedm.record(pipe) as recording:
        pass
    with pytest.raises(ValueError, match="recording is empty"):
        atedm.plot(recording)
