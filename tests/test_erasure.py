"""What `bakeout init` writes, baked, erases the star from `shapes` and leaves the rest; the judge is its detector."""

from dataclasses import replace

import pytest
import torch

from bakeout.builtin.shapes import load_detector
from bakeout.builtin.shapes.evaluation import generate, uniform_scenes
from bakeout.builtin.shapes.scenes import ATTRIBUTES, prompt
from bakeout.editor.model import open_model
from bakeout.init import recipe_text
from bakeout.recipe import Recipe

COUNT = 40


@pytest.mark.slow
def test_the_recipe_of_init_erases_the_star_and_keeps_the_rest(tmp_path):
    (tmp_path / "star.toml").write_text(recipe_text("conceptprune"), encoding="utf-8")
    artifact = Recipe.load(tmp_path / "star.toml").bake(tmp_path / "starless", device="cpu")
    erased, base = artifact.load(dtype=torch.float32), open_model("shapes").pipeline(dtype=torch.float32)
    detector = load_detector()
    scenes = uniform_scenes(2 * COUNT)
    stars = [replace(scene, object="star") for scene in scenes[:COUNT]]
    others = [scene for scene in scenes if scene.object != "star"][:COUNT]

    def seen(pipeline, some):
        return detector.classify(generate(pipeline, [prompt(scene) for scene in some]))

    # 7 of 100 stars were left in the sweep of docs/; 10 of 40 would be one chance in three thousand.
    assert sum(verdict["object"] == "star" for verdict in seen(erased, stars)) < 10
    kept = seen(erased, others)
    for name in ATTRIBUTES:
        drawn = sum(verdict[name] == getattr(scene, name) for verdict, scene in zip(kept, others, strict=True))
        assert drawn >= 0.9 * COUNT, name
    assert sum(verdict["object"] == "star" for verdict in seen(base, stars)) >= 0.95 * COUNT
