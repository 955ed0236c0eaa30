"""The two packages: what importing them takes, and that imports go one way only."""

import ast
import subprocess
import sys
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
    assert {path.parts[0] for path in bench if len(path.parts) > 1} >= {"quality", "scenes", "training"}
    assert kept_in(built / "bench", "*") == bench


@pytest.mark.parametrize("package", sorted(PUBLIC))
def test_public_names(package):
    module = __import__(package)
    assert PUBLIC[package] <= set(module.__all__)
    for name in module.__all__:
        value = getattr(module, name)
        assert value.__doc__ if callable(value) else value


@pytest.mark.parametrize(
    ("folder", "allowed"), [("atedm_kernels", {"atedm_kernels"}), ("python/atedm", {"atedm_kernels", "atedm"})]
)
def test_imports_go_one_way(folder, allowed):
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            ours = {name.split(".")[0] for name in names if name.startswith("atedm")}
            assert ours <= allowed, f"{path} imports {names}"
            assert folder != "atedm_kernels" or not any(name.startswith("diffusers") for name in names), path
