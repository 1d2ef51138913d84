"""Captioned scenes: what the captions, factors and masks say is what the picture shows."""

import re

import numpy as np
import pytest
import torch

from common.data import scenes
from common.data.scenes import BACKGROUNDS, COLOURS, FACTORS, RELATIONS, SHAPES, STYLES, Scene, Thing, captioned, concept, factors, render

PLAIN = captioned(400, seed=3, styled=0.0, under_specified=0.0)
MIXED = captioned(400, seed=4)


def centre_of(mask: np.ndarray) -> tuple[float, float]:
    """Of the bounding box."""
    y, x = np.nonzero(mask)
    return (x.min() + x.max() + 1) / 2, (y.min() + y.max() + 1) / 2


def nearest(colour: np.ndarray, palette: dict) -> str:
    return min(palette, key=lambda name: np.abs(colour - np.array(palette[name])).sum())


def test_the_masks_are_the_shapes():
    """Areas and symmetries by geometry, of a shape as wide as half of a large image."""
    areas = {"circle": np.pi, "square": 4 * 0.89**2, "triangle": 2.0, "cross": 4 * (2 * 0.38 - 0.38**2), "ring": np.pi * (1 - 0.5**2)}
    for shape in SHAPES:
        inside = render(Scene((Thing(shape, "red", 0.5, 0.5, 0.25),), "black"), 256).instances == 1
        assert inside.sum() / 64**2 == pytest.approx(areas[shape], rel=0.02), shape
        assert np.array_equal(inside, inside[:, ::-1])
        assert np.array_equal(inside, inside[::-1]) == (shape != "triangle")


def test_instances_depth_and_order():
    back, front = Thing("square", "red", 0.45, 0.5, 0.2), Thing("circle", "blue", 0.6, 0.5, 0.2)
    picture = render(Scene((back, front), "white"), 64)
    assert set(np.unique(picture.instances)) == {0, 1, 2}
    y, x = np.mgrid[:64, :64] + 0.5
    inside = np.hypot(x - 0.6 * 64, y - 32) < 0.2 * 64 - 1
    assert (picture.instances[inside] == 2).all()  # also where the square lies
    assert [np.unique(picture.depth[picture.instances == k]).tolist() for k in (0, 1, 2)] == [[0], [pytest.approx(0.7)], [1]]
    blue = picture.image[:, inside] / 255
    assert np.abs(blue - np.array(COLOURS["blue"])[:, None]).max() < 0.01


def test_colours_and_backgrounds_are_those_of_the_caption():
    for image, scene, caption, instances in zip(PLAIN.images.numpy(), PLAIN.scenes, PLAIN.captions, PLAIN.instances.numpy(), strict=True):
        assert nearest(np.median(image[:, instances == 0], 1) / 255, BACKGROUNDS) in caption
        for k, thing in enumerate(scene.things, 1):
            if thing.texture == "plain":
                core = image[:, instances == k] / 255
                assert f"{nearest(np.median(core, 1), COLOURS)} {thing.shape}" in caption


def test_relations_and_places_are_those_of_the_picture():
    words, seen = "|".join(RELATIONS["beside"] + RELATIONS["stacked"]), set()
    for scene, caption, instances in zip(MIXED.scenes, MIXED.captions, MIXED.instances.numpy(), strict=True):
        centres = [centre_of(instances == k + 1) for k in range(len(scene.things))]
        if relation := re.search(rf"(\w+) ({words}) an? (?:.*?)({'|'.join(SHAPES)})", caption):
            first, said, _ = relation.groups()
            a, b = centres if scene.things[0].shape == first else centres[::-1]
            if scene.things[0].shape != scene.things[1].shape:
                assert {"left of": a[0] < b[0], "right of": a[0] > b[0], "above": a[1] < b[1], "below": a[1] > b[1]}[said], caption
            seen.add(said)
        if place := re.search(r"at the (\w+)", caption):
            dx, dy = centres[0][0] - 16, centres[0][1] - 16
            sideways = abs(dx) > abs(dy)
            where = ("left" if dx < 0 else "right") if sideways else ("top" if dy < 0 else "bottom")
            where = "center" if max(abs(dx), abs(dy)) < 3 else where
            assert place[1] == where
            seen.add(where)
    assert seen == {"left of", "right of", "above", "below", "center", "left", "right", "top", "bottom"}


def test_captions_tell_what_the_shares_say():
    captions = captioned(2000, seed=5, size=8).captions
    colours, styles = "|".join(COLOURS), "|".join(STYLES)
    share = lambda pattern: np.mean([bool(re.search(pattern, caption)) for caption in captions])
    assert share(rf"\b({colours})\b (?!background)") == pytest.approx(0.6, abs=0.04)
    assert share(rf", ({styles}) style$") == pytest.approx(0.4, abs=0.04)
    assert share(r"on a \w+ background") == pytest.approx(0.6 + 0.4 * 0.5, abs=0.04)
    assert not any(re.search(r"\ba orange|\ban [^o]", caption) for caption in captions)


def test_factors_name_the_scene():
    for scene in MIXED.scenes:
        named = {name: options[i] if i >= 0 else None for (name, options), i in zip(FACTORS.items(), factors(scene), strict=True)}
        first, second = (*scene.things, None)[:2]
        assert (named["shape"], named["colour"], named["texture"]) == (first.shape, first.colour, first.texture)
        assert named["second shape"] == (second.shape if second else None)
        assert (named["background"], named["style"]) == (scene.background, scene.style)
        assert scenes.describe(first) in scenes.full_caption(scene)
        assert (named["layout"] in ("beside", "stacked")) == (second is not None)


def test_a_scene_depends_on_its_seed_and_index_alone():
    whole, part, other = captioned(12, 7), captioned(4, 7, start=5), captioned(12, 8)
    for field in ("images", "instances", "depth"):
        assert torch.equal(getattr(whole, field)[5:9], getattr(part, field))
    assert whole.captions[5:9] == part.captions
    assert whole.scenes[5:9] == part.scenes
    assert whole.captions != other.captions
    larger = captioned(4, 7, size=64, start=5)
    assert larger.scenes == part.scenes
    assert tuple(larger.images.shape) == (4, 3, 64, 64)


@pytest.mark.parametrize("style", STYLES)
def test_styles_change_the_picture_and_depend_on_the_hue(style):
    scene = PLAIN.scenes[0]
    plain, one, two = (render(scene._replace(style=s, hue=h)).image for s, h in (("", 0), (style, 0.1), (style, 0.6)))
    assert np.abs(plain.astype(int) - one).mean() > 8
    assert np.abs(one.astype(int) - two).mean() > 3


def test_concepts_differ_from_each_other_and_from_all_that_captions_name():
    things = [concept(k) for k in range(16)]
    images = {render(Scene((thing,), "gray")).image.tobytes() for thing in things}
    assert len(images) == 16
    assert not {thing.texture for thing in things} & set(scenes.TEXTURES)
    assert all(thing.colour != thing.second for thing in things)
