"""``atedm-bench unet``: every variant of a small UNet with SDXL's structure, and the shape of what is written."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from typer.testing import CliRunner

import atedm
import atedm_kernels as kernels
from atedm.app.models import SDXL_UNET, unet_inputs
from atedm.policy.options import PUBLISHED, resolve
from atedm.unet.block import PrunedBlock
from atedm_bench import host, peers, unet_calls, whole_runs
from atedm_bench import unet as bench
from atedm_bench import unet_variants as variants
from atedm_bench.measure import op_seconds_of, peak_memory_of, seconds_of
from atedm_bench.random_unet import LOGIT_STD, calibrate_attention, random_unet, sharing_weights
from atedm_bench.unet_rows import AVERAGE
from tests.helpers.counting import shared_counters

CPU = torch.device("cpu")

CHEAPER = (variants.KEYS, variants.REUSED)

SMALL = {
    **SDXL_UNET,
    "layers_per_block": 1,
    "block_out_channels": (32, 64, 128),
    "attention_head_dim": (1, 2, 4),
    "transformer_layers_per_block": (1, 2, 2),
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tensors are tiny here, and threads that wait for each other take long on a machine with other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def _a_short_run():
    """Three rounds of the host's work where a real run makes ten; runs of one size share their counts of FLOPs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "MIN_ROUNDS", 3)
        patch.setattr(unet_calls, "UNetFlops", shared_counters())
        yield


def _settings(**changes) -> unet_calls.UNetSettings:
    return unet_calls.UNetSettings(
        **{"device": CPU, "dtype": torch.float32, "width": 128, "height": 128, "repeats": 2, **changes}
    )


@pytest.fixture(scope="module")
def measured() -> tuple[bench.UNetBench, list[str]]:
    notified: list[str] = []
    run = bench.UNetBench(SMALL, _settings(batch=2))
    run.run(notified.append)
    return run, notified


@pytest.fixture(scope="module")
def unet():
    return random_unet(SMALL, dtype=torch.float32, device=CPU)


def test_every_variant_has_a_row(measured):
    run, notified = measured
    rows = {row["name"]: row for row in run.rows()}
    assert list(rows) == [*variants.VARIANTS, AVERAGE, bench.HOST]
    assert rows[variants.FULL]["speedup"] == 1
    assert len(notified) == run.work()
    del rows[bench.HOST]
    for name, row in rows.items():
        assert not any(isinstance(value, (list, dict)) for value in row.values())
        assert row["seconds"] > 0
        assert row["speedup"] == pytest.approx(rows[variants.FULL]["seconds"] / row["seconds"])
        if name == AVERAGE:
            continue
        assert row["seconds_low"] <= row["seconds"] <= row["seconds_high"]
        assert row["repeats"] == 2
        # At least the weights.
        assert row["peak_memory_bytes"] > 4 * run.settings_for_report()["parameters"]


def test_rows_of_ours_say_where_the_time_goes(measured):
    rows = {row["name"]: row for row in measured[0].rows()}
    for name, blocks in (
        (variants.OURS, 7),
        (variants.LIGHT, 3),
        (variants.PAPER, 7),
        *((name, 7) for name in (*CHEAPER, variants.CACHED)),
    ):
        row = rows[name]
        stages = {stage: row[f"stage_{stage}_seconds"] for stage in bench.STAGES}
        unused = {variants.REUSED: ("ranking", "selection"), variants.CACHED: ("source_map",)}.get(name, ())
        assert all((seconds > 0) == (stage not in unused) for stage, seconds in stages.items())
        assert row["pruned_blocks"] == blocks
        assert (row["remembered_bytes"] > 0) == (name in (variants.REUSED, variants.CACHED))
        assert (row["tokens_level_2"], row["kept_tokens_level_2"]) == (64, 24)
        assert (row["tokens_level_3"], row["kept_tokens_level_3"]) == (16, 6)
        # Not uniform maps, on which the ranking would end at once.
        ranks = name not in (variants.KEYS, variants.REUSED)
        assert row["page_rank_iterations"] > 1 if ranks else row["page_rank_iterations"] is None
    assert "stage_ranking_seconds" not in rows[variants.FULL]


