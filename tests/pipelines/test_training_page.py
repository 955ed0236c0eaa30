"""What docs/training.md shows runs, and its figures are those that are counted."""

import re
from pathlib import Path

import pytest

import atedm
from tests.helpers.training_memory import STEPS, sdxl_step

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.fixture(scope="module")
def text():
    return PAGE.read_text(encoding="utf-8")


def run_block(text):
    (code,) = re.findall(
        r"<!-- run by tests/pipelines/test_training_page.py -->\n```python\n(.*?)```", text, flags=re.DOTALL
    )
    names = {}
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def test_the_lora_learns_as_on_the_whole_model(text, monkeypatch):
    pruned = run_block(text)
    assert atedm.pruned_blocks(pruned["pipe"])
    monkeypatch.setattr(atedm, "apply", lambda pipe, *_, **__: pipe)
    whole = run_block(text)
    assert not atedm.pruned_blocks(whole["pipe"])
    falls = [names["before"] - names["after"] for names in (pruned, whole)]
    assert falls[0] > 0.6 * falls[1]
    for names, fall in zip((pruned, whole), falls, strict=True):
        assert fall > 0.25 * names["before"]


def test_memory_is_what_is_counted(text):
    """One row of three: the others take twice as long."""
    assert all(f"| {name} |" in text for name in STEPS)
    name = "all weights"
    whole, pruned = sdxl_step(STEPS[name])
    assert f"| {name} | {whole / 1e9:.2f} GB | {pruned / 1e9:.2f} GB |" in text
    assert pruned < whole
