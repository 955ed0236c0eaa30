"""What a run of many pictures writes about itself: whose it is, and its times. What is damaged is named."""

import pytest

from atedm.app.prompts import picture_path
from atedm.app.run_record import Times, claim
from atedm_bench.quality.timing import _kept_times

ESCAPES = '{"model": "\\u001b[31m", "cases": [], "settings": {}}'
DAMAGED = [
    "[" * 100_000,
    ESCAPES,
    '{"model": ',
    "[]",
    "null",
    "{}",
    '{"cases": 3, "settings": {}}',
    '{"cases": [], "settings": null}',
]


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_record_of_a_run_is_named(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json is damaged: .*expected the file that a run writes"):
        claim(tmp_path, "m", {"weights": "w"}, [], {"full": None})
    assert (tmp_path / "run.json").read_text() == text


def test_pictures_of_which_nothing_is_known_are_not_gone_on_with(tmp_path):
    stray = picture_path(tmp_path / "pruned", 0)
    stray.parent.mkdir()
    stray.touch()
    with pytest.raises(ValueError, match=r"holds pictures \(pruned/00000\.png\) but no run\.json"):
        claim(tmp_path, "m", {"weights": "w"}, [], {"full": None})
    assert not (tmp_path / "run.json").exists()


DAMAGED_TIMES = [
    *("", "[]", "[" * 100_000, '{"seconds": 3}', '{"seconds": {"cpu": 1}, "kinds": {}}'),
    *(f'{{"seconds": {{}}, "kinds": {{"whole": {n}}}}}' for n in ("Infinity", "-3", "0", "NaN", "1e12", '"3"')),
    '{"seconds": {"cpu": {"full": [NaN]}}, "kinds": {}}',
    '{"seconds": {}, "kinds": {"nonsense": 3}}',
]


@pytest.mark.parametrize("text", DAMAGED_TIMES, ids=range(len(DAMAGED_TIMES)))
def test_damaged_times_are_named(tmp_path, text):
    (tmp_path / "times.json").write_text(text)
    with pytest.raises(ValueError, match=r"times\.json is damaged: .*expected the file that a run writes"):
        Times.read(tmp_path, "cpu")


def test_times_are_those_of_all_starts_on_a_device(tmp_path):
    for device, seconds in (("one", 2.0), ("two", 7.0), ("one", 4.0)):
        times = Times.read(tmp_path, device)
        times.note("pruned", seconds, ["whole", "reused", "reused"])
        times.write()
    assert (Times.read(tmp_path, "one").median("pruned"), Times.read(tmp_path, "two").median("pruned")) == (3.0, 7.0)
    assert Times.read(tmp_path, "three").median("pruned") == 4.0  # of all, as none was made there
    assert Times.read(tmp_path, "one").median("full") is None
    assert Times.read(tmp_path, "three").kinds == {"whole": 3, "reused": 6}


@pytest.mark.parametrize("text", ['{"a":1', "[]", '{"seconds": [1]}', '{"seconds": {"full": ["x"]}}'])
def test_damaged_times_of_unets_are_named(tmp_path, text):
    (tmp_path / "unet-seconds.json").write_text(text)
    with pytest.raises(ValueError, match=r"unet-seconds\.json is damaged"):
        _kept_times(tmp_path / "unet-seconds.json", {})
    assert _kept_times(tmp_path / "absent.json", {}) == {}
