"""Numbers that users give: finite, of NumPy too, and seeds that fit."""

import json
import math
import typing

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

import atedm
import atedm_kernels as kernels
from atedm.cli import app
from atedm.policy.schedules import SCHEDULES
from atedm_bench.cli import app as bench


def options(kind):
    """Every option of every command that is a number of this kind: the runner, the command's words, the option."""
    found = []

    def walk(runner, words, command):
        for name, each in getattr(command, "commands", {}).items():
            walk(runner, [*words, name], each)
        function = getattr(command.callback, "__wrapped__", command.callback)
        hints = typing.get_type_hints(function) if function else {}
        for parameter in command.params:
            if kind in (hints.get(parameter.name), *typing.get_args(hints.get(parameter.name))):
                found.append((runner, words, parameter.opts[0]))

    for runner in (app, bench):
        walk(runner, [], typer.main.get_command(runner))
    return found


def refused(runner, words, option, text):
    done = CliRunner().invoke(runner, [*words, f"{option}={text}"])
    return done.exit_code == 2 and option in done.stderr


def test_every_option_that_is_a_number_is_finite():
    floats = options(float)
    assert len(floats) >= 9
    assert [each for each in floats for text in ("nan", "inf", "-inf") if not refused(*each, text)] == []


def test_every_seed_fits():
    seeds = [each for each in options(int) if each[2] == "--seed"]
    assert len(seeds) == 3
    assert all(refused(*each, text) for each in seeds for text in (str(2**63), "-1"))
    torch.Generator().manual_seed(2**63 - 1 + 2**40)  # that of a later picture


def test_numbers_of_numpys_count_as_pythons():
    options = atedm.Options(
        ratio={np.int64(2): np.float32(0.5)},
        levels=np.array([2, 3]),
        rank_every=np.int32(2),
        tolerance=np.float32(0.25),
        max_iterations=np.int64(3),
        schedule=atedm.Adaptive(np.float32(0.5), max_gap=np.int64(3)),
    )
    plain = {"ratio": {2: 0.5}, "levels": (2, 3), "rank_every": 2, "tolerance": 0.25, "max_iterations": 3}
    assert options == atedm.Options(**plain, schedule=atedm.Adaptive(0.5, max_gap=3))
    assert atedm.Options.from_dict(json.loads(json.dumps(options.to_dict()))) == options
    assert atedm.DSAP(np.float16(0.25)) == atedm.DSAP(0.25) and atedm.Every(np.uint8(3)) == atedm.Every(3)
    assert len(SCHEDULES) == 3
    q = torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(0))
    _, lse = kernels.attention_with_logsumexp(q, q, q, scale=np.float32(0.25))
    found = kernels.weighted_page_rank(
        q, q, lse, scale=np.float32(0.25), max_iterations=np.int16(3), tolerance=np.float64(0)
    )
    expected = kernels.weighted_page_rank(q, q, lse, scale=0.25, max_iterations=3, tolerance=0.0)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert kernels.select_tokens(found[0], np.int64(7)).shape == (1, 7)


@pytest.mark.parametrize("ratio", [np.bool_(True), np.float32(math.nan), np.float32(1.0), np.complex64(0.5)])
def test_what_is_no_number_of_numpys_is_refused(ratio):
    with pytest.raises((TypeError, ValueError), match="ratio is"):
        atedm.Options(ratio=ratio)
    with pytest.raises((TypeError, ValueError), match="keep is"):
        kernels.select_tokens(torch.rand(1, 1, 4), ratio)


def test_counts_fit_the_ops():
    for name in ("max_iterations", "keep_multiple", "rank_every"):
        with pytest.raises(ValueError, match=f"{name} is {10**30}; expected an integer, 1 to 2147483647"):
            atedm.Options(**{name: 10**30})
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match=f"max_iterations is {10**30}; expected 1 to 2147483647"):
        kernels.weighted_page_rank(q, q, torch.logsumexp(q @ q.mT / 8**0.5, 3), max_iterations=10**30)
