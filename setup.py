"""Package layout: ``atedm_kernels`` stands at the top of the repository, ``atedm`` in ``python/``."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(".", include=["atedm_kernels*"]) + find_packages("python", include=["atedm*"]),
    package_dir={"atedm": "python/atedm", "atedm_kernels": "atedm_kernels"},
)
