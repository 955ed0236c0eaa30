"""The packages: what importing them takes, what a wheel holds, and that imports go one way only."""

import ast
import os
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
        "update_feature_map",
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
        *("atedm", "atedm_bench", "atedm_command.py", "atedm_extras.py", "atedm_kernels")
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
    "csrc": set(),
    "atedm_kernels": {"atedm_kernels"},
    "python/atedm_extras.py": set(),
    "python/atedm": {"atedm_extras", "atedm_kernels", "atedm"},
    "bench": {"atedm_command", "atedm_extras", "atedm_kernels", "atedm", "atedm_bench"},
    "python/atedm_command.py": {"atedm_extras", "atedm", "atedm_bench"},
    "tests": {"atedm_command", "atedm_extras", "atedm_kernels", "atedm", "atedm_bench", "csrc", "tests"},
}
OURS = {*MAY_IMPORT["tests"], "bench", "python"}
# Functions whose first argument names a module.
IMPORTERS = {"__import__", "import_module", "find_spec", "lazily"}


def name_of(node):
    return node.id if isinstance(node, ast.Name) else getattr(node, "attr", None)


def text_of(node):
    """A string, or the constant parts of a formatted one."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str))


def imported(source):
    """Every module that ``source`` imports or looks up by its name, with what is taken from it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and name_of(node.func) in IMPORTERS:
            yield from ((text_of(argument), None) for argument in node.args if text_of(argument))
        elif isinstance(node, ast.Subscript) and name_of(node.value) == "modules" and text_of(node.slice):
            yield text_of(node.slice), None


def imported_by_statement(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def root(module):
    name = module.split(".")[0]
    return name.rstrip("_") if name.startswith("atedm") else name  # of f"atedm_{name}"


def against_direction(source, allowed):
    return sorted({module for module, _ in imported(source) if root(module) in OURS - allowed})


def private_of_others(source, package):
    """What begins with an underscore and ``source`` takes from another package of the distribution than ``package``."""
    found, names = [], set()
    for module, name in imported(source):
        if root(module) in OURS and root(module) != package:
            parts = [*module.split("."), *([name] if name else [])]
            found += [".".join(parts) for part in parts if part.startswith("_") and not part.startswith("__")]
            names.add(name or module.split(".")[-1])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.alias) and node.asname and {node.name, node.name.split(".")[-1]} & names:
            names.add(node.asname)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            found += [f"{name_of(node.value)}.{node.attr}"] if name_of(node.value) in names else []
    return found


def sources(place):
    path = ROOT / place
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("place", MAY_IMPORT)
def test_imports_go_one_way_and_take_what_is_public(place):
    package = {"bench": "atedm_bench"}.get(place, Path(place).stem)
    assert sources(place)
    for path in sources(place):
        source = path.read_text(encoding="utf-8")
        if path != Path(__file__):
            assert not against_direction(source, MAY_IMPORT[place]), path
        if place != "tests":  # which look inside
            assert not private_of_others(source, package), path
        if place == "atedm_kernels":
            known = {"torch", "triton", "numpy", "atedm_kernels", *sys.stdlib_module_names}
            assert not {module for module, _ in imported(source) if "." in module and root(module) not in known}, path
            assert not {root(name) for name in imported_by_statement(source)} - known, path


# The layers of the plug-in, the lowest first.
LAYERS = ("policy", "unet", "app", "cli")


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_of_the_plug_in_import_downwards(layer):
    above = {f"atedm.{name}" for name in LAYERS[LAYERS.index(layer) + 1 :]}
    files = sources(f"python/atedm/{layer}")
    assert files
    for path in files:
        found = {f"{module}.{name}" for module, name in imported(path.read_text(encoding="utf-8"))}
        assert not {name for name in found if ".".join(name.split(".")[:2]) in above}, path


BACK = """
def f():
    from atedm_bench.ops import run
    import atedm.app.flops as g
importlib.import_module("atedm")
__import__("atedm_bench")
lazily("atedm.unet", "f")
sys.modules["atedm_extras"]
import_module(f"atedm_bench.{x}.ops")
find_spec("bench")
"""


def test_an_import_that_runs_back_is_found():
    expected = ["atedm", "atedm.app.flops", "atedm.unet", "atedm_bench", "atedm_bench..ops", "atedm_bench.ops"]
    assert against_direction(BACK, {"atedm_kernels"}) == [*expected, "atedm_extras", "bench"]
    assert not against_direction('import atedm_kernels.backends\nLibrary("atedm", "DEF")', {"atedm_kernels"})
    private = "from atedm_kernels import _checks, native\nimport atedm_kernels as k\nnative._load()\nk._checks.f()"
    assert private_of_others(private, "atedm") == ["atedm_kernels._checks", "native._load", "k._checks"]
    assert not private_of_others(private, "atedm_kernels")


COMMANDS = {
    **{("main", *arguments): "diffusers" for arguments in ((), ("demo",), ("--help",))},
    **{("bench", *arguments): "bench" for arguments in ((), ("ops",), ("unet",), ("tune",))},
    **{("bench", name): "quality" for name in ("quality", "train", "overview")},
}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_without_its_packages_names_the_extra_in_one_line(command):
    function, *arguments = command
    code = f"import sys; sys.modules.update(typer=None); import atedm_command; atedm_command.{function}()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
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


@pytest.mark.parametrize("module", ["atedm", "atedm_kernels", "atedm_bench"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_hides_a_package_is_named(tmp_path, module, kind):
    other = tmp_path / (module if kind == "folder" else f"{module}.py")
    if kind == "folder":
        other.mkdir()
        (other / "__init__.py").touch()
    else:
        other.touch()
    path = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}

    def ends(code):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=path, cwd=ROOT.parent)
        assert done.returncode == 1, done.stdout
        return done.stderr.strip().splitlines()

    command = "bench" if module == "atedm_bench" else "main"
    (line,) = ends(f"import atedm_command; atedm_command.{command}()")
    assert line.startswith(f"Error: {other} hides the package {module} of atedm-kernels")
    if module == "atedm_kernels":
        assert ends("import atedm")[-1].startswith(f"ImportError: {other} hides the package {module}")


LAUNCHERS = {
    "accelerate": ["accelerate", "launch", "--cpu", "--num_processes", "1", "--no_python"],
    "torchrun": ["torchrun", "--standalone", "--nproc_per_node", "1", "--no-python"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_starts_the_command_where_a_folder_has_its_name(tmp_path, launcher):
    (tmp_path / "atedm").mkdir()
    (tmp_path / "atedm.py").write_text("raise SystemExit('hidden')")
    bin = str(Path(sys.executable).parent)
    words = [*LAUNCHERS[launcher], "atedm", "--help"]
    environment = {**os.environ, "PATH": os.pathsep.join([bin, os.environ["PATH"]])}
    done = subprocess.run(
        [f"{bin}/{words[0]}", *words[1:]], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout


def test_no_two_classes_have_one_name():
    names = [
        node.name
        for place in MAY_IMPORT
        if place != "tests"
        for path in sources(place)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    assert len(names) > 40 and [name for name, count in Counter(names).items() if count > 1] == []
