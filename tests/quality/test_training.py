"""The training of the embedded model, at a size that takes seconds: all stages, a resumed run, the export."""

import contextlib
import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load_file
from typer.testing import CliRunner

from atedm_bench.cli import app
from atedm_bench.training import config as recipe
from atedm_bench.training import loop
from atedm_bench.training.data import draw, generator, pictures
from atedm_bench.training.export import export
from atedm_bench.training.text import train_text
from atedm_bench.training.unet import load_average, train_unet
from atedm_bench.training.vae import train_vae

TINY = Path(__file__).with_name("tiny.yaml")


def shortened(config, images):
    """``config`` stopped after ``images`` images of its first phase."""
    first = dataclasses.replace(config.unet.phases[0], images=images)
    return dataclasses.replace(config, unet=dataclasses.replace(config.unet, phases=(first,)))


def train(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    config = recipe.load(TINY)
    for stage in (train_vae, train_text, train_unet):
        torch.manual_seed(0)
        stage(config, folder, Accelerator(cpu=True, mixed_precision="no"))
    return config, folder


def test_export_is_a_half_precision_pipeline_that_follows_its_prompt(trained, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    config, folder = trained
    counter = export(config, folder, tmp_path / "pipe")
    assert (counter.step, counter.images) == (4, 16)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        files = list((tmp_path / "pipe" / part).glob("*.safetensors"))
        assert files
        assert {t.dtype for t in load_file(files[0]).values() if t.is_floating_point()} == {torch.float16}
    configs = [file.read_text() for file in (tmp_path / "pipe").rglob("*.json")]
    assert configs and not any(str(tmp_path.parent) in text or str(folder) in text for text in configs)
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "pipe", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def latents(prompt):
        generator = torch.Generator().manual_seed(0)
        return pipe(prompt, num_inference_steps=3, generator=generator, guidance_scale=5.0, output_type="latent").images

    first = latents("a red circle")
    assert first.shape == (1, 4, 16, 16)
    assert first.isfinite().all()
    assert torch.equal(first, latents("a red circle"))
    assert not torch.equal(first, latents("a blue star"))


def test_vae_scaling_factor_gives_unit_variance(trained):
    _, folder = trained
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    found, _ = draw(generator(123), 32)
    with torch.no_grad():
        latents = vae.encode(pictures(found, 64)).latent_dist.mean * vae.config.scaling_factor
    assert float(latents.std()) == pytest.approx(1.0, rel=0.2)


def test_resumed_run_ends_where_an_uninterrupted_one_does(trained, tmp_path):
    config, folder = trained
    whole, _ = load_average(config, folder)
    for part in ("vae", "text_encoder", "text_encoder_2", "tokenizer"):
        shutil.copytree(folder / part, tmp_path / part)
    torch.manual_seed(0)
    train_unet(shortened(config, 8), tmp_path, Accelerator(cpu=True, mixed_precision="no"))
    torch.manual_seed(1)  # a resumed run is a new process
    train_unet(config, tmp_path, Accelerator(cpu=True, mixed_precision="no"))
    resumed, counter = load_average(config, tmp_path)
    assert counter.images == 16
    for name, parameter in whole.state_dict().items():
        # The learning rate warms up anew.
        torch.testing.assert_close(resumed.state_dict()[name], parameter, rtol=0, atol=5e-3, msg=name)


def test_the_log_tells_steps_images_and_loss(trained, monkeypatch, tmp_path):
    monkeypatch.setattr(loop, "_NOTE_SECONDS", 0.0)
    config, _ = trained
    train_vae(config, tmp_path, Accelerator(cpu=True, mixed_precision="no"))
    rows = [json.loads(line) for line in (tmp_path / "vae-training" / loop.LOG).read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["images"] for row in rows] == [4, 8, 12]
    assert all(row["error"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  ema_decay: 0.9\n", "", "unet and the recipe's form differ in ema_decay"),
        ("ema_decay: 0.9", "ema_decay: .nan", "unet.ema_decay is nan; expected a number such as 2.0e-3, at least 0"),
        ("steps: 3, batch: 4", "steps: x, batch: 4", "vae.steps is 'x'; expected a whole number, at least 1"),
        ("steps: 3, batch: 4", "steps: 3, batch: 0", "vae.batch is 0; expected a whole number, at least 1"),
        ("depth: [1, 1, 2]", "depth: [1, 1]", "unet.depth is [1, 1]; expected a list of 3 values"),
        (
            "seed: 0",
            "seed: 18446744073709551616",
            "seed is 18446744073709551616; expected a whole number, at least 0, at most",
        ),
        ("latent: 16", "latent: true", "unet.phases[1].latent is True; expected a whole number"),
        ("[8, 8, 8]", "8", "vae.channels is 8; expected a list of one or more values"),
        ("[8, 8, 8]", "[8, 12, 8]", "vae.channels is [8, 12, 8]; expected multiples of 8"),
        ("[32, 32]", "[32, 40]", "text.widths is [32, 40]; expected multiples of 32"),
        ("crop: 32", "crop: 30", "vae.crop is 30; expected multiples of 4"),
        ("crop: 32", "crop: 64", "vae.sizes is [32, 64]; expected at least vae.crop, 64"),
        ("norm_groups: 4", "norm_groups: 3", "unet.channels is [8, 16, 16]; expected multiples of 3"),
        ("head_dim: 8", "head_dim: 5", "unet.channels[1:] is [16, 16]; expected multiples of 5"),
        ("sample_size: 16", "sample_size: 18", "unet.sample_size is 18; expected multiples of 4"),
        ("latent: 16", "latent: 10", "unet.phases[1].latent is 10; expected multiples of 4"),
        ("dropout: 0.1", "dropout: 1.1", "unet.caption_dropout is 1.1; expected a fraction, at most 1"),
        ("uniform_timesteps: 0.25", "uniform_timesteps: 2", "unet.uniform_timesteps is 2; expected a fraction"),
        ("ema_decay: 0.9", "ema_decay: 1", "unet.ema_decay is 1; expected below 1"),
    ],
)
def test_recipe_names_what_is_wrong(tmp_path, old, new, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(TINY.read_text().replace(old, new))
    with pytest.raises(ValueError, match=re.escape(message)):
        recipe.load(path)


def test_a_recipe_nested_too_deeply_is_a_usage_error(tmp_path):
    (tmp_path / "recipe.yaml").write_text("[" * 500)
    done = train("run", "--out", tmp_path / "out", "--config", tmp_path / "recipe.yaml")
    assert done.exit_code == 2 and "--config" in done.stderr


def test_the_committed_recipe_is_well_formed():
    config = recipe.load()
    assert config.unet.sample_size == config.unet.phases[-1].latent
    assert config.unet.depth[2] >= 4


def test_record_follows_the_steps_that_counted(trained, tmp_path):
    from atedm_bench.training.record import lineage, record

    notes = [{"step": n, "loss": 1.0 * n} for n in (1, 2, 5, 3, 4)]
    assert [note["step"] for note in lineage(notes, 4)] == [1, 2, 3, 4]
    assert [note["step"] for note in lineage(notes, 3)] == [1, 2, 3]
    _, folder = trained
    document = record([folder])
    assert [stage["stage"] for stage in document["stages"]] == [
        "autoencoder",
        "text encoders",
        "UNet and text encoders",
    ]
    unet = document["stages"][-1]
    assert (unet["steps"], unet["images"]) == (4, 16)
    assert all({"images", "loss", "layout"} == set(point) for point in unet["curve"])
    with pytest.raises(FileNotFoundError, match="no log"):
        record([tmp_path])


@pytest.fixture
def interrupted(trained, tmp_path):
    """The folder of a training that was killed."""
    shutil.copytree(trained[1] / "vae-training", tmp_path / "run" / "vae-training")
    return tmp_path / "run" / "vae-training"


def test_a_log_is_read_up_to_where_a_run_was_killed(interrupted):
    from atedm_bench.training.record import record

    log = interrupted / loop.LOG
    note = {"step": 3, "images": 12, "seconds": 1.0, "error": 0.5}
    for text, count in (("", 0), ('{"step": 2, "ima', 0), (json.dumps(note) + '\n{"step": 4, "ima', 1)):
        log.write_text(text)
        (stage,) = record([interrupted.parent])["stages"]
        assert len(stage["curve"]) == count and stage["steps"] == 3


def test_the_log_and_the_record_are_strict_json(trained, interrupted, monkeypatch):
    from atedm_bench.training.record import record

    def refuse(constant):
        raise ValueError(constant)

    monkeypatch.setattr(loop, "_NOTE_SECONDS", 0.0)
    losses = iter([math.nan, math.inf, 0.5])
    stage = loop.Stage(Saves(), interrupted, "stage")
    stage.folder.joinpath(loop.LOG).unlink()
    stage.run(3, lambda counter: (1, {"error": next(losses)}))
    lines = stage.folder.joinpath(loop.LOG).read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse)["error"] for line in lines] == [None, None, 0.5]
    shutil.copytree(trained[1] / "vae-training" / "checkpoint", interrupted / "checkpoint", dirs_exist_ok=True)
    (found,) = record([interrupted.parent])["stages"]
    assert [point["error"] for point in found["curve"]] == [None, None, 0.5]


@pytest.mark.parametrize("text", ["5\n", "{}\n", '{"step": "x"}\n', "\xff\n"])
def test_a_log_that_is_none_is_named(interrupted, text):
    (interrupted / loop.LOG).write_bytes(text.encode("latin1"))
    done = train("record", interrupted.parent, "--to", interrupted.parent.parent / "record.json")
    assert done.exit_code == 1 and f"{interrupted} cannot be loaded" in done.stderr


@pytest.mark.parametrize("name", ["custom_checkpoint_0.pkl", "model.safetensors"])
def test_a_damaged_checkpoint_is_named(interrupted, name):
    file = interrupted / "checkpoint" / name
    file.write_bytes(file.read_bytes()[:300])
    folder = interrupted.parent
    done = train("run", "--out", folder, "--precision", "no", "--config", TINY, "vae")
    assert done.exit_code == 1 and f"{file.parent} cannot be loaded" in done.stderr
    if name.startswith("custom"):
        done = train("record", folder, "--to", folder.parent / "record.json")
        assert done.exit_code == 1 and f"{file} cannot be loaded" in done.stderr


@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        ("--out", ["checker", "--out", "{folder}/weights.json"]),
        ("--out", ["checker", "--out", "{folder}"]),
        ("--out", ["checker", "--out", "."]),
        ("--out", ["checker", "--out", "{folder}/run.safetensors"]),
        ("--to", ["record", "runs", "--to", "{folder}"]),
        ("--to", ["export", "--out", "runs", "--to", "{folder}/loop"]),
        ("--to", ["export", "--out", "runs", "--to", "{folder}/" + "n" * 300]),
    ],
)
def test_a_place_that_cannot_be_written_is_blamed_on_its_option(tmp_path, option, arguments):
    (tmp_path / "loop").symlink_to("loop")
    done = train(*(each.format(folder=tmp_path) for each in arguments))
    assert done.exit_code == 2 and f"Invalid value for {option}:" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