def test_flops_and_phases(measured):
    rows = {row["name"]: row for row in measured[0].rows()}
    assert rows[variants.OURS]["tflops"] < rows[variants.PAPER]["tflops"] < rows[variants.FULL]["tflops"]
    assert rows[variants.TOMESD]["tflops"] == pytest.approx(rows[variants.OURS]["tflops"], rel=0.02)
    assert all(rows[name]["tflops"] == rows[variants.OURS]["tflops"] for name in CHEAPER)
    ours, reused = (rows[name]["scoring_tflops"] for name in (variants.OURS, variants.REUSED))
    assert ours > rows[variants.KEYS]["scoring_tflops"] > reused > 0
    average = rows[AVERAGE]
    assert average["derived"]
    expected = (15 * rows[variants.LIGHT]["seconds"] + 35 * rows[variants.OURS]["seconds"]) / 50
    assert average["seconds"] == pytest.approx(expected)
    assert average["run_seconds"] == pytest.approx(50 * expected)


def test_the_hosts_work_is_a_part_of_a_call(measured):
    row = measured[0].rows()[-1]
    assert row["seconds_low"] <= row["seconds_high"] and row["repeats"] == host.MIN_ROUNDS
    assert row["full_host_seconds"] > 0
    assert not any(isinstance(value, (list, dict)) for value in row.values())


def test_what_the_plugin_does_on_the_host_is_measured(monkeypatch):
    """Work that is put into each pruned block shows in full."""
    before, delay = PrunedBlock.__call__, 0.002

    def slower(block, *args, **kwargs):
        end = time.thread_time() + delay
        while time.thread_time() < end:
            pass
        return before(block, *args, **kwargs)

    monkeypatch.setattr(PrunedBlock, "__call__", slower)
    found = host.host_seconds(SMALL, 0.63, 2)
    blocks = 7
    assert found["seconds"] == pytest.approx(blocks * delay, rel=0.5)


def test_without_kernels_nothing_is_computed():
    x = torch.full((1, 4, 8), float("nan"))
    q = torch.zeros(1, 2, 16, 8)
    with host.without_kernels():
        assert torch.nn.functional.linear(x, torch.zeros(5, 8)).shape == (1, 4, 5)
        scores = torch.full((1, 2, 16), float("nan"))
        assert kernels.select_tokens(scores, 3).shape == (1, 3)  # which refuses NaN, if it looks
        out, lse = kernels.attention_with_logsumexp(q, q, q)
        assert out.shape == q.shape and lse.shape == q.shape[:3]
    with pytest.raises(ValueError, match="NaN"):
        kernels.select_tokens(scores, 3)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0)])
def test_an_empty_convolution_has_the_right_shape(kernel, stride, padding):
    layer = torch.nn.Conv2d(4, 6, kernel, stride, padding)
    x = torch.zeros(2, 4, 9, 16)
    expected = layer(x).shape
    with host.without_kernels():
        assert layer(x).shape == expected


