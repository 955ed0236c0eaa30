"""The kernels compiled ahead of time for GPUs that the machine lacks.

Nothing spills, shared memory fits, 16-bit products run on the matrix units, and data that is only moved is
moved 16 bytes at a time. The compiler needs a process in which Triton's interpreter does not replace it.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SHARED_LIMIT = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
MATRIX = {
    "sm_80": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "sm_120": "mma.sync",
    "gfx942": "v_mfma",
}
PRODUCT_KERNELS = {"_column_sums_kernel", "_rows_kernel", "_similarity_kernel"}
MOVING_KERNELS = {"_gather_kernel", "_gather_pair_kernel", "_recover_kernel", "_update_kernel"}
# The minimum number of programs with exponentials that an NVIDIA multiprocessor's registers hold at head dim 64: one
# multiplies while another takes exponentials. The compilers for sm_80 and sm_100 use more registers.
RESIDENT = {"sm_80": 2, "sm_90": 3, "sm_100": 2, "sm_120": 3}
EXPONENTIAL_KERNELS = {"_column_sums_kernel", "_rows_kernel"}
REGISTERS = 65536


# Beside the pinned version, the oldest that torch releases of today still bring; `make test` installs it there. It
# compiles the shapes of SDXL in bf16, and all sizes 1.
OLD_TRITON = Path(sys.prefix) / "triton-3.6"
TARGETS = [*((target, None) for target in SHARED_LIMIT), ("sm_90", OLD_TRITON)]


@functools.cache
def compiled(triton: Path | None) -> list[dict]:
    """Rows of all targets of this Triton, from one process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Where an instruction comes from in the source changes none, and takes a tenth of the compiler's time.
    environment["TRITON_DISABLE_LINE_INFO"] = "1"
    if triton is not None:
        environment["PYTHONPATH"] = str(triton)
    targets = ",".join(target for target, other in TARGETS if other == triton)
    wanted = "" if triton is None else "^small|bf16-d64-|select-rms-n4096|(gather|sum_rows|feature_map-bf16)-bf16-c"
    command = [sys.executable, "-m", "tests.helpers.compile_launches", targets, wanted]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(("target", "triton"), TARGETS, ids=[*SHARED_LIMIT, "sm_90, Triton 3.6"])
def test_resources(target, triton):
    if triton is not None and not triton.is_dir():
        pytest.skip(f"needs Triton 3.6 in {triton}, where make test installs it")
    rows = [row for row in compiled(triton) if row["target"] == target]
    assert {row["kernel"] for row in rows} >= {
        *PRODUCT_KERNELS,
        *MOVING_KERNELS,
        "_select_kernel",
        "_sum_rows_kernel",
        "_token_drift_kernel",
    }
    problems = []
    for row in rows:
        if row["spill_bytes"]:
            problems.append(("spills", row))
        if row["shared"] > SHARED_LIMIT[target] * 1024:
            problems.append(("shared memory", row))
        if row["kernel"] in PRODUCT_KERNELS and "-fp32-" not in row["case"] and row["matrix"] != MATRIX[target]:
            problems.append(("matrix instruction", row))
        counted = row["kernel"] in EXPONENTIAL_KERNELS and "16-d64-" in row["case"]
        if counted and RESIDENT.get(target, 0) * 32 * row["warps"] * row["registers"] > REGISTERS:
            problems.append(("registers", row))
        # Loads of indices are 8 bytes wide, those of data 16.
        moves = row["kernel"] in MOVING_KERNELS and row["case"] != "smallest"
        if moves and (row["loads"] != [8, 16] or row["stores"] != [16]):
            problems.append(("width of memory accesses", row))
    assert not problems, "\n".join(f"{what}: {row}" for what, row in problems)
