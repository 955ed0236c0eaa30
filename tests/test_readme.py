"""What the README shows runs."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_the_block_of_ones_own_runs_and_keeps_what_it_must():
    text = README.read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- run by tests/test_readme.py -->\n```python\n(.*?)```", text, flags=re.DOTALL)
    names = {}
    exec(compile(code, str(README), "exec"), names)
    assert names["y"].shape == (2, 100, 64)
    torch.manual_seed(0)
    block = names["PrunedBlock"](ratio=0.0).eval()
    x = torch.randn(1, 30, 64)
    with torch.inference_mode():
        whole = block(x)
        block.ratio = 0.5
        pruned = block(x)
    # The layers treat each token on its own: what was kept is as it would be.
    same = torch.isclose(whole, pruned, rtol=1e-4, atol=1e-5).all(dim=2)
    assert same.sum() == 15


def test_links_lead_somewhere():
    for page in (README, README.with_name("CONTRIBUTING.md"), README.with_name("CHANGELOG.md")):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
