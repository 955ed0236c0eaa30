"""Checks the base install in its own environment, which has only the wheel, torch, triton and numpy: every op runs.

``make test`` runs this file with that environment's Python. It imports nothing from the checkout.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import atedm_kernels as ak
from atedm_kernels import native
from atedm_kernels.registry import OPS

ABSENT = ("diffusers", "transformers", "accelerate", "typer", "rich", "pytest")
COMMANDS = {"atedm": "diffusers", "atedm-bench": "bench"}


def results() -> dict[str, torch.Tensor]:
    """Run every op on two images of 35 tokens, with heads strided as in diffusers, and return the results by op."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    q, k, v = (normal(2, 35, 3, 40).transpose(1, 2) for _ in range(3))
    found: dict[str, torch.Tensor] = {}
    found["attention_with_logsumexp"], lse = ak.attention_with_logsumexp(q, k, v)
    found["weighted_page_rank"], _ = ak.weighted_page_rank(q, k, lse)
    found["weighted_page_rank_cross"], _ = ak.weighted_page_rank_cross(q, k[:, :, :7], lse)
    scores = found["weighted_page_rank"]
    found["attention_column_sums"] = ak.attention_column_sums(q, k, lse, scores)
    found["select_tokens"] = index = ak.select_tokens(scores, 11)
    found["similarity_source"] = source = ak.similarity_source(q, k, lse, index)
    found["gather_tokens"] = compact = ak.gather_tokens(normal(2, 35, 24), index)
    found["recover_tokens"] = ak.recover_tokens(compact, source)
    residual, cache = normal(2, 24, 5, 7), normal(2, 35, 24)
    found["recover_feature_map"] = ak.recover_feature_map(compact, source, residual)
    updated = ak.update_feature_map(compact, index, cache, residual)
    found["update_feature_map"] = torch.stack([updated.flatten(2).mT, cache])
    return found


def main() -> None:
    assert Path(sys.prefix) in Path(ak.__file__).parents, f"atedm_kernels is imported from {ak.__file__}"
    present = [name for name in ABSENT if importlib.util.find_spec(name) is not None]
    assert not present, f"the base install installs {', '.join(present)}"

    has_compiler = os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++")))
    assert native.why_not() is None or not has_compiler, native.why_not()
    default = "native" if native.why_not() is None else "reference"
    served = {name: op.backend_for(torch.device("cpu"), torch.float32)[0] for name, op in OPS.items()}
    assert served == {name: "torch" if "torch" in op.backends else default for name, op in OPS.items()}, served
    found = results()
    with ak.backend("reference"):
        expected = results()
    assert set(found) == set(expected) == set(OPS), set(OPS) - set(found)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=2e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")

    for command, extra in COMMANDS.items():
        done = subprocess.run([Path(sys.prefix, "bin", command)], capture_output=True, text=True)
        line = f"Error: diffusers, typer, rich not installed; pip install 'atedm-kernels[{extra}]'\n"
        assert (done.returncode, done.stdout, done.stderr) == (1, "", line), (command, done.stdout, done.stderr)
    done = subprocess.run([sys.executable, "-c", "import atedm"], capture_output=True, text=True)
    last = "ModuleNotFoundError: diffusers not installed; pip install 'atedm-kernels[diffusers]'"
    assert done.stderr.splitlines()[-1] == last, done.stderr
    print(f"base install: {len(found)} ops ran; the commands and `import atedm` name the missing extra")


if __name__ == "__main__":
    main()
