"""Package layout: ``atedm_kernels`` stands at the top of the repository, ``atedm`` in ``python/``, and the
measurements in ``bench/`` are installed as ``atedm.bench``, so that ``atedm bench`` works from a wheel too."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(".", include=["atedm_kernels*"]),
        *find_packages("python", include=["atedm*"]),
        "atedm.bench",
    ],
    package_dir={"atedm_kernels": "atedm_kernels", "atedm": "python/atedm", "atedm.bench": "bench"},
)
