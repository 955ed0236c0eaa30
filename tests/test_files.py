"""Files are written whole or not at all; a full disk is named and loses no finished picture."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import atedm
from atedm.app import prompts as many
from atedm.app import report
from atedm.app.run_record import Times
from atedm.cli import app
from atedm.files import whole_file, whole_folder


@pytest.mark.parametrize("before", [None, "before"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_half_way_changes_nothing(tmp_path, before, error):
    path = tmp_path / "file.txt"
    if before is not None:
        path.write_text(before)
    with pytest.raises(type(error)) as caught, whole_file(path) as partial:
        partial.write_text("half")
        raise error
    assert (path.read_text() if path.exists() else None) == before
    assert [file.name for file in tmp_path.iterdir()] == ([] if before is None else ["file.txt"])
    if isinstance(error, OSError):
        assert str(path) in str(caught.value)
        assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("before", [None, "before"])
def test_a_folder_is_written_whole_or_not_at_all(tmp_path, before):
    folder = tmp_path / "model"
    if before is not None:
        folder.mkdir()
        (folder / "old.txt").write_text(before)
    with pytest.raises(KeyboardInterrupt), whole_folder(folder) as partial:
        (partial / "new.txt").write_text("half")
        raise KeyboardInterrupt
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.txt")] == (
        [] if before is None else ["model/old.txt"]
    )
    with whole_folder(folder) as partial:
        (partial / "new.txt").write_text("whole")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["model", "model/new.txt"]


def test_a_folder_that_cannot_take_its_place_leaves_the_one_before(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir(mode=0o700)
    (folder / "old.txt").touch()
    rename = Path.rename

    def fail(path, to):
        if path.suffix == ".partial":
            raise OSError(errno.EIO, "the disk is gone")
        return rename(path, to)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="the disk is gone"), whole_folder(folder):
            pass
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["model", "model/old.txt"]
    with whole_folder(folder):
        pass
    assert folder.stat().st_mode & 0o777 == 0o700 and not list(folder.iterdir())


def test_a_pipe_is_written_to_where_nothing_can_be_printed(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    monkeypatch.setattr(sys, "stdout", None)
    with whole_file(tmp_path / "pipe") as partial:
        partial.write_text("figures")
    assert os.read(reader, 100) == b"figures"
    os.close(reader)


def test_options_cannot_be_saved_where_there_is_no_folder(tmp_path):
    path = tmp_path / "absent" / "options.json"
    with pytest.raises(FileNotFoundError, match=r"options\.json"):
        atedm.Options().save(path)


class Disk:
    """A disk with room for so many pictures; of the next one it takes a part."""

    def __init__(self, monkeypatch, room):
        self.room, self.save = room, Image.Image.save
        monkeypatch.setattr(Image.Image, "save", lambda image, path, **how: self.write(image, path, how))

    def write(self, image, path, how):
        if self.room == 0:
            path.write_bytes(b"\x89PNG")
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= 1
        self.save(image, path, **how)


@pytest.fixture
def command(model, tmp_path, monkeypatch):
    """Words of a command that draws three pictures, and reports no FLOPs: to count them takes seconds."""
    monkeypatch.setattr(many, "tflops_of", lambda *_: {"full": 2.0, "pruned": 1.0})
    (tmp_path / "prompts.txt").write_text("a red circle\na blue ring\na green star\n")
    sampling = ["--steps", 2, "--size", 64, "--batch", 1, "--dtype", "fp32", "--device", "cpu"]
    prompts = ["--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "out"]
    return [str(word) for word in ["generate", "--model", model, *sampling, *prompts]]


def test_a_full_disk_loses_no_finished_picture(command, tmp_path):
    with pytest.MonkeyPatch.context() as full:
        Disk(full, room=2)
        failed = CliRunner().invoke(app, command)
    third = tmp_path / "out" / "pruned" / "00002.png"
    assert failed.exit_code == 1
    assert "No space left on device" in failed.stderr and third.name in failed.stderr
    made = sorted((tmp_path / "out" / "pruned").iterdir())
    assert [path.name for path in made] == ["00000.png", "00001.png"]
    before = [np.asarray(Image.open(path)) for path in made]
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    assert all(np.array_equal(np.asarray(Image.open(path)), a) for path, a in zip(made, before, strict=True))
    assert third.is_file()


def test_a_damaged_picture_of_an_earlier_run_is_named_and_the_others_stay(command, tmp_path):
    assert CliRunner().invoke(app, command).exit_code == 0
    first, damaged, last = (tmp_path / "out" / "pruned" / f"{n:05d}.png" for n in range(3))
    whole = {path: path.read_bytes() for path in (first, damaged)}
    last.unlink()
    for broken in (whole[damaged][:200], b"", b"no picture", whole[damaged][:-12]):
        damaged.write_bytes(broken)
        failed = CliRunner().invoke(app, command)
        assert failed.exit_code == 1, failed.output
        assert f"{damaged} cannot be read as a picture" in failed.stderr and "delete it" in failed.stderr
        assert damaged.read_bytes() == broken and first.read_bytes() == whole[first] and not last.exists()
    damaged.unlink()
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    assert all(path.read_bytes() == content for path, content in whole.items())
    assert last.is_file()


def everything(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def change_weights(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"][0] += 1
    save_file(tensors, weights, {"format": "pt"})


def change_scheduler(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "beta_start": 0.001}))


def change_words(folder):
    path = folder / "tokenizer_2" / "tokenizer.json"
    found = json.loads(path.read_text())
    words = found["model"]["vocab"]
    first, second = sorted(words)[-2:]
    words[first], words[second] = words[second], words[first]
    path.write_text(json.dumps(found))


def change_merges(folder):
    path = folder / "tokenizer" / "tokenizer.json"
    found = json.loads(path.read_text())
    found["model"]["merges"] = found["model"]["merges"][:20]
    path.write_text(json.dumps(found))


def change_length(folder):
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 40}))


def change_pipeline(folder):
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "force_zeros_for_empty_prompt": not index["force_zeros_for_empty_prompt"]}))


CHANGES = (change_weights, change_scheduler, change_words, change_merges, change_length, change_pipeline)


def test_times_are_kept_picture_by_picture(command, tmp_path, monkeypatch):
    """Whatever ends a run, the next one knows them."""
    seen, note = [], Times.note

    def noted(times, *args):
        seen.append((tmp_path / "out" / "times.json").exists())
        note(times, *args)

    monkeypatch.setattr(Times, "note", noted)
    assert CliRunner().invoke(app, command).exit_code == 0
    assert seen[0] is False and seen[1:] and all(seen[1:])


def test_a_run_goes_on_with_the_same_model_under_any_name_and_with_no_other(command, model, tmp_path, monkeypatch):
    own = tmp_path / "model"
    shutil.copytree(model, own)
    words = [str(own) if word == str(model) else word for word in command]
    assert CliRunner().invoke(app, words).exit_code == 0
    before = everything(tmp_path / "out")
    assert (tmp_path / "out" / "times.json") in before
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(own)
    for name in (str(own), "model", "./model", "link", str(model)):
        again = CliRunner().invoke(app, [name if word == str(own) else word for word in words])
        assert again.exit_code == 0, again.output
        assert everything(tmp_path / "out") == before  # a finished run changes nothing
    for change in CHANGES:
        change(own)
        refused = CliRunner().invoke(app, words)
        assert refused.exit_code == 2 and "another run (weights differ)" in refused.stderr, refused.output
        shutil.rmtree(own)
        shutil.copytree(model, own)
    for path in own.rglob("*model.safetensors"):
        for variant, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):  # the latter has fewer digits
            tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
            save_file(tensors, path.with_suffix(f".{variant}.safetensors"), {"format": "pt"})
    assert CliRunner().invoke(app, [*words, "--variant", "fp32"]).exit_code == 0
    others = {("--variant", "bf16"): "weights", ("--dtype", "bf16"): "weights, dtype", ("--seed", "1"): "cases"}
    for more, what in others.items():
        refused = CliRunner().invoke(app, [*words, *more])
        assert refused.exit_code == 2 and f"another run ({what} differ)" in refused.stderr, refused.output
    assert everything(tmp_path / "out") == before


def test_a_finished_run_changes_nothing_on_another_device(command, tmp_path, monkeypatch):
    """Its report holds the times of the device that drew last, though there are times of both."""
    prompts = tmp_path / "prompts.txt"
    for device, n in (("one", 2), ("two", 3)):
        monkeypatch.setattr(report, "device_name", lambda _, name=device: name)
        prompts.write_text("".join(f"star {place}\n" for place in range(n)))
        assert CliRunner().invoke(app, command).exit_code == 0
    before = everything(tmp_path / "out")
    for device in ("one", "three"):
        monkeypatch.setattr(report, "device_name", lambda _, name=device: name)
        assert CliRunner().invoke(app, command).exit_code == 0
        assert everything(tmp_path / "out") == before
    (tmp_path / "out" / "pruned" / "00000.png").unlink()
    assert CliRunner().invoke(app, command).exit_code == 0
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["rows"][0]["unet_seconds_per_image"] == Times.read(tmp_path / "out", "three").median("pruned")


def test_a_command_names_a_damaged_record(command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("[]")
    failed = CliRunner().invoke(app, command)
    assert failed.exit_code == 2
    assert "run.json" in failed.stderr and "damaged" in failed.stderr


def test_prompts_with_a_byte_order_mark_and_other_line_ends(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa red circle\r\n\r\na blue ring\r\n".encode())
    assert many.read_prompts(tmp_path / "prompts.txt") == ["a red circle", "a blue ring"]
    parts = "\u2028a\x0bstar\x0cand\x1ca\x85ring\u2029\r and more".strip()
    (tmp_path / "prompts.txt").write_bytes(f"a{parts}\nanother\n".encode())
    assert many.read_prompts(tmp_path / "prompts.txt") == [f"a{parts}", "another"]


def truncate(folder):
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def list_for_index(folder):
    (folder / "model_index.json").write_text("[]")


def remove_tokenizer(folder):
    shutil.rmtree(folder / "tokenizer")


def without_first_encoder(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "_class_name": "StableDiffusionXLImg2ImgPipeline",
        "text_encoder": [None, None],
        "tokenizer": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))


def for_inpainting(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": 9}))
    tensors = load_file(weights)
    tensors["conv_in.weight"] = tensors["conv_in.weight"].repeat(1, 3, 1, 1)[:, :9].contiguous()
    save_file(tensors, weights)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (truncate, "cannot be loaded"),
        (list_for_index, "cannot be loaded"),
        (remove_tokenizer, "has an empty tokenizer; expected its files"),
        (without_first_encoder, "has no text_encoder; expected a text-to-image model"),
        (for_inpainting, "has a UNet of 9 channels, its latents have 4; expected a text-to-image model"),
    ],
)
def test_a_model_folder_that_does_not_fit_is_a_usage_error(command, model, tmp_path, damage, expected):
    damaged = tmp_path / "model"
    shutil.copytree(model, damaged)
    damage(damaged)
    command[command.index("--model") + 1] = str(damaged)
    failed = CliRunner().invoke(app, command)
    assert failed.exit_code == 2, (failed.output, failed.exception)
    assert str(damaged) in failed.stderr and expected in failed.stderr
    assert not list((tmp_path / "out").rglob("*.png"))


@pytest.mark.parametrize("output", ["/proc/atedm", "{file}"])
def test_a_folder_that_cannot_be_written_is_refused_at_once(command, tmp_path, output):
    file = tmp_path / "file"
    file.write_text("")
    command[-1] = output.format(file=file)
    failed = CliRunner().invoke(app, command)
    assert failed.exit_code == 2
    assert "cannot write to" in failed.stderr
