"""Package layout: ``atedm_kernels`` is at the top of the repository; ``atedm``, ``atedm_command`` and ``atedm_extras``
are in ``python/``; ``bench/`` is installed as ``atedm_bench``.

If there is a C++ compiler, the build also makes the native CPU library. The library does not use Python (ctypes loads
it), so one wheel serves every Python version. Without a compiler the wheel is pure Python, and the reference backend
serves the CPU."""

import importlib.util
import os
import warnings
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

BENCH = ["atedm_bench", *(f"atedm_bench.{name}" for name in find_packages("bench"))]

# Load it by path, because a build frontend may not put this folder on sys.path.
spec = importlib.util.spec_from_file_location("atedm_csrc_build", Path(__file__).parent / "csrc" / "build.py")
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)

LIBRARY = "atedm_kernels.libatedm"


class BuildNative(build_ext):
    """Calls the compiler directly, because setuptools has only one set of flags for all sources."""

    def get_ext_filename(self, fullname):
        if fullname.split(".")[-1] != LIBRARY.split(".")[-1]:
            return super().get_ext_filename(fullname)
        return str(Path(*fullname.split("."))) + native.SUFFIX  # no Python version tag

    def get_export_symbols(self, ext):
        return []

    def build_extension(self, ext):
        out, built = Path(self.get_ext_fullpath(ext.name)), native.IN_PLACE
        is_up_to_date = built.is_file() and not newer_group(ext.depends, built) and "CXX" not in os.environ
        if is_up_to_date and built != out.resolve():
            self.copy_file(built, out)  # built earlier by csrc/build.py or an editable install
            return
        try:
            native.build_library(out)
        except native.BuildError as error:
            warnings.warn(f"building without the native CPU library: {error}", stacklevel=1)


class Wheel(bdist_wheel):
    def get_tag(self):
        platform = super().get_tag()[2]
        is_built = any(Path(self.bdist_dir).rglob(f"libatedm{native.SUFFIX}"))
        return ("py3", "none", platform if is_built else "any")


setup(
    packages=[
        *find_packages(".", include=["atedm_kernels*"]),
        *find_packages("python", include=["atedm*"]),
        *BENCH,
    ],
    py_modules=["atedm_command", "atedm_extras"],
    package_dir={"": "python", "atedm_kernels": "atedm_kernels", "atedm_bench": "bench"},
    package_data={
        "atedm_kernels": ["ops/*/tiles.json"],
        "atedm.embedded": ["README.md", "words.txt", "training.json", "weights/**"],
        # Recipes and small networks. Results (bench/results) stay in the repository.
        **{name: ["*.yaml", "*.safetensors"] for name in BENCH},
    },
    # Lists everything the build reads, so that the source distribution includes it.
    ext_modules=[
        Extension(
            LIBRARY,
            sources=[f"csrc/{name}.cpp" for name in ("kernels", *native.COMMON)],
            depends=sorted(f"csrc/{path.name}" for path in native.SOURCES.iterdir() if path.is_file()),
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
