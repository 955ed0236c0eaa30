"""Files from a stranger run nothing, and nothing is written outside of the output folder."""

import json
import pickle
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from atedm.cli import app
from atedm.policy.options import Options
from atedm_bench.quality import reference
from atedm_bench.quality.settings import Setting

PICTURE = ("--size", "64", "--steps", "1", "--device", "cpu", "--dtype", "fp32")


class Payload:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def trace(tmp_path):
    """What a payload leaves behind; at the end it must not be there."""
    path = tmp_path / "it ran"
    yield path
    assert not path.exists()


@pytest.fixture
def own(model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    return folder


def paint(model, folder, *more):
    words = ["generate", "--model", model, *PICTURE, "--output", folder, *more]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert "Traceback" not in done.output
    return done


def test_a_payload_runs_where_it_is_unpickled(tmp_path):
    """So the tests below can fail."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "it ran")))
    assert (tmp_path / "it ran").exists()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("allowed", [(), ("--allow-pickled",)], ids=["refused", "allowed"])
def test_pickled_weights(own, trace, tmp_path, part, allowed):
    (file,) = (own / part).glob("*.safetensors")
    name = "pytorch_model.bin" if part.startswith("text") else file.with_suffix(".bin").name
    torch.save({**load_file(file), "payload": Payload(trace)}, file.with_name(name))
    file.unlink()
    done = paint(own, tmp_path / "out", "a star", "--no-compare", *allowed)
    assert done.exit_code == 2 and "cannot be loaded" in done.stderr, done.output
    assert ("--allow-pickled" in done.stderr) == (not allowed)


def test_pickled_weights_of_the_model_that_scores(trace, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    torch.save({"payload": Payload(trace)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"clip-model: {tmp_path} cannot be loaded: .*safetensors"):
        reference._load_clip(str(tmp_path), allow_pickled=False)


def code_of_a_part(folder, trace):
    (folder / "unet" / "own.py").write_text(f"open({str(trace)!r}, 'w')\n")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "unet": ["own", "Own"]}))


def code_with_the_name_of_a_library(folder, trace):
    (folder / "unet" / "diffusers.py").write_text(f"open({str(trace)!r}, 'w')\n")


def code_of_the_pipeline(folder, trace):
    (folder / "pipeline.py").write_text(f"open({str(trace)!r}, 'w')\n")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": ["pipeline", "StableDiffusionXLOwn"]}))


def code_of_an_encoder(folder, trace):
    (folder / "text_encoder" / "own.py").write_text(f"open({str(trace)!r}, 'w')\n")
    path = folder / "text_encoder" / "config.json"
    auto = {"AutoConfig": "own.Own", "AutoModel": "own.Own"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": auto}))


@pytest.mark.parametrize(
    "add", [code_of_a_part, code_with_the_name_of_a_library, code_of_the_pipeline, code_of_an_encoder]
)
def test_code_beside_the_weights(own, trace, tmp_path, add):
    add(own, trace)
    done = paint(own, tmp_path / "out", "a star", "--no-compare")
    assert done.exit_code == (0 if add is code_of_an_encoder else 2), done.output
    # Not every release of diffusers refuses such code.
    assert ("code of its own for its unet" in done.stderr) == (add not in (code_of_the_pipeline, code_of_an_encoder))


OPTIONS = [
    {"ranking": "os.system"},
    {"recovery": "__class__"},
    {"staleness": "../drift"},
    {"schedule": {"name": "__import__", "tolerance": "os"}},
    {"schedule": {"name": "Adaptive", "tolerance": "__import__('os')"}},
    {"schedule": ["whole", "os.system"]},
    {"__class__": "os.system"},
    {"ratio": {"__import__('os')": 0.5}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=json.dumps)
def test_options(tmp_path, options):
    path = tmp_path / "options.json"
    path.write_text(json.dumps(options))
    with pytest.raises((ValueError, TypeError)):
        Options.load(path)
    done = CliRunner().invoke(app, ["flops", "--options", str(path)])
    assert done.exit_code == 2 and "--options" in done.stderr, done.output


def test_names_in_a_record_of_a_run_lead_nowhere(model, tmp_path):
    (tmp_path / "prompts.txt").write_text("../../star\n/etc/star\n\x1b]0;star\x07\n")
    out = tmp_path / "deep" / "out"
    assert paint(model, out, "--prompts", tmp_path / "prompts.txt").exit_code == 0
    record = json.loads((out / "run.json").read_text())
    record["settings"] |= {"../../outside": {}, "/tmp/outside": {}}
    (out / "run.json").write_text(json.dumps(record))
    (out / "pruned" / "00001.png").unlink()
    assert paint(model, out, "--prompts", tmp_path / "prompts.txt").exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.txt", "deep"}
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"out"}
    assert {path.name for path in out.iterdir()} == {"run.json", "times.json", "comparison.json", "pruned"}


@pytest.mark.parametrize("name", ["../x", "/x", "..\\x", "a/../../x", "~/x"])
def test_a_name_of_a_setting_leads_nowhere(name):
    folder = Setting(name, "tried", None).folder
    assert folder and re.fullmatch(r"[\w-]+", folder)


@pytest.mark.parametrize("place", ["pruned", "full", "run.json", "comparison.json", "pruned/00000.png", "times.json"])
@pytest.mark.parametrize("exists", [True, False])
def test_links_out_of_the_folder(model, tmp_path, place, exists):
    victim, out = tmp_path / "victim", tmp_path / "out"
    if exists and "." in place:
        victim.write_text("mine")
    elif exists:
        victim.mkdir()
    (out / place).parent.mkdir(parents=True, exist_ok=True)
    (out / place).symlink_to(victim)
    (tmp_path / "prompts.txt").write_text("a star\n")
    done = paint(model, out, "--prompts", tmp_path / "prompts.txt", "--compare")
    assert done.exit_code == 2 and f"the link {out / place} leads out of" in done.stderr, done.output
    assert (victim.exists(), list(victim.iterdir()) if victim.is_dir() else []) == (exists, [])
    assert not victim.is_file() or victim.read_text() == "mine"


def test_links_inside_the_folder_and_of_the_folder_are_the_users(model, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "elsewhere").mkdir()
    (tmp_path / "disk" / "pruned").symlink_to("elsewhere")
    (tmp_path / "prompts.txt").write_text("a star\n")
    done = paint(model, tmp_path / "out", "--prompts", tmp_path / "prompts.txt")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "disk" / "elsewhere" / "00000.png").is_file()


def test_what_a_prompt_says_is_text_in_the_page(model, tmp_path):
    prompt = "<script>alert(1)</script> $\\frac{$ [red]star[/red] \x1b[31m"
    done = paint(model, tmp_path, prompt, "--explain")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "explain.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
