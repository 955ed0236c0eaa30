"""The library under AddressSanitizer and UndefinedBehaviorSanitizer, driven by ``exercise.cpp``."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest

from atedm_kernels import _native

ROOT = Path(__file__).parents[2]
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1")


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("atedm_csrc_build", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_sanitizer_complains(build, tmp_path):
    try:
        probe = tmp_path / "probe.cpp"
        probe.write_text("int main() { return 0; }")
        build._run([*build.compiler(), *SANITIZERS, str(probe), "-o", str(tmp_path / "probe")])
        build._run([str(tmp_path / "probe")])
    except (build.BuildError, OSError) as error:
        pytest.skip(f"no compiler with sanitizers: {str(error)[-200:]}")
    # What cannot run here need not be compiled.
    levels = [name for name, missing in _native.levels().items() if missing is None]
    files = build.objects(tmp_path, SANITIZERS, levels)
    program, source = tmp_path / "exercise", Path(__file__).with_name("exercise.cpp")
    command = [*build.compiler(), *build.FLAGS, *SANITIZERS, f"-I{build.SOURCES}", source, *files, "-o", program]
    build._run([str(part) for part in command])
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert int(done.stdout.split()[0]) > 1000