class Saves:
    """Saves a checkpoint in two parts, as accelerate does, or is killed between them."""

    is_main_process, num_processes = True, 1

    def __init__(self):
        self.is_killed = False

    def register_for_checkpointing(self, counter):
        pass

    def wait_for_everyone(self):
        pass

    def save_state(self, folder):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, "model").touch()
        if self.is_killed:
            raise KeyboardInterrupt
        Path(folder, "optimizer").touch()


def test_a_full_disk_is_named_when_a_checkpoint_is_saved(tmp_path, monkeypatch):
    stage, full = loop.Stage(Saves(), tmp_path, "stage"), SafetensorError("No space left on device (os error 28)")
    monkeypatch.setattr(stage.accelerator, "save_state", lambda _: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match=r"checkpoint cannot be written: No space left"):
        stage.save()


def test_a_complete_checkpoint_stays_however_often_a_save_is_interrupted(tmp_path):
    saves = Saves()
    stage = loop.Stage(saves, tmp_path, "stage")
    for is_killed in (False, True, True, False, False, True):
        saves.is_killed = is_killed
        with pytest.raises(KeyboardInterrupt) if is_killed else contextlib.nullcontext():
            stage.save()
        assert (loop.newest_checkpoint(tmp_path) / "optimizer").is_file()
        assert (loop.newest_checkpoint(tmp_path).name == "checkpoint") is not is_killed
