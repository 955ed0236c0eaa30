"""The judge's rules: every asked object in shape and colour, every asked relation."""

from atedm_bench.quality.checker import Found
from atedm_bench.quality.judge import judge
from atedm_bench.scenes import Background, Object, Relation, Scene


def seen(kind, x, y):
    color, shape = kind.split()
    return Found(shape, color, x, y, 0.9)


def asked(*kinds, relations=()):
    objects = tuple(Object(kind.split()[1], kind.split()[0], "medium", 0.5, 0.5, 0.1) for kind in kinds)
    return Scene(objects, Background("white"), tuple(relations))


LEFT = (Relation(0, "left of", 1),)


def test_everything_there():
    verdict = judge(
        asked("red circle", "blue star", relations=LEFT), [seen("red circle", 0.2, 0.5), seen("blue star", 0.8, 0.4)]
    )
    assert verdict.right
    assert (verdict.objects, verdict.relations, verdict.extra) == (2, 1, 0)


def test_wrong_color_wrong_shape_and_nothing():
    scene = asked("red circle")
    for found in ([seen("blue circle", 0.5, 0.5)], [seen("red square", 0.5, 0.5)], []):
        verdict = judge(scene, found)
        assert not verdict.right
        assert verdict.objects == 0
        assert verdict.extra == len(found)


def test_swapped_colors_are_wrong():
    verdict = judge(asked("red circle", "blue star"), [seen("blue circle", 0.2, 0.5), seen("red star", 0.8, 0.5)])
    assert verdict.objects == 0


def test_relation_the_other_way_round():
    scene = asked("red circle", "blue star", relations=LEFT)
    verdict = judge(scene, [seen("red circle", 0.8, 0.5), seen("blue star", 0.2, 0.5)])
    assert (verdict.objects, verdict.relations) == (2, 0)
    assert not verdict.right
    for name, first, second in (
        ("above", (0.5, 0.2), (0.5, 0.7)),
        ("below", (0.5, 0.7), (0.5, 0.2)),
        ("right of", (0.7, 0.5), (0.2, 0.5)),
    ):
        scene = asked("red circle", "blue star", relations=(Relation(0, name, 1),))
        assert judge(scene, [seen("red circle", *first), seen("blue star", *second)]).right
        assert not judge(scene, [seen("red circle", *second), seen("blue star", *first)]).right


def test_a_double_does_not_spoil_the_relation_but_is_extra():
    scene = asked("red circle", "blue star", relations=LEFT)
    found = [seen("red circle", 0.9, 0.1), seen("red circle", 0.2, 0.5), seen("blue star", 0.5, 0.5)]
    verdict = judge(scene, found)
    assert verdict.right
    assert verdict.extra == 1


def test_one_object_cannot_play_two_parts():
    scene = asked("red circle", "red circle")
    assert judge(scene, [seen("red circle", 0.5, 0.5)]).objects == 1
    assert judge(scene, [seen("red circle", 0.2, 0.5), seen("red circle", 0.8, 0.5)]).objects == 2


def test_a_missing_object_fails_its_relation():
    verdict = judge(asked("red circle", "blue star", relations=LEFT), [seen("blue star", 0.8, 0.5)])
    assert (verdict.objects, verdict.relations) == (1, 0)
