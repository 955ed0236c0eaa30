"""Writes captions of scenes in varied wording. A caption never mentions what the scene does not contain."""

from __future__ import annotations

import numpy as np

from atedm_bench.scenes.scene import Object, Scene, one_of

# Words for a size, and how often a caption mentions it.
_SIZE_WORDS = {"small": ("small", "little", "tiny"), "medium": ("medium",), "large": ("large", "big", "huge")}
_SIZE_SAID = {"small": 0.7, "medium": 0.2, "large": 0.7}

_RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}

_ROWS = {
    "left of": ("from left to right", "in a row"),
    "right of": ("from right to left",),
    "above": ("from top to bottom", "in a column"),
    "below": ("from bottom to top",),
}

_TEXTURE_WORDS = {
    "plain": ("{}", "plain {}"),
    "gradient": ("{} gradient", "shaded {}"),
    "striped": ("striped {}", "{} striped"),
    "checkered": ("checkered {}", "{} checkered"),
    "dotted": ("dotted {}", "{} dotted"),
    "speckled": ("speckled {}", "{} speckled"),
}

_OPENINGS = ("", "", "", "", "a picture of ", "an image of ", "a drawing of ")

# Fraction of the captions that name the background.
_BACKGROUND_SAID = 0.85


def _noun(rng: np.random.Generator, item: Object) -> str:
    words = [item.color, item.shape]
    if rng.random() < _SIZE_SAID[item.size]:
        words.insert(0, one_of(rng, _SIZE_WORDS[item.size]))
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return one of many captions of ``scene``: lower case, at most 30 words. It always states relations and place."""
    nouns = [_noun(rng, item) for item in scene.objects]
    if len(nouns) == 1:
        text = nouns[0] if scene.place is None else f"{nouns[0]} {scene.place}"
    elif not scene.relations:
        text = ", ".join(nouns[:-1]) + f" and {nouns[-1]}"
    elif len(nouns) == 2:
        text = f"{nouns[0]} {one_of(rng, _RELATION_WORDS[scene.relations[0].name])} {nouns[1]}"
    else:
        text = f"{nouns[0]}, {nouns[1]} and {nouns[2]} {one_of(rng, _ROWS[scene.relations[0].name])}"
    opening = one_of(rng, _OPENINGS)
    if rng.random() < _BACKGROUND_SAID:
        words = one_of(rng, _TEXTURE_WORDS[scene.background.texture]).format(scene.background.color)
        article = "an" if words[0] in "aeiou" else "a"
        text += f" {one_of(rng, ('on', 'against'))} {article} {words} background"
    return opening + text
