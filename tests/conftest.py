"""Settings for every test."""

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores; threads on top of that only wait for each other.
    torch.set_num_threads(1)
