"""The lab's figures against independent definitions."""

import math
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from atedm_bench.quality import metrics
from atedm_bench.quality.checker import FEATURES, SIZE, Checker, load_checker, prepare, save_checker
from atedm_bench.quality.images import load_pictures


def pictures(count, size=64, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), np.uint8))


@pytest.fixture(scope="module")
def checker():
    torch.manual_seed(0)
    return Checker().eval().requires_grad_(False)


@pytest.mark.parametrize(("right", "count"), [(0, 10), (10, 10), (7, 20), (412, 500)])
def test_share_interval_is_wilsons(right, count):
    z = 1.959963984540054
    p = right / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    low, high = metrics.share_interval(right, count)
    assert low == pytest.approx(max(0, centre - half), abs=1e-9)
    assert high == pytest.approx(min(1, centre + half), abs=1e-9)


def test_mean_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        low, high = metrics.mean_interval(rng.normal(2.0, 1.0, 100))
        hits += low <= 2.0 <= high
    assert 88 <= hits <= 100


def test_accuracy_change_is_paired_and_in_points():
    full = (np.arange(200) % 4 > 0).astype(float)  # 150 right
    lost = full.copy()
    lost[np.flatnonzero(full)[:10]] = 0
    found = metrics.accuracy_change(lost, full)
    assert found["accuracy_change"] == pytest.approx(-5)
    # Ten of 200 pictures differ, which a normal interval puts at ± 3.0 points; unpaired it would be ± 8.7.
    assert found["accuracy_change_low"] == pytest.approx(-8.0, abs=0.7)
    assert found["accuracy_change_high"] == pytest.approx(-2.0, abs=0.7)
    assert set(metrics.accuracy_change(full, full).values()) == {0.0}


def test_psnr_one_a_picture():
    a, b = pictures(3), pictures(3, seed=1)
    a[2] = b[2]
    found = metrics.psnr(a, b)
    for n in range(2):
        square = (a[n].double() - b[n].double()).square().mean()
        assert found[n] == pytest.approx(10 * math.log10(255**2 / square), rel=1e-6)
    assert found[2] == 99.0


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise():
    a = torch.nn.functional.interpolate(pictures(2, 8).float(), (64, 64), mode="bilinear").byte()
    noise = torch.from_numpy(np.random.default_rng(1).normal(0, 1, a.shape))
    levels = [metrics.ssim((a + s * noise).clamp(0, 255).byte(), a) for s in (0, 10, 40)]
    assert np.allclose(levels[0], 1.0)
    assert (levels[0] > levels[1]).all()
    assert (levels[1] > levels[2]).all()


def test_perceptual_distance_is_zero_for_equal_pictures_and_grows(checker):
    a = pictures(2)
    noise = torch.from_numpy(np.random.default_rng(1).normal(0, 1, a.shape))
    found = [metrics.perceptual_distance(checker, (a + s * noise).clamp(0, 255).byte(), a) for s in (0, 5, 50)]
    assert (found[0] == 0).all()
    assert (found[0] < found[1]).all()
    assert (found[1] < found[2]).all()


def test_frechet_distance_is_the_formula(checker):
    reference, made = pictures(200), pictures(150, seed=1) // 2
    value, draws = metrics.FeatureDistance(checker, reference)(made)
    features = [checker.stages(prepare(x))[-1].mean((2, 3)).double().numpy() for x in (reference, made)]
    means = [x.mean(0) for x in features]
    covariances = [np.cov(x, rowvar=False) for x in features]
    product = np.linalg.eigvals(covariances[0] @ covariances[1])
    expected = (
        ((means[0] - means[1]) ** 2).sum()
        + sum(np.trace(c) for c in covariances)
        - 2 * np.sqrt(product.astype(complex)).real.sum()
    )
    assert value == pytest.approx(expected, rel=1e-4, abs=1e-6)
    spread = metrics.spread_of("d", value, draws)
    assert 0 <= spread["d_low"] < spread["d"] == value < spread["d_high"]
    assert features[0].shape[1] == FEATURES


def test_frechet_distance_can_be_asked_again(checker):
    distance = metrics.FeatureDistance(checker, pictures(100))
    first, draws = distance(pictures(80, seed=1))
    distance(pictures(80, seed=2))
    again, others = distance(pictures(80, seed=1))
    assert again == first
    assert np.array_equal(draws, others)


def test_sets_of_like_pictures_are_told_apart_by_paired_draws(checker):
    """What resampling adds to both, it does not take for a difference."""
    distance = metrics.FeatureDistance(checker, pictures(100))
    near, far = (distance(made)[1] for made in (pictures(80, seed=1), pictures(80, seed=1) // 3))
    low, high = metrics.draws_difference(far, near, 0.99)[1:]
    assert 0 < low < high
    assert metrics.draws_difference(near, near + 0.0, 0.99) == (0.0, 0.0, 0.0)


def test_saved_checker_sees_the_same(checker, tmp_path):
    save_checker(checker, tmp_path / "checker.safetensors")
    loaded = load_checker(tmp_path / "checker.safetensors")
    x = prepare(pictures(2, SIZE))
    torch.testing.assert_close(loaded(x), checker(x), rtol=1e-2, atol=1e-2)


# The head of a PNG of 40,000 by 40,000 pixels, more than pillow is willing to read.
BOMB = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
BOMB += struct.pack(">I", zlib.crc32(BOMB[-17:]))


@pytest.mark.parametrize("content", [b"", b"no picture", "truncated", BOMB], ids=["empty", "text", "truncated", "bomb"])
def test_a_damaged_picture_is_named(content, tmp_path):
    path = tmp_path / "00000.png"
    if content == "truncated":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
        content = path.read_bytes()[:4000]
    path.write_bytes(content)
    with pytest.raises(OSError, match=r"00000\.png cannot be read as a picture"):
        load_pictures([path])
