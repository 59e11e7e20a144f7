"""Of which pictures engines are made, as it is said on the command line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from bakeout.describe import described
from bakeout.editor.errors import InputError
from bakeout.editor.recipe import Range, Tensorrt
from bakeout.export.manifest import Shapes
from bakeout.serving import serving_for


def artifact(**said: object) -> Any:
    return SimpleNamespace(manifest=SimpleNamespace(recipe=said))


def one(number: int) -> Range:
    return Range(min=number, opt=number, max=number)


RECIPE = {"precision": "bf16", "width": None, "height": None, "batch": {"min": 1, "opt": 2, "max": 8}}


def test_what_is_not_said_is_the_recipes_and_else_the_defaults() -> None:
    assert serving_for(artifact(), None, None) == Tensorrt()
    assert serving_for(artifact(tensorrt=RECIPE), None, None) == Tensorrt(
        precision="bf16", batch=Range(min=1, opt=2, max=8)
    )
    assert serving_for(artifact(tensorrt=RECIPE), "512x768", "4") == Tensorrt(
        precision="bf16", width=one(512), height=one(768), batch=one(4)
    )
    assert serving_for(artifact(), "256:512x768:1024", "1:2:4") == Tensorrt(
        width=Range(min=256, opt=512, max=1024),
        height=Range(min=256, opt=768, max=1024),
        batch=Range(min=1, opt=2, max=4),
    )


@pytest.mark.parametrize(
    ("sizes", "batches", "said"),
    [
        ("512:768", None, "--size '512:768' has 2 parts; give one, or the least, the usual and the most"),
        ("512x", None, "size is '512x': write one number"),
        ("768:512:1024", None, "--size: 768, 512, 1024 do not rise; give the least, the usual and the most"),
        (None, "four", "--batch 'four' is none; write a number as 4, or three as 1:1:4"),
        (None, "0", "--batch '0' is none"),
        (None, "1:2", "--batch '1:2' has 2 parts"),
        (None, "4:2:1", "--batch: 4, 2, 1 do not rise"),
        ("0", None, "--size: 0 is out of range"),
        ("99999", None, "--size: 99999 is out of range"),
    ],
)
def test_what_cannot_be_read_is_refused(sizes: str | None, batches: str | None, said: str) -> None:
    with pytest.raises(InputError) as caught:
        serving_for(artifact(), sizes, batches)
    assert said in str(caught.value)


@pytest.mark.parametrize("said", [5, {"batch": "many"}, {"batch": [1, 2]}, {"fax": 1}])
def test_a_manifest_whose_recipe_says_nonsense_is_refused(said: object) -> None:
    with pytest.raises(InputError, match="of which pictures engines are to be made; take the artifact from its"):
        serving_for(artifact(tensorrt=said), "512", "1")


def test_the_pictures_are_told_in_words() -> None:
    sizes = {"width": Range(min=256, opt=512, max=512), "height": one(512)}
    assert described(Shapes(batch=one(1), **sizes)) == "1 picture of 256x512 to 512x512 pixels at a time"
    assert described(Shapes(batch=Range(min=1, opt=1, max=4), width=one(64), height=one(64))) == (
        "1 to 4 pictures of 64x64 pixels at a time"
    )
