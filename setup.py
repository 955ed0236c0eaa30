"""Package layout: ``atedm_kernels`` stands at the top of the repository, ``atedm`` in ``python/``, and the
measurements in ``bench/`` are installed as ``atedm.bench``, so that ``atedm bench`` works from a wheel too."""

from setuptools import find_packages, setup

BENCH = ["atedm.bench", *(f"atedm.bench.{name}" for name in find_packages("bench"))]

setup(
    packages=[
        *find_packages(".", include=["atedm_kernels*"]),
        *find_packages("python", include=["atedm*"]),
        *BENCH,
    ],
    package_dir={"atedm_kernels": "atedm_kernels", "atedm": "python/atedm", "atedm.bench": "bench"},
    package_data={
        "atedm_kernels": ["ops/*/tiles.json"],
        "atedm.embedded": ["README.md", "words.txt", "weights/**"],
        # Recipes and small networks; what was measured (bench/results) stays in the repository.
        **{name: ["*.yaml", "*.safetensors"] for name in BENCH},
    },
)