def test_interrupted_run_keeps_what_it_has():
    only = (variants.FULL, variants.OURS, variants.LIGHT, variants.PAPER)
    run = bench.UNetBench(SMALL, _settings(width=64, height=64, only=only))

    def interrupt(what: str) -> None:
        if what.startswith(f"{variants.PAPER}: round 1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run(interrupt)
    assert [row["name"] for row in run.rows()] == [variants.FULL, variants.OURS, variants.LIGHT, AVERAGE]
    assert json.dumps(run.settings_for_report())


def test_no_round_begins_without_time(measured):
    measured_ones = measured[0].variants
    assert not bench._has_time(measured_ones, seconds=0.0)
    assert bench._has_time(measured_ones, seconds=1e6)


def test_only_the_variants_asked_for():
    run = bench.UNetBench(SMALL, _settings(width=64, height=64, only=(variants.FULL, variants.OURS)))
    notified: list[str] = []
    run.run(notified.append)
    assert [row["name"] for row in run.rows()] == [variants.FULL, variants.OURS, bench.HOST]
    assert len(notified) == run.work()
    assert run.settings_for_report()["attention_level_3"] == "flash_attention"
    assert run.rows()[1]["stages_part_of_seconds"] > 0


def test_a_missing_peer_is_said_not_raised(monkeypatch):
    def missing(self, *args):
        raise RuntimeError("tomesd is not installed")

    monkeypatch.setattr(peers.TomesdFlops, "nearest_ratio", missing)
    run = bench.UNetBench(SMALL, _settings(width=64, height=64, only=(variants.TOMESD,)))
    run.run()
    assert run.rows() == [{"name": variants.TOMESD, "error": "tomesd is not installed"}]


def test_whole_runs(tmp_path):
    wanted = (whole_runs.FULL, f"{whole_runs.PREFIX}default", f"{whole_runs.PREFIX}DeepCache 2", whole_runs.TOMESD)
    run = bench.UNetBench(SMALL, _settings(width=64, height=64, batch=2, run_steps=5, only=wanted))
    notified: list[str] = []
    run.run(notified.append)
    assert len(notified) == run.work()
    rows = {row["name"]: row for row in run.rows()}
    assert list(rows) == list(wanted)
    kinds = {name: row["kinds"] for name, row in rows.items()}
    assert list(kinds.values()) == ["5 whole", "2 whole 2 reused 1 pruned", "3 whole 2 reused", "5 merged"]
    for row in rows.values():
        assert row["run_seconds_low"] <= row["run_seconds"] <= row["run_seconds_high"]
        assert row["run_speedup"] == pytest.approx(rows[whole_runs.FULL]["run_seconds"] / row["run_seconds"])
        assert row["repeats"] == bench.RUN_REPEATS and row["run_steps"] == 5
    assert rows[whole_runs.TOMESD]["tflops"] < rows[whole_runs.FULL]["tflops"]
    assert json.dumps(run.settings_for_report())


def test_runs_are_guided_where_the_batch_is_even(monkeypatch):
    found = []
    real = StableDiffusionXLPipeline.__call__

    def calling(pipe, **arguments):
        found.append((arguments["guidance_scale"], arguments["prompt_embeds"].shape[0]))
        return real(pipe, **arguments)

    monkeypatch.setattr(StableDiffusionXLPipeline, "__call__", calling)
    for batch, expected in ((1, (1.0, 1)), (2, (whole_runs.GUIDANCE, 1)), (4, (whole_runs.GUIDANCE, 2))):
        found.clear()
        settings = _settings(width=64, height=64, batch=batch, run_steps=1, only=(whole_runs.FULL,))
        bench.UNetBench(SMALL, settings).run()
        assert set(found) == {expected}


def test_a_peer_that_fails_in_a_run_is_a_row(monkeypatch):
    def failing(pipe, interval):
        raise RuntimeError("DeepCache is not installed")

    monkeypatch.setattr("atedm_bench.methods.deepcache", failing)
    name = f"{whole_runs.PREFIX}DeepCache 2"
    run = bench.UNetBench(SMALL, _settings(width=64, height=64, run_steps=1, only=(whole_runs.FULL, name)))
    run.run()
    assert run.rows()[1:] == [{"name": name, "error": "RuntimeError: DeepCache is not installed"}]


def test_presets_run_the_steps_that_they_chose_on_the_embedded_model():
    for name in whole_runs._OURS:
        options = whole_runs._options(name, 0.63)
        preset = whole_runs._OURS[name]
        chosen = resolve(preset, {})
        assert replace(options, schedule=chosen.schedule) == chosen
        assert set(options.kinds_of(25)) <= chosen.steps.kinds


def test_calibration_reaches_the_spread(unet):
    positional, kwargs = unet_inputs(unet, width=128, height=128)
    spread = calibrate_attention(unet, lambda: unet(*positional, **kwargs))
    assert spread == pytest.approx([LOGIT_STD] * 14, rel=0.02)
    assert unet(*positional, **kwargs)[0].isfinite().all()


def test_shared_weights_are_the_same_memory(unet):
    copy = sharing_weights(unet)
    for ours, theirs in zip(copy.parameters(), unet.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()
        assert ours.stride() == theirs.stride()
    atedm.apply(copy, PUBLISHED, schedule=None)
    positional, kwargs = unet_inputs(unet, width=128, height=128)
    assert not atedm.pruned_blocks(unet)
    with torch.no_grad():
        assert not torch.equal(copy(*positional, **kwargs)[0], unet(*positional, **kwargs)[0])
        atedm.remove(copy)
        assert torch.equal(copy(*positional, **kwargs)[0], unet(*positional, **kwargs)[0])


def test_random_weights_repeat():
    first, second = (random_unet(SMALL, dtype=torch.bfloat16, device=CPU, seed=3) for _ in range(2))
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_measuring_a_call():
    q = torch.randn(1, 2, 64, 16)

    def call() -> torch.Tensor:
        return torch.ops.atedm.attention_with_logsumexp(q, q, q)[0]

    assert seconds_of(call, CPU) > 0
    assert set(op_seconds_of(call, CPU)) == {"attention_with_logsumexp"}
    assert op_seconds_of(lambda: q + 1, CPU) == {}
    megabytes = 64
    assert peak_memory_of(lambda: torch.ones(megabytes, 1 << 18), CPU) > megabytes << 20


def _run(*arguments: str):
    from atedm_bench.cli import app

    return CliRunner().invoke(app, ["unet", *arguments], env={"TERM": "dumb"})


def test_command_writes_its_report(tmp_path):
    from diffusers import UNet2DConditionModel

    UNet2DConditionModel.from_config(SMALL).save_config(tmp_path / "model")
    path = tmp_path / "deep" / "bench.json"
    options = ["--device", "cpu", "--dtype", "fp32", "--size", "64", "--repeats", "1", "--run", "2"]
    names = (variants.FULL, variants.OURS, f"{whole_runs.PREFIX}full", f"{whole_runs.PREFIX}fast")
    options += [word for name in names for word in ("--variant", name)]
    run = _run("--model", str(tmp_path / "model"), *options, "--json", str(path))
    assert run.exit_code == 0, run.output
    document = json.loads(path.read_text())
    assert {"command", "device", "versions", "date", "settings", "rows"} == set(document)
    assert document["settings"]["logit_std"] == pytest.approx(LOGIT_STD, rel=0.05)
    assert document["settings"]["finished"]
    assert [row["name"] for row in document["rows"]] == [*names, bench.HOST]
    for name in ("full", "ours", "G-WPR", "Whole runs of 2 steps", "run: fast", "every kernel left out"):
        assert name in run.output


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("--dtype", "int8"), "--dtype"),
        (("--device", "abacus"), "--device"),
        (("--ratio", "0"), "--ratio"),
        (("--size", "1001"), "--size"),
        (("--minutes", "0"), "--minutes"),
        (("--compile-mode", "fastest"), "--compile-mode"),
        (("--model", "no-such-model"), "--model"),
        (("--variant", "mine"), "--variant"),
        (("--variant", "run: full"), "--variant"),
        (("--run", "0"), "--run"),
    ],
)
def test_errors_name_the_option(arguments, option):
    run = _run("--device", "cpu", *arguments)
    assert run.exit_code == 2
    assert option in run.output
