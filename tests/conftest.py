"""Settings for every test."""

import gc
import os
from pathlib import Path

import pytest
import torch

# Wide enough that no message of a command is broken in two, however long the path of a temporary folder.
os.environ["COLUMNS"] = "1000"

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores; threads on top of that only wait for each other.
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    # What has been imported stays. The collector would walk through all of it again and again, and through what tracing
    # makes: a sixth of the time of a test that traces.
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small pipeline, for pictures of 64 pixels. Tests that change it change a copy."""
    from tests.helpers.shallow import save_shallow

    folder = tmp_path_factory.mktemp("model")
    save_shallow(folder, side=64)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))
