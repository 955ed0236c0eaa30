"""What the README and the other pages show: programs run, links lead somewhere, commands, paths and options exist."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import typer
from diffusers import StableDiffusionXLPipeline
from PIL import Image

import atedm
import atedm.embedded
from atedm.cli import app
from atedm.policy.ranking import RANKINGS
from atedm.policy.recovery import RECOVERIES
from atedm.policy.schedules import SCHEDULES
from atedm.policy.staleness import STALENESS
from atedm_bench.cli import app as bench
from tests.helpers.shallow import shallow_pipeline

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CARD = ROOT / "python" / "atedm" / "embedded" / "README.md"
PAGES = [README, *ROOT.glob("C*.md"), ROOT / "bench" / "README.md", CARD, *sorted(ROOT.glob("docs/*.md"))]
# Minutes of training, which tests/pipelines/test_training_page.py runs.
TRAINING = ROOT / "docs" / "training.md"

FENCED = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CHECKPOINT = "stabilityai/stable-diffusion-xl-base-1.0"

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page, language):
    return [code for found, code in FENCED.findall(page.read_text(encoding="utf-8")) if found == language]


def run(page, names):
    """Run the Python of ``page``, one block after the other as a reader would; returns the names at the end."""
    for number, code in enumerate(blocks(page, "python"), 1):
        exec(compile(code, f"{page}, block {number}", "exec"), names)
    return names


class Quick(StableDiffusionXLPipeline):
    """As few steps as make a picture, where a page names no number."""

    def __call__(self, *args, num_inference_steps=4, **kwargs):
        return super().__call__(*args, num_inference_steps=num_inference_steps, **kwargs)


@pytest.fixture(scope="module")
def pipe():
    pipe = Quick(**shallow_pipeline(side=64).components, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_program_of_the_readme_runs_in_an_empty_folder(model, tmp_path, monkeypatch):
    (code,) = blocks(README, "python")
    assert code.count(CHECKPOINT) == 1 and len(README.read_text(encoding="utf-8").splitlines()) <= 150
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code.replace(CHECKPOINT, str(model)), str(README), "exec"), names)
    with Image.open(tmp_path / "picture.png") as image:
        assert image.size == (64, 64)
    assert atedm.pruned_blocks(names["pipe"]) == []
    folder = re.search(r"# or a local folder, such as (\S+)", code).group(1)
    assert (ROOT / folder / "model_index.json").is_file()


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page not in (README, TRAINING) and blocks(page, "python")],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_python_of_a_page_runs(page, pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(atedm.embedded, "embedded_pipeline", lambda: pipe)
    try:
        run(page, {"pipe": pipe, "prompt": "a red circle", "atedm": atedm, "torch": torch})
    finally:
        atedm.remove(pipe)


def test_the_block_of_ones_own_keeps_what_it_must():
    names = run(ROOT / "docs" / "ops.md", {})
    assert names["y"].shape == (2, 100, 64)
    torch.manual_seed(0)
    block = names["PrunedBlock"](ratio=0.0).eval()
    x = torch.randn(1, 30, 64)
    with torch.inference_mode():
        whole = block(x)
        block.ratio = 0.5
        pruned = block(x)
    # The layers treat each token on its own: what was kept is as it would be.
    same = torch.isclose(whole, pruned, rtol=1e-4, atol=1e-5).all(dim=2)
    assert same.sum() == 15


def prose(page):
    """The text of ``page`` without blocks of code."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page):
    """Those that GitHub makes of the headings."""
    found = []
    for heading in re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return found


@every_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@every_page
def test_paths_exist(page):
    folders = "|".join(("python", "atedm_kernels", "csrc", "bench", "tests", "docs"))
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", prose(page)):
        assert (ROOT / path).exists(), f"{page.name}: {path}"


def commands(runner):
    return typer.main.get_command(runner).commands


RUNNERS = {"atedm": commands(app), "atedm-bench": commands(bench)}


@every_page
def test_commands_and_their_options_exist(page):
    text = page.read_text(encoding="utf-8")
    lines = [line.partition(" # ")[0] for code in blocks(page, "sh") for line in code.replace("\\\n", "").splitlines()]
    lines += re.findall(r"`([^`]+)`", prose(page))
    for line in lines:
        for runner, name, rest in re.findall(r"(?<![\w./'-])(atedm(?:-bench)?) ([a-z]+)\b(.*)", line, re.DOTALL):
            assert name in RUNNERS[runner], f"{page.name}: {runner} {name}"
            command = RUNNERS[runner][name]
            for word in rest.split():
                command = getattr(command, "commands", {}).get(word, command)
            known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
            unknown = set(re.findall(r"(?<!\S)--[\w-]+", rest)) - known - {"--help"}
            assert not unknown, f"{page.name}: {runner} {name} has no {', '.join(sorted(unknown))}"
    assert "atedm bench" not in text


def test_every_option_is_on_its_page():
    text = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    names = [f"`{each.name}`" for each in fields(atedm.Options) if each.name != "schedule"]
    values = [*atedm.PRESETS, *atedm.KINDS, *RANKINGS, *RECOVERIES, *STALENESS]
    wanted = [*names, "schedule=", *(f'"{value}"' for value in values), *(f"atedm.{name}(" for name in SCHEDULES)]
    assert [name for name in wanted if name not in text] == []
