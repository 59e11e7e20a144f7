from bakeout.builtin.shapes.evaluation import scenes_with, scenes_without, uniform_scenes
from bakeout.builtin.shapes.scenes import OBJECTS


def test_scenes_with_a_concept_are_uniform_in_everything_else():
    scenes = scenes_with("style", "striped", 40)
    assert {scene.style for scene in scenes} == {"striped"}
    assert [scene.object for scene in scenes] == [scene.object for scene in uniform_scenes(40)]


def test_scenes_without_concepts_are_the_first_that_show_none_of_them():
    scenes = scenes_without(["star", "striped"], 40)
    others = [it for it in uniform_scenes(200) if it.object != "star" and it.style != "striped"]
    assert scenes == others[:40]


def test_few_are_left_where_nearly_everything_is_left_out():
    assert {scene.object for scene in scenes_without(OBJECTS[1:], 5)} == {OBJECTS[0]}
    assert scenes_without(OBJECTS, 5) == []
