"""diffusers' own tests of its UNet and SDXL pipelines, without atedm and with ``apply(ratio=0)`` on every UNet.

``python run.py SOURCE [TEST …]``; ``make witnesses SOURCE=…`` does the same. ``SOURCE``: a checkout of diffusers at the
version that is installed (its releases on PyPI hold no tests). Fails where a test's outcome differs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import diffusers

TESTS = (
    "tests/models/unets/test_models_unet_2d_condition.py",
    "tests/pipelines/stable_diffusion_xl",
    "tests/pipelines/controlnet/test_controlnet_sdxl.py",
    "tests/pipelines/pag/test_pag_sdxl.py",
)
# Offline, what wants files of the hub fails at once, both times.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DIFFUSERS_TEST_DEVICE": "cpu"}


def outcomes(source: Path, tests: list[str], witnessed: Path | None) -> dict[str, str]:
    """Each test's outcome by name; with ``witnessed`` every UNet is pruned with ratio 0, and has a line there."""
    here = Path(__file__).parent
    plugin = ["-p", "applied_everywhere"] if witnessed else []
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "WITNESSED": str(witnessed),
        "PYTHONPATH": os.pathsep.join([str(here), str(source)]),
    }
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--tb=no", f"--junitxml={results}", "-p", "no:cacheprovider"]
        command += ["-n", os.environ.get("JOBS", "2"), *plugin]
        subprocess.run([*command, *tests], cwd=source, env=environment, check=False)
        cases = list(ElementTree.parse(results).iter("testcase"))
    for case in cases:
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        found[f"{case.get('classname')}.{case.get('name')}"] = kinds[0] if kinds else "passed"
    return found


def main() -> int:
    if len(sys.argv) < 2 or not (Path(sys.argv[1]) / "tests").is_dir():
        sys.exit("expected the folder of a checkout of diffusers, with its tests; see the top of this file")
    source = Path(sys.argv[1]).resolve()
    tests = sys.argv[2:] or [test for test in TESTS if (source / test).exists()]
    without = outcomes(source, tests, None)
    with tempfile.TemporaryDirectory() as folder:
        witnessed = Path(folder) / "witnessed.txt"
        with_atedm = outcomes(source, tests, witnessed)
        unets = Counter(witnessed.read_text().splitlines() if witnessed.exists() else [])
    differing = [name for name in sorted({*without, *with_atedm}) if without.get(name) != with_atedm.get(name)]
    for name in differing:
        print(f"{name}: {without.get(name)} without, {with_atedm.get(name)} with atedm")
    for outcome, times in unets.most_common():
        print(f"atedm on {times} of {unets.total()} UNets: {outcome}")
    counts = {kind: list(without.values()).count(kind) for kind in sorted(set(without.values()))}
    print(f"diffusers {diffusers.__version__}: {counts}; {len(differing)} of {len(without)} differ with atedm")
    return 1 if differing or "passed" not in counts or not unets["in force"] else 0


if __name__ == "__main__":
    sys.exit(main())
