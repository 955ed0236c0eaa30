"""``bench/gpu.sh`` as far as it goes without a GPU: it finds the packages in the checkout, and logs how steps end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu.sh"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a script for bash and GNU tools")


def run(results: Path, **environment: str) -> tuple[int, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        ["bash", str(SCRIPT), str(results), str(results / "no-wheels")],
        env={**inherited, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
    )
    return done.returncode, (results / "log.txt").read_text()


def test_packages_come_from_the_checkout(tmp_path):
    status, log = run(tmp_path, STEPS="doctor")
    assert status == 0, log
    assert "END imports: status 0" in log and "END doctor: status 0" in log
    where = next(line for line in log.splitlines() if line.endswith("atedm_bench/__init__.py"))
    assert not where.startswith(str(SCRIPT.parents[1]))
    assert json.loads((tmp_path / "doctor.json").read_text())["rows"]


def test_a_failed_step_is_told(tmp_path):
    status, log = run(tmp_path, STEPS="doctor", PYTHON="false")
    assert status == 1 and "END doctor: status 1" in log


def test_without_time_steps_are_skipped(tmp_path):
    _, log = run(tmp_path, MINUTES="0")
    assert log.count("SKIPPED") >= 7
