"""Compiles ``csrc/`` into one shared library with the system's C++ compiler: no torch, no Python headers, no make.

``python csrc/build.py`` builds into the source tree, for development; ``setup.py`` and the tests call the functions.
"""

from __future__ import annotations

import concurrent.futures
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).parent
SUFFIX = {"darwin": ".dylib"}.get(sys.platform, ".so")
IN_PLACE = SOURCES.resolve().parent / "atedm_kernels" / f"libatedm{SUFFIX}"

# Contraction fuses a product and a sum into one operation if the ISA has one. Never use -ffast-math: it would remove
# the rounding that the exponential relies on.
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread"),
    *("-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi"),
)

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl")
_BF16 = (*_AVX512, "-mavx512bf16")
# In the order of csrc/isa.h. Older compilers lack the optional ones.
ISAS = {
    "portable": (),
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": _BF16,
    "amx": (*_BF16, "-mamx-tile", "-mamx-bf16"),
}
OPTIONAL = ("avx512_bf16", "amx")
COMMON = ("isa", "parallel", "gather_rows", "select_tokens")


class BuildError(Exception):
    """There is no compiler, or it failed."""


def compiler() -> list[str]:
    """``CXX`` from the environment, or the first C++ compiler on the path."""
    if os.environ.get("CXX"):
        return os.environ["CXX"].split()
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler (c++, g++ or clang++) is on the path; set CXX to use another")


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def objects(folder: Path, extra: Sequence[str] = (), isas: Sequence[str] = tuple(ISAS)) -> list[Path]:
    """Compile every source into ``folder``, each ISA's kernels once, and return the object files.

    Args:
        extra: more compiler flags.
        isas: the ISAs to build. Those that an old compiler or another CPU lacks are left out.

    Raises:
        BuildError: with the compiler's output.
    """
    if sys.platform == "win32":
        raise BuildError("Windows is not supported")
    is_x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
    isas = [name for name in isas if is_x86 or name == "portable"]
    base = [*compiler(), *FLAGS, *extra]

    def compile_isa(name: str) -> Path | None:
        out = folder / f"isa_{name}.o"
        names = [f"-DATEDM_ISA={list(ISAS).index(name)}", f"-DATEDM_NAMESPACE={name}"]
        try:
            _run([*base, *ISAS[name], *names, "-c", str(SOURCES / "kernels.cpp"), "-o", str(out)])
        except BuildError:
            if name in OPTIONAL:
                return None
            raise
        return out

    def compile_common(name: str, defines: list[str]) -> Path:
        out = folder / f"{name}.o"
        _run([*base, *defines, "-c", str(SOURCES / f"{name}.cpp"), "-o", str(out)])
        return out

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        built = dict(zip(isas, pool.map(compile_isa, isas), strict=True))
        defines = [f"-DATEDM_HAS_{name.upper()}" for name, path in built.items() if path is not None]
        common = pool.map(lambda name: compile_common(name, defines), COMMON)
        return [path for path in (*built.values(), *common) if path is not None]


def build_library(out: Path) -> None:
    """Build the shared library ``out``; it replaces an old one atomically.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    shared = "-dynamiclib" if sys.platform == "darwin" else "-shared"
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the library, to be renamed; another build may write the same library at the same time.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as folder:
        files = [str(path) for path in objects(Path(folder))]
        unfinished = Path(folder, out.name)
        _run([*compiler(), shared, "-pthread", *files, "-o", str(unfinished)])
        unfinished.replace(out)


if __name__ == "__main__":
    try:
        build_library(IN_PLACE)
    except BuildError as error:
        sys.exit(str(error))
    print(IN_PLACE)
