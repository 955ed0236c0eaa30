"""``atedm flops``: the FLOPs of SDXL's UNet, full and pruned, counted on the meta device."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import atedm
from atedm.app.flops import MAX_RATIO, UNetFlops, count_flops, solve_decreasing
from atedm.app.models import SDXL_UNET, image_size, meta_unet, unet_config, unet_inputs
from atedm.policy.options import PUBLISHED
from atedm.policy.ranking import WARM_ITERATIONS
from atedm_bench.peers import TOMESD_MAX_RATIO, TomesdFlops


@pytest.fixture(scope="module")
def sdxl() -> UNetFlops:
    return UNetFlops(SDXL_UNET)


@pytest.fixture(scope="module")
def small() -> UNetFlops:
    """SDXL's structure with fewer layers, at half of its side."""
    return UNetFlops({**SDXL_UNET, "transformer_layers_per_block": (1, 2, 3)}, width=512, height=512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a UNet that is counted in a moment, for what the command does with any."""
    folder = tmp_path_factory.mktemp("unet")
    meta_unet({**ASYMMETRIC, "layers_per_block": 1, "reverse_transformer_layers_per_block": None}).save_config(folder)
    return str(folder)


def _run(*arguments: str):
    from atedm.cli import app

    # A wide terminal, so that no cell and no message is wrapped.
    return CliRunner().invoke(app, ["flops", *arguments], env={"TERM": "dumb", "NO_COLOR": "1"})


def test_full_unet(sdxl):
    assert sdxl.full().tflops == pytest.approx(6.761, abs=5e-4)
    assert sdxl.full().scoring == 0


@pytest.mark.parametrize(
    ("levels", "placement", "tflops"),
    [
        (None, "paper", 4.065),
        ((2, 3), "paper", 4.065),
        ((3,), "paper", 4.443),
        (None, "early", 3.689),
        ((3,), "early", 4.239),
    ],
)
def test_all_pruned_at_the_papers_ratio(sdxl, levels, placement, tflops):
    counted = sdxl.pruned(0.63, levels=levels, placement=placement)
    assert counted.tflops == pytest.approx(tflops, abs=5e-4)


ASYMMETRIC = {
    **SDXL_UNET,
    "block_out_channels": (32, 64, 128),
    "attention_head_dim": (1, 2, 4),
    "layers_per_block": (1, 2, 1),
    "transformer_layers_per_block": (1, 2, 3),
    "reverse_transformer_layers_per_block": ((2, 1), (3, 2, 2), 1),
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}


def test_counting_by_blocks_is_exact():
    counter = UNetFlops(ASYMMETRIC, width=264, height=136, batch=2, tokens=7)
    unet = counter.unet
    # Every ratio, every way to prune.
    for ratio, light, placement, ranking in (
        (0.4, False, "early", "self"),
        ({3: 0.7}, False, "early", "self"),
        ({3: 0.7}, True, "early", "cross"),
        ({2: 0.2, 3: 0.9}, True, "early", "cross"),
        ({2: 0.2, 3: 0.9}, False, "paper", "keys"),
    ):
        settings = {"placement": placement, "ranking": ranking}
        schedule = atedm.DSAP(1.0) if light else None
        with atedm.applied(unet, PUBLISHED, ratio=ratio, schedule=schedule, **settings):
            whole = count_flops(lambda: counter.call(unet))
        by_blocks = counter.pruned(ratio, light=light, **settings)
        assert by_blocks.unet + by_blocks.scoring == whole.unet + whole.scoring
        if ranking == "self":
            assert by_blocks == whole


def test_a_unet_that_projects_its_text_is_counted():
    """Kolors': its text has the text encoder's width, not that of cross-attention."""
    plain = {"addition_embed_type": None, "layers_per_block": 1, "transformer_layers_per_block": 1}
    plain = {**ASYMMETRIC, **plain, "reverse_transformer_layers_per_block": None}
    projected = {**plain, "encoder_hid_dim": 96, "encoder_hid_dim_type": "text_proj"}
    full, more = (UNetFlops(config, width=64, height=64).full() for config in (plain, projected))
    assert more.unet - full.unet == 2 * 77 * 96 * 64


def test_average_weights_the_phases(small):
    light, rest = small.pruned(0.63, light=True), small.pruned(0.63)
    assert rest.unet < light.unet < small.full().unet
    assert small.average(0.63, steps=50).unet == pytest.approx((15 * light.unet + 35 * rest.unet) / 50, abs=1)
    assert small.average(0.63, steps=7, schedule=atedm.DSAP(fraction=1.0)) == light
    assert small.average(0.63, steps=1, schedule=atedm.DSAP(fraction=0.0)) == rest


def test_no_pruning_counts_like_the_full_unet(small):
    assert small.pruned(0.0) == small.full()
    assert atedm.pruned_blocks(small.unet) == []


def test_scoring_is_counted_apart(small):
    """Level 2 at 512²: 1024 tokens, 10 heads, 5 blocks; level 3: 256 tokens, 20 heads, 6 blocks. Head dim 64."""
    from atedm_kernels import DEFAULT_MAX_ITERATIONS

    expected = 0
    for tokens, heads, blocks in ((1024, 10, 5), (256, 20, 6)):
        keep = round(0.37 * tokens)
        expected += blocks * 2 * heads * 64 * (DEFAULT_MAX_ITERATIONS * tokens**2 + tokens * keep)
    assert small.pruned(0.63).scoring == expected
    assert small.pruned(0.63, placement="paper").scoring == expected


def test_custom_attention_counts_as_attention():
    q, k = (torch.empty(2, 3, tokens, 8, device="meta") for tokens in (5, 7))
    counted = count_flops(lambda: torch.ops.atedm.attention_with_logsumexp(q, k, k))
    assert counted.unet == 4 * 2 * 3 * 5 * 7 * 8
    lse = torch.empty(2, 3, 5, device="meta")
    assert count_flops(lambda: torch.ops.atedm.attention_column_sums(q, k, lse)).scoring == 2 * 2 * 3 * 5 * 7 * 8
    cross = count_flops(lambda: torch.ops.atedm.weighted_page_rank_cross(q, k, lse, None, 4, 0.0))
    assert cross.scoring == 4 * 4 * 2 * 3 * 5 * 7 * 8
    assert cross.unet == 0


def test_solving_for_a_budget(small):
    def average(ratio: float) -> float:
        return small.average(ratio, steps=50).unet

    target = small.average(0.4, steps=50).unet
    ratio = solve_decreasing(average, target, 0.0, MAX_RATIO)
    assert ratio == pytest.approx(0.4, abs=0.01)
    assert average(ratio) == pytest.approx(target, rel=1e-3)
    with pytest.raises(ValueError, match=r"cannot be reached; expected from \d"):
        solve_decreasing(average, 10 * target, 0.0, MAX_RATIO)


def test_solve_ends_on_steps():
    steps = solve_decreasing(lambda x: 10.0 - round(4 * x), 8.6, 0.0, 1.0)
    assert 10.0 - round(4 * steps) in (8.0, 9.0)


def test_tomesd_at_the_nearest_flops(small):
    pytest.importorskip("tomesd")
    target = small.pruned(0.63).unet
    merged = TomesdFlops(small)
    ratio = merged.nearest_ratio(target)
    assert 0 < ratio < TOMESD_MAX_RATIO
    assert merged.at(ratio).unet == pytest.approx(target, rel=2e-3)
    assert merged.at(ratio).scoring > 0
    assert merged.at(0.0) == small.full()
    assert merged.nearest_ratio(1) == TOMESD_MAX_RATIO


def test_other_sizes_and_batches(small):
    config = small.config
    assert UNetFlops(config, width=512, height=512, batch=2).full().unet == 2 * small.full().unet
    wide = UNetFlops(config, width=1216 // 2, height=832 // 2)
    assert 0 < wide.pruned(0.63).unet < wide.full().unet


def test_models(tmp_path):
    assert image_size("1024") == (1024, 1024)
    assert image_size("1216x832") == (1216, 832)
    for wrong in ("", "x", "10x10x10", "1000.5", "-8", "1001", "0"):
        with pytest.raises(ValueError, match="expected a"):
            image_size(wrong)
    unet = meta_unet({**SDXL_UNET, "transformer_layers_per_block": 1}, torch.bfloat16)
    (sample, _, text), kwargs = unet_inputs(unet, width=64, height=128, batch=2)
    assert (sample.shape, text.shape) == ((2, 4, 16, 8), (2, 77, 2048))
    assert kwargs["added_cond_kwargs"]["text_embeds"].shape == (2, 1280)
    (tmp_path / "unet").mkdir()
    unet.save_config(tmp_path / "unet")
    for folder in (tmp_path, tmp_path / "unet"):
        assert UNetFlops(unet_config(str(folder)), width=64, height=64).full().unet > 0
    with pytest.raises(ValueError, match="neither 'sdxl' nor a folder"):
        unet_config("no-such-model")


def test_command_prints_and_writes(tmp_path):
    path = tmp_path / "flops.json"
    run = _run("--ratio", "0.63", "--json", str(path))
    assert run.exit_code == 0, run.output
    for figure in ("6.761", "4.065", "3.689"):
        assert figure in run.output
    document = json.loads(path.read_text())
    assert {"command", "device", "versions", "date", "settings", "rows"} == set(document)
    assert len({row["name"] for row in document["rows"]}) == len(document["rows"]) == 7
    for row in document["rows"]:
        assert {"name", "tflops", "scoring_tflops", "ratio", "placement", "phase", "levels"} <= set(row)
        assert not any(isinstance(value, (list, dict)) for value in row.values())


def test_command_solves_a_budget(folder, tmp_path):
    path = tmp_path / "flops.json"
    budget = UNetFlops(unet_config(folder), width=256, height=256).average(0.4, steps=50).tflops
    options = ("--size", "256", "--placement", "early", "--budget", str(budget))
    run = _run("--model", folder, *options, "--json", str(path))
    assert run.exit_code == 0, run.output
    (average,) = [row for row in json.loads(path.read_text())["rows"] if row["phase"] == "average"]
    assert average["tflops"] == pytest.approx(budget, rel=1e-3)
    assert average["ratio"] == pytest.approx(0.4, abs=0.02)
    assert f"{average['ratio']:.4f}" in run.output


def test_command_counts_what_a_file_of_options_holds(folder, tmp_path):
    path, file = tmp_path / "flops.json", tmp_path / "options.json"
    options = atedm.Options(ratio={2: 0.4, 3: 0.6}, recovery="cached", schedule=["whole", "pruned", "reused", "reused"])
    options.save(file)
    common = ("--model", folder, "--size", "256", "--options", str(file))
    run = _run(*common, "--steps", "8", "--json", str(path))
    assert run.exit_code == 0, run.output
    rows = {row["phase"]: row["tflops"] for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["full", "whole", "all pruned", "reused", "average"]
    assert rows["full"] == rows["whole"] > rows["all pruned"] > rows["reused"]
    assert rows["average"] == pytest.approx((2 * rows["whole"] + 2 * rows["all pruned"] + 4 * rows["reused"]) / 8)
    assert "reused: 4 of 8" in run.output
    atedm.Options(schedule=atedm.Adaptive()).save(file)
    run = _run(*common)
    assert run.exit_code == 0 and "only a run can tell its FLOPs" in run.output and "average" not in run.output
    run = _run(*common, "--budget", "0.2")
    assert run.exit_code == 2 and "which chooses as it runs" in run.output


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("--preset", "paper", "--options", "x.json"), "--preset"),
        (("--preset", "no-such"), "--preset"),
        (("--ratio", "1.5"), "--ratio"),
        (("--levels", "two"), "--levels"),
        (("--levels", "1", "--size", "64"), "--levels"),
        (("--placement", "late"), "--placement"),
        (("--size", "1001"), "--size"),
        (("--model", "no-such-model"), "--model"),
        (("--budget", "-1"), "--budget"),
        (("--model", "{folder}", "--budget", "900", "--size", "64", "--placement", "early"), "--budget"),
        (("--paper", "--size", "512"), "--paper"),
        (("--steps", "0"), "--steps"),
    ],
)
def test_errors_name_the_option(folder, arguments, option):
    run = _run(*(each.format(folder=folder) for each in arguments))
    assert run.exit_code == 2
    assert option in run.output


def test_steps_of_four_kinds(sdxl, small):
    options = atedm.Options(recovery="cached", staleness="drift", ranking=None, schedule=atedm.Every(2, "pruned"))
    assert sdxl.of_kind(options, "reused").unet / sdxl.full().unet == pytest.approx(0.014, abs=1e-3)
    assert small.of_kind(options, "whole") == small.full()
    by_rank = atedm.Options(recovery="cached", staleness="drift")
    alone, ranked = (small.of_kind(each, "pruned") for each in (options, by_rank))
    assert alone.unet < ranked.unet < small.full().unet and alone.scoring == 0 < ranked.scoring
    assert small.of_kind(options, "light").unet > alone.unet
    kinds = options.kinds_of(5)
    assert kinds == ["whole", "reused", "pruned", "reused", "pruned"]
    total = sum(small.of_kind(options, kind).unet for kind in kinds)
    assert small.mean(options, kinds).unet == round(total / 5)
    with pytest.raises(ValueError, match="which chooses as it runs; expected a fixed one"):
        small.average(0.5, steps=5, schedule=atedm.Adaptive())


def test_a_warm_start_is_counted_by_its_fewer_iterations(small):
    """By the same counter, which must not take one setting's ranking for another's."""

    def ranking(**changes):
        options = replace(PUBLISHED, schedule=None, **changes)
        return (
            small.of_kind(options, "pruned").scoring - small.of_kind(replace(options, ranking=_free), "pruned").scoring
        )

    def _free(q, k, lse):
        return lse

    one = ranking(max_iterations=1)
    assert one > 0
    assert ranking() == 5 * one and ranking(warm_start=True) == WARM_ITERATIONS * one
    assert ranking(warm_start=True, max_iterations=2) == 2 * one
