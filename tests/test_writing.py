"""Where files go: whole, beside what is there, into what cannot be replaced, and over nothing that a run reads."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from atedm.app import report
from atedm.cli import app
from atedm.files import whole_file, whole_folder
from atedm_bench.cli import app as bench


def write(path, text):
    with whole_file(Path(path)) as partial:
        partial.write_text(text)


def test_a_links_target_is_replaced_and_keeps_its_mode(tmp_path):
    target, link, dangling = (tmp_path / name for name in ("target", "link", "dangling"))
    target.write_text("before")
    target.chmod(0o600)
    link.symlink_to(target.name)
    dangling.symlink_to("later")
    write(link, "after")
    write(dangling, "new")
    assert link.is_symlink() and target.read_text() == "after" and target.stat().st_mode & 0o777 == 0o600
    assert dangling.is_symlink() and (tmp_path / "later").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 4


def test_a_file_with_the_same_content_stays_as_it_is(tmp_path):
    file = tmp_path / "file"
    for text, is_kept in (("before", False), ("before", True), ("after!", False)):
        before = file.stat().st_ino if file.exists() else None
        write(file, text)
        assert (file.stat().st_ino == before) is is_kept and file.read_text() == text
    assert [*tmp_path.iterdir()] == [file]


def test_a_pipe_and_a_device_are_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_text)
        write(pipe, "through")
        assert read.result() == "through"
    write("/dev/null", "gone")
    assert pipe.is_fifo() and Path("/dev/null").is_char_device()


PRINTS = """
from pathlib import Path
from atedm.files import whole_file
with whole_file(Path("/dev/stdout")) as partial:
    partial.write_text("figures\\n")
print("table")
"""


@pytest.mark.parametrize("how", ["pipe", "file"])
def test_the_standard_output_is_written_to_where_it_stands(tmp_path, how):
    with (tmp_path / "out").open("w") as file:
        done = subprocess.run(
            [sys.executable, "-c", PRINTS], stdout=file if how == "file" else subprocess.PIPE, text=True, check=True
        )
    assert ((tmp_path / "out").read_text() if how == "file" else done.stdout) == "figures\ntable\n"


def test_two_runs_that_write_one_file_do_not_meet(tmp_path):
    path, both = tmp_path / "figures.json", threading.Barrier(2)

    def run(n):
        with whole_file(path) as partial:
            partial.write_text(str(n) * 100)
            both.wait(60)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, (1, 2)))
    assert path.read_text() in ("1" * 100, "2" * 100)
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_keeps_its_mode_and_does_not_replace_a_file(tmp_path):
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    folder.chmod(0o2770)
    file.write_text("before")
    with whole_folder(folder) as partial:
        (partial / "new").touch()
    assert folder.stat().st_mode & 0o7777 == 0o2770 and (folder / "new").exists()
    with pytest.raises(NotADirectoryError, match="file"), whole_folder(file):
        pass
    assert file.read_text() == "before" and {path.name for path in tmp_path.iterdir()} == {"folder", "file"}


def test_a_folder_is_put_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    folder, rename = tmp_path / "folder", Path.rename
    folder.mkdir()
    (folder / "old").touch()

    def stopped(path, target):
        if path.suffix == ".partial":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt), whole_folder(folder) as partial:
        (partial / "new").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["folder", "folder/old"]


@pytest.fixture
def full_disk():
    """A disk on which no file grows beyond 4 KB."""
    resource, before = pytest.importorskip("resource"), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("write", [save_file, torch.save])
@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_a_full_disk_is_an_error_of_the_file_whatever_library_writes(tmp_path, full_disk, write, whole):
    tensors, path = {"weight": torch.zeros(10000)}, tmp_path / "weights"
    with pytest.raises(OSError, match=f"{path} cannot be written"), whole(path) as partial:
        write(tensors, partial if whole is whole_file else partial / "model")
    assert not list(tmp_path.iterdir())


def test_figures_are_strict_json(tmp_path):
    rows = [{"name": "a", "psnr_db": math.inf, "more": {"nan": math.nan, "list": (1.5, -math.inf)}}]
    report.write_json({"rows": rows}, tmp_path / "figures.json")

    def refuse(constant):
        raise ValueError(constant)

    found = json.loads((tmp_path / "figures.json").read_text(), parse_constant=refuse)
    assert found == {"rows": [{"name": "a", "psnr_db": None, "more": {"nan": None, "list": [1.5, None]}}]}


class Closed:
    """A terminal that takes nothing: a pipe whose reader has left, or one for another alphabet."""

    encoding = "ascii"

    def __init__(self, error, null):
        self.error, self.null = error, null

    def write(self, text):
        raise self.error

    def flush(self):
        pass

    def fileno(self):
        return self.null

    def isatty(self):
        return False


SMALL = {
    "sample_size": 16,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [32, 64],
    "transformer_layers_per_block": 1,
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 32,
    "layers_per_block": 1,
    "_class_name": "UNet2DConditionModel",
}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SMALL))
    return tmp_path / "model"


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), UnicodeEncodeError("ascii", "×", 0, 1, "no")])
def test_figures_are_written_before_anything_is_printed(model, tmp_path, monkeypatch, error):
    from atedm.cli.flops import flops

    file = tmp_path / "figures.json"
    with open(os.devnull, "w") as null:
        monkeypatch.setattr(sys, "stdout", Closed(error, null.fileno()))
        with pytest.raises((type(error), SystemExit)):
            flops(str(model), size="128", placement="early", steps=2, json=file)
    assert json.loads(file.read_text())["rows"]


@pytest.mark.parametrize(
    ("runner", "arguments"),
    [
        (app, ["flops", "--model", "{model}", "--json", "{model}/config.json"]),
        (app, ["flops", "--options", "{prompts}", "--json", "{prompts}"]),
        (app, ["generate", "--prompts", "{prompts}", "--model", "{model}", "--output", "{out}", "--json", "{link}"]),
        (app, ["generate", "a star", "--model", "{model}", "--output", "{out}", "--json", "{model}/new.json"]),
        (app, ["demo", "--output", "{out}", "--json", "{out}/run.json"]),
        (app, ["doctor", "--json", "{out}/run.json"]),
        (
            bench,
            ["quality", "--model", "{model}", "--prompts", "{prompts}", "--references", "{out}", "--json", "{out}/x"],
        ),
        (bench, ["ops", "--device", "cpu", "--json", "{out}"]),
        (bench, ["unet", "--device", "cpu", "--json", "{out}"]),
    ],
)
def test_figures_go_over_nothing_that_a_run_reads(model, tmp_path, runner, arguments):
    names = {name: tmp_path / name for name in ("model", "prompts", "out", "link")}
    names["prompts"].write_text("{}")
    names["link"].symlink_to(names["prompts"])
    names["out"].mkdir()
    before = (names["prompts"].read_text(), (model / "config.json").read_text())
    done = CliRunner().invoke(runner, [each.format(**names) for each in arguments])
    assert done.exit_code == 2, done.output
    assert "--json" in done.stderr and "expected" in done.stderr
    assert before == (names["prompts"].read_text(), (model / "config.json").read_text())
    assert not any(names["out"].iterdir())
