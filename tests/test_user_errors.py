"""What a user does wrong is one line that says what to do: exit status 2, or 1 where the machine failed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import atedm
from atedm import embedded
from atedm.app import comparison, report
from atedm.cli import app
from atedm_bench.cli import app as bench
from atedm_bench.quality import session
from atedm_kernels import native
from tests.helpers.shallow import shallow_pipeline


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(embedded, "embedded_pipeline", lambda: shallow_pipeline(side=64))


def ends(arguments, status, *words, runner=app):
    done = CliRunner().invoke(runner, [str(each) for each in arguments])
    assert done.exit_code == status, (done.output, done.exception)
    assert isinstance(done.exception, SystemExit)
    assert "Traceback" not in done.output
    for word in words:
        assert word in done.stderr, done.stderr


def test_levels_that_a_model_lacks(small, tmp_path):
    ends(["demo", "--levels", "9", "--output", tmp_path], 2, "--levels", "expected levels with attention: [2, 3]")


@pytest.mark.parametrize("command", [["demo"], ["flops"], ["generate", "a star", "--model", "{model}"]], ids=str)
def test_presets_are_one_option(model, small, tmp_path, command):
    named = [each.format(model=model) for each in command]
    where = [] if command == ["flops"] else ["--output", tmp_path]
    described = CliRunner().invoke(app, [command[0], "--help"]).output
    assert all(name in described for name in atedm.PRESETS)
    ends([*named, "--preset", "nonsense", *where], 2, "--preset", *atedm.PRESETS)
    settings = tmp_path / "options.json"
    atedm.Options().save(settings)
    ends([*named, "--preset", "fast", "--options", settings, *where], 2, "expected one of the two")


@pytest.mark.parametrize("batch", ["²", "0", "two", "-1", "9" * 5000])
def test_batches_that_are_no_numbers(batch):
    ends(["ops", "--device", "cpu", "--batch", batch], 2, "--batch", runner=bench)


@pytest.mark.parametrize("command", [["flops"], ["generate", "a star", "--model", "{model}", "--output", "{out}"]])
def test_sizes_beyond_any_picture(model, tmp_path, command):
    named = [each.format(model=model, out=tmp_path) for each in command]
    ends([*named, "--size", "8000000"], 2, "--size", "expected sides of at most 32768 pixels")


@pytest.mark.parametrize(
    ("name", "message"), [("ATEDM_BACKEND", "ATEDM_BACKEND is 'nonsense'"), ("ATEDM_CPU", "ATEDM_CPU is 'nonsense'")]
)
def test_variables_of_the_environment(tmp_path, name, message):
    """In a process of their own, which has chosen nothing before."""
    words = [sys.executable, "-m", "atedm", "demo", "--output", str(tmp_path)]
    done = subprocess.run(words, env={**os.environ, name: "nonsense"}, capture_output=True, text=True)
    if name == "ATEDM_CPU" and native.why_not() is not None:
        pytest.skip("the native library is not built here")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(""),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=["device", "Python", "CPU"],
)
def test_memory_that_is_not_there(small, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(comparison, "compare", fail)
    ends(["demo", "--output", tmp_path], 1, "Error: out of memory")


def test_square_brackets_in_names_are_no_markup(tmp_path, capsys):
    rows = [{"name": "[/red] a", "seconds_per_call": 1.0, "undisturbed_seconds_per_call": 1.0, "speedup": 1.0}]
    path = tmp_path / "[bold]x[/].json"
    found = comparison.Comparison(rows, files=[tmp_path / "[/]y.png"])
    comparison.write_report(found, torch.device("cpu"), {}, path, "[red]title[/blue]", "slow")
    printed = capsys.readouterr().out
    for text in ("[/red] a", "[red]title[/blue]", "[/]y.png", "[bold]x[/].json"):
        assert text in printed
    assert path.is_file() and report.cell("[/]") == "[/]"


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "another variant"])
def test_damaged_weights_are_not_answered_with_pickles(model, tmp_path, part, damage):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (file,) = (folder / part).glob("*.safetensors")
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:2000])
    elif damage == "missing":
        file.unlink()
        (folder / "vae" / "diffusion_pytorch_model.bin").touch()  # of a part that is not missing
    else:
        shutil.copy(file, file.with_suffix(".fp16.safetensors"))
    more = ["--variant", "fp"] if damage == "another variant" else []
    words = ["generate", "a star", "--model", folder, "--output", tmp_path / "out", *more]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 2 and "cannot be loaded" in done.stderr
    assert "--allow-pickled" not in done.stderr


def test_a_variant_beside_a_file_without_an_ending(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "unet" / "LICENSE").touch()
    words = ["generate", "a star", "--model", tmp_path / "model", "--variant", "fp16", "--output", tmp_path / "out"]
    ends(words, 2, "--variant", "LICENSE has no ending")


def test_an_id_that_is_not_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments = ["generate", "a star", "--model", "nobody/nothing-of-this-name", "--output", tmp_path]
    ends(arguments, 2, "nobody/nothing-of-this-name cannot be loaded", "give a folder, or download it")


def test_a_library_that_is_cut_off_is_not_loaded(tmp_path):
    if native.why_not() is not None:
        pytest.skip("the native library is not built here")
    whole = native.PATH.read_bytes()
    assert native._is_whole(native.PATH)
    for size in (4, 10, 63, 64, 4096, len(whole) // 2, len(whole) - 1):
        cut = tmp_path / "cut.so"
        cut.write_bytes(whole[:size])
        assert not native._is_whole(cut), size
    package = tmp_path / "package"
    shutil.copytree(Path(native.__file__).parent, package / "atedm_kernels")
    (package / "atedm_kernels" / native.PATH.name).write_bytes(whole[: len(whole) // 2])
    code = "from atedm_kernels import native; print(native.__file__); print(native.why_not())"
    environment = {**os.environ, "PYTHONPATH": str(package)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(package) in done.stdout and "is truncated: reinstall it" in done.stdout


BROKEN = {
    "empty": ("unet/config.json", ""),
    "null": ("unet/config.json", "null"),
    "unknown blocks": ("unet/config.json", {"down_block_types": ["Nope", "Nope"]}),
    "negative": ("unet/config.json", {"in_channels": -1}),
    "heads that do not fit": ("unet/config.json", {"attention_head_dim": 7}),
    "other inputs": ("unet/config.json", {"class_embed_type": "timestep"}),
    "no index": ("model_index.json", "{"),
    "beyond 64 bits": ("unet/config.json", {"in_channels": 2**61}),
    "autoencoder": ("vae/config.json", {"block_out_channels": 5}),
    "scheduler": ("scheduler/scheduler_config.json", {"num_train_timesteps": "x"}),
    "tokenizer": ("tokenizer/tokenizer_config.json", "["),
    "text encoder": ("text_encoder/config.json", {"hidden_size": -3}),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_configuration(model, tmp_path, broken):
    name, change = BROKEN[broken]
    folder = tmp_path / "broken"
    shutil.copytree(model, folder)
    if isinstance(change, dict):
        change = json.dumps({**json.loads((folder / name).read_text()), **change})
    (folder / name).write_text(change)
    paint = ["generate", "a star", "--size", "64", "--steps", "1", "--device", "cpu", "--output", tmp_path / "out"]
    ends([*paint, "--model", folder], 2, "--model", str(folder))
    if name.startswith("unet"):
        ends(["flops", "--model", folder], 2, "--model")
        ends(["unet", "--model", folder, "--device", "cpu"], 2, "--model", runner=bench)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["--levels", "9" * 5000], "--levels"),
        (["--batch", "100000000000000"], "--batch"),
        (["--tokens", "1" + "0" * 23], "--tokens"),
        (["--steps", "1" + "0" * 30], "--steps"),
    ],
    ids=["levels", "batch", "tokens", "steps"],
)
def test_numbers_beyond_all_that_is_computed(arguments, option):
    ends(["flops", *arguments], 2, option)


def test_more_pictures_than_any_memory_holds(tmp_path):
    ends(["overview", "--images", 10**15, "--output", tmp_path / "x.png"], 2, "--images", runner=bench)
    ends(["quality", "--images", 10**15, "--output", tmp_path], 2, "--images", runner=bench)
    ends(["demo", "--images", 10**15, "--output", tmp_path], 2, "--images")
    ends(["unet", "--device", "cpu", "--batch", 10**30, "--json", tmp_path / "x.json"], 2, "--batch", runner=bench)


def test_more_steps_than_a_scheduler_has(model, tmp_path):
    own = tmp_path / "model"
    shutil.copytree(model, own)
    for file, change in {
        "model_index.json": {"scheduler": ["diffusers", "DDIMScheduler"]},
        "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler"},
    }.items():
        (own / file).write_text(json.dumps(json.loads((own / file).read_text()) | change))
    (tmp_path / "prompts.txt").write_text("a star\n")
    for what in (["a star"], ["--prompts", tmp_path / "prompts.txt"]):
        words = ["generate", *what, "--model", own, "--dtype", "fp32", "--output", tmp_path / "out"]
        ends([*words, "--size", 64, "--steps", 1001], 2, "--steps", "cannot be larger than")
    assert not list((tmp_path / "out").iterdir())


def test_a_prompt_that_is_no_text(model, tmp_path):
    words = ["generate", "--model", model, "--output", tmp_path]
    ends([*words, "c\udcff"], 2, "PROMPT", "is not UTF-8 text")
    ends([*words, "a star", "--negative-prompt", "c\udcff"], 2, "--negative-prompt", "is not UTF-8 text")


@pytest.mark.parametrize("name", ["absent.txt", "folder"])
def test_a_file_of_prompts_that_is_none(tmp_path, name):
    (tmp_path / "folder").mkdir()
    given = ["generate", "--model", "absent/model", "--prompts", tmp_path / name, "--output", tmp_path / "out"]
    ends(given, 2, "--prompts")


def test_a_single_picture_leaves_the_figures_of_a_run(model, small, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    ends(["generate", "a star", "--model", model, "--output", tmp_path], 2, "--output", "expected another folder")
    ends(["demo", "--output", tmp_path], 2, "--output", "expected another folder")


def test_figures_go_where_the_roofline_does_not(tmp_path):
    figures = ["ops", "--device", "cpu", "--json", tmp_path / "same.png"]
    ends(figures, 2, "--json", "where the roofline goes", runner=bench)
    assert not list(tmp_path.iterdir())


def test_the_roofline_goes_where_it_can(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.png").symlink_to("same.png")
    for plot, option in {"same.png": "--json", "link.png": "--json", ".": "--plot", "run.json": "--plot"}.items():
        ends(["ops", "--device", "cpu", "--json", tmp_path / "same.png", "--plot", plot], 2, option, runner=bench)


def test_a_recipe_that_is_none(tmp_path):
    for text in ("a: [", "[]", "unet: 3", "\x00"):
        (tmp_path / "recipe.yaml").write_text(text)
        for command in (["run"], ["export", "--to", tmp_path / "to"]):
            words = [*command, "--out", tmp_path / "out", "--config", tmp_path / "recipe.yaml"]
            ends(["train", *words], 2, "holds no recipe", runner=bench)
    ends(["train", "export", "--out", tmp_path / "out", "--to", tmp_path / "to"], 1, "Error: ", runner=bench)


def test_training_that_cannot_be(tmp_path):
    out = tmp_path / "out"
    ends(["train", "run", "--out", out, "--precision", "foo"], 2, "--precision", "bf16, fp16, no", runner=bench)
    if not torch.cuda.is_available():
        ends(["train", "run", "--out", out, "--precision", "fp16"], 2, "--precision", "needs a GPU", runner=bench)
    for option in ("--threads", "--workers"):
        ends(["train", "run", "--out", out, option, 10**12], 2, option, runner=bench)
    ends(["train", "run", "--out", "/proc/x", "vae"], 2, "--out", "cannot write to /proc/x", runner=bench)
    ends(["train", "record", tmp_path / "absent", "--to", tmp_path / "x.json"], 1, "absent", runner=bench)
    ends(["train", "checker", "--out", "/proc/x/c.safetensors"], 2, "--out", "/proc/x", runner=bench)
    ends(["train", "checker", "--out", os.devnull], 2, "--out", "is no regular file", runner=bench)
    ends(["train", "checker", "--out", "."], 2, "--out", "is a folder", runner=bench)
    ends(["train", "checker", "--out", out / "c.json"], 2, "--out", "is the file for the figures", runner=bench)
    ends(["train", "record", tmp_path, "--to", tmp_path], 2, "--to", "is a folder", runner=bench)


@pytest.mark.parametrize("to", ["out", "out/unet", ".", "other", "file"])
def test_an_export_replaces_nothing_but_a_model(tmp_path, to):
    (tmp_path / "out" / "unet").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for name in ("out/unet/checkpoint", "other/thesis.txt", "file"):
        (tmp_path / name).write_text("mine")
    ends(["train", "export", "--out", tmp_path / "out", "--to", tmp_path / to], 2, "--to", "expected", runner=bench)
    kept = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert kept == {"out/unet/checkpoint", "other/thesis.txt", "file"}


KEPT = [
    *("run.json", "times.json", "unet-seconds.json", "pruned/00000.png", "pruned.png", "explain.html"),
    *("pruned/00000.kinds.json", "pruned", "full"),
]


@pytest.mark.parametrize("name", KEPT)
def test_figures_never_take_the_place_of_what_a_run_keeps(model, tmp_path, name):
    (tmp_path / "prompts.txt").write_text("a star\n")
    for what in (["a star"], ["--prompts", tmp_path / "prompts.txt"]):
        words = ["generate", *what, "--model", model, "--size", "64", "--steps", "1", "--output", tmp_path / "out"]
        words += ["--json", tmp_path / "out" / name]
        ends(words, 2, "--json", "would take the place of" if "." in name else "expected one with an ending")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "prompts.txt"]


@pytest.mark.parametrize("kept", ["run.json", "times.json"])
@pytest.mark.parametrize("link", ["comparison.json", "../link.json"])
def test_figures_never_take_the_place_of_a_record_through_a_link(model, tmp_path, kept, link):
    out = tmp_path / "out"
    out.mkdir()
    (out / kept).write_text("mine")
    (out / link).symlink_to(out / kept)
    (tmp_path / "prompts.txt").write_text("a star\n")
    words = ["generate", "--prompts", tmp_path / "prompts.txt", "--model", model, "--output", out]
    words += ["--size", "64", "--steps", "1"]  # in case it draws
    ends([*words, *([] if link == "comparison.json" else ["--json", out / link])], 2, "--json", "take the place of")
    assert (out / kept).read_text() == "mine"


def test_figures_never_take_the_place_of_a_models_configuration(model, tmp_path):
    own = tmp_path / "model"
    shutil.copytree(model / "unet", own / "unet")
    config = own / "unet" / "config.json"
    before = config.read_bytes()
    for command, runner in ((["unet", "--device", "cpu", "--size", "64"], bench), (["flops"], app)):
        ends([*command, "--model", own, "--json", config], 2, "--json", "what is read from", runner=runner)
    assert config.read_bytes() == before


def test_figures_beside_the_labs_rows_are_checked_too(tmp_path):
    (tmp_path / "rows-claims.json").mkdir()
    words = ["quality", "--device", "cpu", "--quick", "--output", tmp_path / "out", "--json", tmp_path / "rows.json"]
    ends(words, 2, "--json", "rows-claims.json is a folder", runner=bench)


def test_figures_beside_a_pipe_go_into_the_folder(tmp_path):
    request = session.LabRequest(out=tmp_path / "out", json=Path(os.devnull))
    assert {path.parent for path in session.figures_beside(request)} == {tmp_path / "out"}
    request = session.LabRequest(out=tmp_path / "out", json=tmp_path / "rows.json")
    assert {path.parent for path in session.figures_beside(request)} == {tmp_path}


@pytest.mark.parametrize("name", ["loop", "n" * 300])
def test_names_that_lead_nowhere(tmp_path, name):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    ends(["flops", "--json", tmp_path / name], 2, "--json", "cannot write to")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "loop").symlink_to(tmp_path / "out" / "loop")
    ends(["demo", "--output", tmp_path / "out"], 2, "--output")
    ends(["demo", "--output", tmp_path / "out" / name], 2, "--output", "cannot write to")
    ends(["train", "export", "--out", tmp_path / "x", "--to", tmp_path / name], 2, "--to", runner=bench)


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "n" * 300], ids=["home", "long"])
def test_models_that_no_file_system_could_hold(tmp_path, name):
    ends(["generate", "a star", "--model", name, "--output", tmp_path], 2, "--model", "cannot read")
    ends(["flops", "--model", name], 2, "--model", "cannot read")
    ends(["unet", "--device", "cpu", "--model", name], 2, "--model", "cannot read", runner=bench)


def test_names_that_the_lab_cannot_read(model, tmp_path):
    (tmp_path / "prompts.txt").write_text("a star\n")
    lab = ["quality", "--device", "cpu", "--model", model]
    ends([*lab, "--prompts", "n" * 300], 2, "--prompts", "cannot read", runner=bench)
    ends([*lab, "--prompts", tmp_path / "prompts.txt", "--references", "n" * 300], 2, "--references", runner=bench)
    ends(["quality", "--try", "a=" + "[" * 100_000], 2, "--try", runner=bench)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"grid": 10**30}, "grid is"),
        ({"tolerance": 10**400}, "tolerance is"),
        ({"tolerance": 1e39}, "tolerance is"),
        ({"schedule": {"name": "Adaptive", "tolerance": 10**400}}, "tolerance is"),
    ],
    ids=["grid", "tolerance", "tolerance beyond float32", "tolerance of a schedule"],
)
def test_options_beyond_all_numbers(tmp_path, options, named):
    (tmp_path / "options.json").write_text(json.dumps(options))
    ends(["flops", "--options", tmp_path / "options.json"], 2, "--options", named)


def test_a_batch_beyond_all_memory(model):
    ends(["flops", "--model", model, "--size", "32768", "--batch", "65536"], 2, "larger than any memory")


def test_a_backend_that_the_device_lacks(small, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("ATEDM_BACKEND", "triton")
    ends(["demo", "--preset", "paper", "--output", tmp_path], 2, "ATEDM_BACKEND", "triton serves CPU tensors only")
    ends(["overview", "--output", tmp_path / "x.png"], 2, "ATEDM_BACKEND", runner=bench)


def test_a_models_text_does_not_control_the_terminal(model, tmp_path):
    own = tmp_path / "model"
    shutil.copytree(model, own)
    for file in (own / "model_index.json", own / "unet" / "config.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": "\x1b]0;title\x07"}))
    for command in (["generate", "a star", "--output", tmp_path / "out"], ["flops"]):
        done = CliRunner().invoke(app, [str(each) for each in [*command, "--model", own]])
        assert done.exit_code == 2 and "\\x1b]0;title\\x07" in done.stderr
        assert not set(done.stderr) & {"\x1b", "\x07"}


@pytest.mark.parametrize(
    "error",
    [
        *(MemoryError(), OSError(12, "Cannot allocate memory")),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_for_a_model_is_no_wrong_model(model, tmp_path, monkeypatch, error):
    def load(*args, **kwargs):
        raise error

    monkeypatch.setattr("diffusers.StableDiffusionXLPipeline.from_pretrained", load)
    ends(["generate", "a star", "--model", model, "--output", tmp_path], 1, "out of memory")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_no_traceback(tmp_path):
    ends(["doctor", "--json", "/dev/full"], 1, "No space left on device")


def test_a_terminal_that_shows_few_letters(model):
    words = [sys.executable, "-m", "atedm", "flops", "--model", str(model), "--size", "64"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "?" in done.stdout  # such as the lines of the table
