"""The procedural scenes: what a caption says is in the picture, and nothing is trained on that is held out."""

import itertools
import math

import numpy as np
import pytest

from atedm_bench.scenes import COLORS, SHAPES, Background, Object, Scene, caption, render, sample_scene
from atedm_bench.scenes.captions import _RELATION_WORDS, _SIZE_WORDS
from atedm_bench.scenes.scene import BACKGROUND_COLORS, TEXTURES, holds
from atedm_bench.scenes.split import held_out, scenes


def drawn(count, seed=0):
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(count)]


def test_same_seed_same_scenes_and_captions():
    rng, again = (np.random.default_rng(3) for _ in range(2))
    for _ in range(50):
        scene, other = sample_scene(rng), sample_scene(again)
        assert scene == other
        assert caption(scene, rng) == caption(other, again)


def test_objects_do_not_touch_stay_inside_and_differ():
    for scene in drawn(300):
        kinds = [(item.shape, item.color) for item in scene.objects]
        assert len(set(kinds)) == len(kinds) in (1, 2, 3)
        for item in scene.objects:
            assert item.color != scene.background.color
            assert item.radius <= min(item.x, item.y, 1 - item.x, 1 - item.y)
        for a, b in itertools.combinations(scene.objects, 2):
            assert math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


def test_stated_relations_hold_in_the_picture():
    related = [scene for scene in drawn(400) if scene.relations]
    assert {r.name for scene in related for r in scene.relations} == set(_RELATION_WORDS)
    for scene in related:
        _, owner = render(scene, 64)
        for relation in scene.relations:
            rows, columns = np.nonzero(owner == relation.subject)
            other_rows, other_columns = np.nonzero(owner == relation.object)
            first, second = (columns.mean(), rows.mean()), (other_columns.mean(), other_rows.mean())
            assert holds(relation.name, first, second, 0.15 * 64)


def test_captions_name_every_object_in_order_and_only_what_is_there():
    rng = np.random.default_rng(1)
    for scene in drawn(300):
        text = caption(scene, rng)
        at = -1
        for item in scene.objects:
            assert text.find(f"{item.color} {item.shape}", at + 1) > at
            at = text.find(f"{item.color} {item.shape}", at + 1)
        assert sum(text.count(shape) for shape in SHAPES) == len(scene.objects)
        assert len(text.split()) <= 30
        if text.endswith("background"):
            assert scene.background.color in text.split(" background")[0].rsplit(maxsplit=4)[-4:]
        sizes = {word for words in _SIZE_WORDS.values() for word in words}
        said = [word for word in text.split() if word in sizes]
        assert all(any(word in _SIZE_WORDS[item.size] for item in scene.objects) for word in said)


def test_hundreds_of_thousands_of_captions():
    rng = np.random.default_rng(5)
    found = {caption(sample_scene(rng), rng) for _ in range(2500)}
    # Were there only 300,000 equally likely ones, 2,500 draws would repeat about 10 times.
    assert len(found) > 2500 - 10


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [64, 100])
def test_a_shape_has_its_color_area_and_place(shape, size):
    item = Object(shape, "red", "large", 0.4, 0.55, 0.2, 0.05)
    picture, owner = render(Scene((item,), Background("white")), size)
    inside = owner == 0
    rows, columns = np.nonzero(inside)
    assert abs((columns.mean() + 0.5) / size - 0.4) < 0.02
    assert abs((rows.mean() + 0.5) / size - 0.55) < 0.02
    assert np.median(picture[inside], axis=0).tolist() == list(COLORS["red"])
    assert np.median(picture[~inside], axis=0).tolist() == list(BACKGROUND_COLORS["white"])
    areas = {
        "circle": math.pi,
        "square": 2.0,
        "triangle": 3 * math.sqrt(3) / 4,
        "star": 10 * 0.5 * 0.45 * math.sin(math.pi / 5),
        "cross": 4 * 0.34 * math.sqrt(1 - 0.34**2) * 2 - 4 * 0.34**2,
        "ring": math.pi * (1 - 0.58**2),
    }
    assert inside.mean() == pytest.approx(areas[shape] * 0.2**2, rel=0.06)


@pytest.mark.parametrize("texture", TEXTURES)
def test_textures_differ_from_plain_but_keep_the_color(texture):
    picture, _ = render(Scene((), Background("green", texture, 0.4, 0.2, 7)), 64)
    colors = np.unique(picture.reshape(-1, 3), axis=0)
    assert (len(colors) == 1) == (texture == "plain")
    if texture != "plain":
        assert len(colors) > 5 or texture == "checkered"
    assert np.abs(picture.mean((0, 1)) - BACKGROUND_COLORS["green"]).max() < 0.3 * 255


def test_the_same_scene_at_two_sizes_is_the_same_picture():
    for scene in drawn(20, seed=9):
        if scene.background.texture == "speckled":
            continue
        small, large = (render(scene, size)[0].astype(float) for size in (64, 128))
        halved = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
        assert np.abs(small - halved).mean() < 4


def test_held_out_contents_are_a_tenth_and_never_in_training():
    found = drawn(1000)
    assert 0.07 < np.mean([held_out(scene) for scene in found]) < 0.13
    rng = np.random.default_rng(0)
    assert not any(held_out(scene) for scene in itertools.islice(scenes(rng, test=False), 200))
    assert all(held_out(scene) for scene in itertools.islice(scenes(rng, test=True), 20))


def test_what_is_held_out_depends_on_the_content_alone():
    scene = drawn(1)[0]
    moved = tuple(Object(o.shape, o.color, "small", 0.5, 0.5, 0.12, 0.0) for o in scene.objects)
    ground = Background(scene.background.color, "striped", 0.9, 0.2, 1)
    assert held_out(scene) == held_out(Scene(moved, ground, scene.relations, scene.place))
