"""Options as a value: JSON, presets, changes."""

import json
from dataclasses import replace

import pytest
import torch

import atedm
from atedm.policy.options import PUBLISHED

CHOSEN = [
    atedm.Options(),
    atedm.Options(ratio={2: 0.5, 3: 0.75}, levels=(2, 3), schedule=None, ranking="cross", tolerance=0.0),
    atedm.Options(0.9, (3,), atedm.DSAP(0.25), "paper", "self", "bicubic", "mean", 64, 7, 0.01, 3, 2),
    *atedm.PRESETS.values(),
]


@pytest.mark.parametrize("options", CHOSEN)
def test_json_gives_the_same_options_back(options, tmp_path):
    path = tmp_path / "options.json"
    options.save(path)
    assert atedm.Options.load(path) == options
    assert atedm.Options.from_dict(json.loads(json.dumps(options.to_dict()))) == options
    assert [file.name for file in tmp_path.iterdir()] == ["options.json"]


def test_what_a_file_leaves_out_is_the_default(tmp_path):
    path = tmp_path / "options.json"
    path.write_text('{"ratio": 0.5}')
    assert atedm.Options.load(path) == atedm.Options(ratio=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"ration": 0.5}', "'ration' is not an option; expected some of ratio"),
        ('{"ratio": 1.5}', "ratio is 1.5; expected from 0"),
        ('{"ratio": {"two": 0.5}}', "ratio names level 'two'; expected a level number"),
        ('{"placement": ["early"]}', r"placement is \['early'\]; expected one of 'early', 'paper'"),
        ('{"recovery": {}}', "recovery is {}; expected one of 'similarity'"),
        ('{"schedule": {"name": []}}', r"schedule is named \[\]; expected one of DSAP"),
        ('{"ratio": {"2": 0.5, "02": 0.7}}', "ratio names level '02'; expected a level number"),
        ('{"ratio": ' * 100_000, "holds no options"),
        ('{"schedule": {"part": 0.5}}', "schedule is .*expected .*fraction"),
        ('{"schedule": 0.3}', r"schedule is 0\.3; expected an atedm.DSAP"),
        ("[0.5]", "options are a list; expected a mapping"),
        ('{"ratio": 0.', "holds no options"),
        ("", "holds no options"),
    ],
)
def test_a_file_that_does_not_fit_is_named_with_what_is_wrong(text, message, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        atedm.Options.load(path)
    assert str(path) in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"ratio": 0.5}', encoding="utf-8-sig")
    assert atedm.Options.load(path) == atedm.Options(ratio=0.5)


def test_a_function_has_no_json(tmp_path):
    options = atedm.Options(ranking=lambda q, k, lse: lse)
    with pytest.raises(TypeError, match="ranking is <function"):
        options.save(tmp_path / "options.json")
    assert not list(tmp_path.iterdir())


def test_apply_takes_presets_options_and_changes(unet, inputs):
    def sample(*arguments, **changes):
        with atedm.applied(unet, *arguments, **changes):
            return unet(**inputs).sample

    published = replace(PUBLISHED, ratio=0.5, levels=(3,), placement="paper")
    expected = sample(published)
    assert torch.equal(sample("paper-dagger", ratio=0.5), expected)
    assert not torch.equal(sample("paper", ratio=0.5), expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ("papper", ValueError, "options is 'papper'; expected an atedm.Options or a preset: default, paper, "),
        (0.5, TypeError, "options is a float; expected an atedm.Options or the name of a preset"),
    ],
)
def test_unknown_options_are_refused_and_nothing_is_applied(unet, options, error, message):
    with pytest.raises(error, match=message):
        atedm.apply(unet, options)
    assert atedm.pruned_blocks(unet) == []


def test_presets_cannot_be_changed():
    with pytest.raises(TypeError):
        atedm.PRESETS["mine"] = atedm.Options()


def test_the_papers_presets_are_the_published_method():
    for name, levels in (("paper", None), ("paper-dagger", (3,))):
        options = atedm.PRESETS[name]
        assert options == atedm.Options(
            ratio=0.63,
            levels=levels,
            schedule=atedm.DSAP(0.3),
            placement="paper",
            ranking="self",
            recovery="similarity",
            reduction="rms",
            rank_every=1,
            staleness=None,
            warm_start=False,
        )


def test_the_default_prunes_by_attention_and_the_other_presets_reuse_alone():
    default = atedm.Options()
    assert default.ranking == "self" and default.prunes and "reused" in default.steps.kinds
    for name in ("quality", "fast"):
        assert atedm.PRESETS[name].steps.kinds == {"whole", "reused"} and not atedm.PRESETS[name].prunes


def test_a_recovery_that_does_not_fit_the_papers_placement_says_what_does():
    with pytest.raises(ValueError, match="placement is 'paper' with recovery='cached'; expected 'early', or the pub"):
        atedm.Options(placement="paper")


def test_a_ratio_of_zero_changes_nothing_unless_a_schedule_asks_for_it(unet, inputs):
    def samples(**options):
        with atedm.applied(unet, **options), atedm.record(unet, tokens=False) as recording:
            found = [unet(**{**inputs, "timestep": t}).sample for t in torch.tensor([999.0, 500.0, 1.0])]
        return torch.stack(found), recording.kinds

    full = torch.stack([unet(**{**inputs, "timestep": t}).sample for t in torch.tensor([999.0, 500.0, 1.0])])
    for options in ({}, {"schedule": None}, {"schedule": atedm.DSAP()}):
        assert torch.equal(samples(ratio=0, **options)[0], full)
    found, kinds = samples(ratio=0, schedule=["whole", "reused", "reused"])
    assert kinds == ["whole", "reused", "reused"] and not torch.equal(found, full)


def test_a_ratio_of_0_compares_on_a_unet_without_attention_too(make_unet, make_inputs):
    kinds = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3, "mid_block_type": None}
    unet, inputs = make_unet(**kinds), make_inputs()
    with torch.no_grad():
        full = unet(**inputs).sample
        for options in ({"ratio": 0}, {"ratio": 0.0, "schedule": None}):
            atedm.apply(unet, **options)
            assert atedm.pruned_blocks(unet) == []
            assert torch.equal(unet(**inputs).sample, full)
            assert torch.equal(atedm.remove(unet)(**inputs).sample, full)
    with pytest.raises(ValueError, match="the UNet has no attention block; expected at least one to prune"):
        atedm.apply(unet, ratio=0.5)
