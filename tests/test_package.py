"""The packages: what importing them takes, what a wheel holds, and that imports go one way only."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PUBLIC = {
    "atedm_kernels": {
        "attention_column_sums",
        "attention_with_logsumexp",
        "backend",
        "gather_tokens",
        "recover_feature_map",
        "recover_tokens",
        "select_tokens",
        "similarity_source",
        "weighted_page_rank",
        "weighted_page_rank_cross",
    },
    "atedm": {"DSAP", "applied", "apply", "record", "remove"},
}


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_ops_need_no_model_library():
    loaded = run(
        "import torch, sys; before = set(sys.modules); import atedm_kernels; print(*(set(sys.modules) - before))"
    ).split()
    foreign = {name.split(".")[0] for name in loaded} - {"atedm_kernels"} - set(sys.stdlib_module_names)
    assert foreign <= {"torch"}


def test_the_command_line_is_quick_to_ask_for_help():
    assert "torch" not in run("import atedm.cli, sys; print(*sys.modules)").split()


def kept_in(folder, *patterns):
    return {path.relative_to(folder) for pattern in patterns for path in folder.rglob(pattern) if path.is_file()}


def test_the_wheel_holds_the_model_and_the_measurements(tmp_path):
    # What a wheel is packed from, without packing it.
    command = ["egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", tmp_path / "lib"]
    subprocess.run([sys.executable, "setup.py", "-q", *command], cwd=ROOT, capture_output=True, check=True)
    built = tmp_path / "lib" / "atedm"

    model = ROOT / "python" / "atedm" / "embedded"
    assert kept_in(built / "embedded", "*") == kept_in(
        model, "*.py", "README.md", "words.txt", "training.json", "weights/**/*"
    )
    weights = {path.parent.name for path in built.glob("embedded/weights/*/*.safetensors")}
    assert weights == {"text_encoder", "text_encoder_2", "unet", "vae"}

    bench = kept_in(ROOT / "bench", "*.py", "*.yaml", "*.safetensors")
    assert {path.parts[0] for path in bench if len(path.parts) > 1} >= {"cli", "quality", "scenes", "training"}
    assert kept_in(tmp_path / "lib" / "atedm_bench", "*") == bench
    assert {path.name for path in (tmp_path / "lib").iterdir()} == {
        *("atedm", "atedm_bench", "atedm_extras.py", "atedm_kernels")
    }


@pytest.mark.parametrize("package", sorted(PUBLIC))
def test_public_names(package):
    module = __import__(package)
    assert PUBLIC[package] <= set(module.__all__)
    for name in module.__all__:
        value = getattr(module, name)
        assert value.__doc__ if callable(value) else value


# What each package may import of this distribution. Only atedm_kernels loads the library of csrc.
MAY_IMPORT = {
    "atedm_kernels": {"atedm_kernels"},
    "python/atedm": {"atedm_extras", "atedm_kernels", "atedm"},
    "bench": {"atedm_extras", "atedm_kernels", "atedm", "atedm_bench"},
    "csrc": set(),
}
OURS = {"atedm_kernels", "atedm_extras", "atedm", "atedm_bench", "bench", "csrc", "python", "tests"}


def imported(source):
    """Every module that ``source`` imports, or names to ``import_module`` and the like, with what is taken from it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and MODULE_NAME.fullmatch(node.value):
            yield node.value, None


MODULE_NAME = re.compile(r"(atedm|atedm_kernels|atedm_bench)(\.\w+)+")


def against_direction(source, allowed):
    return sorted({m for m, _ in imported(source) if m.split(".")[0] in OURS and m.split(".")[0] not in allowed})


def private_of_others(source, package):
    """Names with an underscore that ``source`` takes from a package of ours which is not ``package``."""
    found = []
    for module, name in imported(source):
        parts = [*module.split("."), *([name] if name else [])]
        if parts[0] in OURS and parts[0] != package:
            found += [".".join(parts) for part in parts if part.startswith("_") and not part.startswith("__")]
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_go_one_way_and_take_what_is_public(folder):
    package = {"bench": "atedm_bench"}.get(folder, folder.split("/")[-1])
    paths = list((ROOT / folder).rglob("*.py"))
    assert paths
    for path in paths:
        source = path.read_text(encoding="utf-8")
        assert not against_direction(source, MAY_IMPORT[folder]), path
        assert not private_of_others(source, package), path
        roots = {module.split(".")[0] for module, _ in imported(source)}
        assert folder != "atedm_kernels" or not roots & {"diffusers", "transformers", "typer", "rich"}, path


def test_an_import_that_runs_back_is_found():
    up = "def f():\n    from atedm_bench.ops import run\n    import atedm.flops as g\n"
    assert against_direction(up, {"atedm_kernels"}) == ["atedm.flops", "atedm_bench.ops"]
    assert against_direction('lazily("atedm.unet", "f")', {"atedm_kernels"}) == ["atedm.unet"]
    assert not against_direction("import atedm_kernels.backends", {"atedm_kernels"})
    assert private_of_others("from atedm_kernels import _checks", "atedm") == ["atedm_kernels._checks"]
    assert not private_of_others("from atedm_kernels import _checks", "atedm_kernels")


COMMANDS = {"atedm": "diffusers", "atedm_bench": "bench"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_without_its_packages_names_the_extra_in_one_line(command):
    code = f"import sys; sys.modules.update(typer=None); import atedm_extras; atedm_extras.{command}()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == f"Error: typer not installed; pip install 'atedm-kernels[{COMMANDS[command]}]'\n"


def test_the_plug_in_without_diffusers_names_the_extra():
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules.update(diffusers=None); import atedm"],
        capture_output=True,
        text=True,
    )
    last = done.stderr.splitlines()[-1]
    assert last == "ModuleNotFoundError: diffusers not installed; pip install 'atedm-kernels[diffusers]'"


def test_no_two_classes_have_one_name():
    names = [
        node.name
        for folder in MAY_IMPORT
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    assert len(names) > 40 and [name for name, count in Counter(names).items() if count > 1] == []
