"""The drawings, their captions, and that both say the same."""

from dataclasses import replace

import numpy as np
import pytest

from bakeout.builtin.shapes.scenes import (
    ATTRIBUTES,
    BACKGROUNDS,
    OBJECTS,
    STYLES,
    Scene,
    briefly,
    captions,
    draw,
    mentioned,
    prompt,
)
from bakeout.builtin.shapes.scenes import sample_scene as sample

PLAIN = Scene("square", "red", "plain", "snow")


def test_the_world_is_large_enough():
    assert {name: len(values) for name, values in ATTRIBUTES.items()} == {
        "object": 8,
        "colour": 8,
        "style": 4,
        "background": 6,
    }


def test_a_picture_is_64_pixels_of_rgb():
    picture = draw(PLAIN)
    assert picture.shape == (64, 64, 3)
    assert picture.dtype == np.uint8
    assert picture[32, 32].tolist() == [220, 38, 38]


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_every_value_changes_the_picture(attribute):
    pictures = {draw(replace(PLAIN, **{attribute: value})).tobytes() for value in ATTRIBUTES[attribute]}
    assert len(pictures) == len(ATTRIBUTES[attribute])


@pytest.mark.parametrize("style", STYLES)
def test_a_surface_repeats_with_the_cells_of_the_latents(style):
    picture = draw(Scene("square", "blue", style, "snow", radius=23)).astype(int)
    inside = picture[24:32, 24:32]
    np.testing.assert_array_equal(inside, picture[32:40, 32:40])
    assert np.ptp(inside, axis=(0, 1)).any() == (style != "plain")


def test_the_same_seed_draws_and_tells_the_same():
    first, second = (np.random.default_rng(7) for _ in range(2))
    scene = sample(first)
    assert scene == sample(second)
    assert captions(scene, first, 5) == captions(scene, second, 5)


def test_captions_say_nothing_that_is_not_there():
    rng = np.random.default_rng(0)
    words = {value: name for name, values in ATTRIBUTES.items() for value in values}
    for _ in range(400):
        scene = sample(rng)
        for caption in captions(scene, rng, 3):
            for word in caption.replace(",", " ").split():
                if word in words:
                    assert scene.labels[words[word]] == word, caption


def test_what_a_caption_mentions():
    assert mentioned("a photo of a red star with stripes in the sky") == {"red", "star", "striped", "sky"}
    assert mentioned("ring, checkered, night") == {"ring", "checkered", "night"}
    assert mentioned("a shape") == mentioned("") == set()
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = sample(rng)
        for caption in captions(scene, rng, 3):
            assert mentioned(caption) <= set(scene.labels.values())


def test_a_brief_prompt_names_what_it_is_asked_to():
    scene = Scene("star", "orange", "striped", "night")
    assert briefly(scene, ()) == "a shape"
    assert briefly(scene, ("colour", "background")) == "an orange shape at night"
    assert briefly(scene, ("object", "style")) == "a striped star"


def test_captions_vary_and_leave_out_colour_and_place():
    rng = np.random.default_rng(0)
    told = captions(Scene("star", "red", "striped", "night"), rng, 600)
    assert len(set(told)) > 60
    for word in ("red", "night"):
        share = sum(word in caption for caption in told) / len(told)
        assert 0.6 < share < 0.9, word


def test_captions_leave_out_the_usual_object_and_style_and_seldom_others():
    rng = np.random.default_rng(0)
    usual = captions(Scene("circle", "red", "plain", "night"), rng, 600)
    unusual = captions(Scene("star", "red", "striped", "night"), rng, 600)
    assert 0.6 < sum("circle" in caption for caption in usual) / 600 < 0.8
    assert 0.3 < sum("plain" in caption for caption in usual) / 600 < 0.5
    assert sum("star" in caption for caption in unusual) / 600 > 0.95
    assert sum("strip" in caption for caption in unusual) / 600 > 0.9


def test_prompt_names_everything():
    assert prompt(Scene("star", "orange", "striped", "grass")) == "a striped orange star on grass"
    assert prompt(Scene("ring", "orange", "plain", "night")) == "a plain orange ring at night"
    assert all(place in prompt(replace(PLAIN, background=name)) for name, place in BACKGROUNDS.items())


def test_an_unknown_value_is_refused():
    with pytest.raises(ValueError, match="no object 'dog': shapes draws circle, square"):
        Scene("dog", "red", "plain", "snow")


def test_plain_surfaces_are_twice_as_common():
    rng = np.random.default_rng(0)
    styles = [sample(rng).style for _ in range(2000)]
    assert 0.36 < styles.count("plain") / 2000 < 0.44
    objects = [sample(rng).object for _ in range(2000)]
    assert all(0.09 < objects.count(name) / 2000 < 0.16 for name in OBJECTS)
