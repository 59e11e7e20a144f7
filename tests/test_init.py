"""The recipe that `bakeout init` writes loads, says the truth about itself, and so does every line that it offers."""

from __future__ import annotations

import re
import sys
import tomllib
from types import ModuleType
from typing import Literal

import pytest
from click.testing import CliRunner
from pydantic import BaseModel, ConfigDict

from bakeout import init
from bakeout.cli import main
from bakeout.editor.errors import InputError
from bakeout.editor.methods import METHODS, method
from bakeout.editor.model import BUILTIN
from bakeout.editor.prompts import PACKS
from bakeout.editor.recipe import SHRINKS, TARGETS, EditRecipe, Recipe, Validation
from bakeout.init import recipe_text, write_recipe


class Settings(BaseModel):
    """A method's.

    Attributes:
        profile: one of two.
        words: some `text`
            on two lines.
        limit: at most so much, if at all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    profile: Literal["first", "second"] = "second"
    words: tuple[str, ...] = ("a", "b")
    limit: int | None = None
    bare: bool = False


@pytest.fixture
def other_method(monkeypatch):
    """A method whose settings have what those of the real ones may have."""
    module = ModuleType("other_method")
    module.Settings = Settings
    module.unfoldable = lambda _settings: "it is a test"
    monkeypatch.setitem(sys.modules, "other_method", module)
    monkeypatch.setitem(METHODS, "other", "other_method")
    return "other"


def invoke(*arguments: object):
    return CliRunner().invoke(main, ["init", *map(str, arguments)], prog_name="bakeout")


def load(tmp_path, text: str) -> Recipe:
    (tmp_path / "changed.toml").write_text(text, encoding="utf-8")
    return Recipe.load(tmp_path / "changed.toml")


@pytest.mark.parametrize("name", METHODS)
def test_the_written_recipe_is_what_its_comments_promise(tmp_path, name):
    path = tmp_path / "star.toml"
    done = invoke("--method", name, "-o", path)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == f"{path} is written: bake it with bakeout bake {path} -o DIR\n"
    recipe = Recipe.load(path)
    (edit,) = recipe.edits
    assert (recipe.source, recipe.validation) == ("shapes", Validation())
    # A bake takes the targets as they stand, whatever the edit needs.
    written = {"conceptprune": ("diffusers",), "snce": ("onnx",), "acterase": ("onnx",)}
    assert recipe.targets == recipe.written == written[name]
    published = next(iter(method(name).PUBLISHED.get("shapes", {}).values()), {})
    assert (edit.method, edit.concept, edit.settings) == (name, "star", published)
    # The profile that is written out is the default, so taking the line away changes nothing.
    assert edit.method_settings() == method(name).Settings(**edit.settings)
    assert all("star" in pair.target and "star" not in pair.reference for pair in edit.pairs(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["star.toml"]


def test_the_recipe_is_written_where_the_help_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke().exit_code == 0
    assert (tmp_path / "recipe.toml").read_text(encoding="utf-8") == recipe_text(next(iter(METHODS)))


@pytest.mark.parametrize("name", [*METHODS, "other"])
def test_every_single_line_on_offer_can_be_taken(tmp_path, name, other_method):
    lines = recipe_text(name).splitlines()
    head = lines[: lines.index("# In place of the star, or beside it:")]
    offers = [number for number, line in enumerate(head) if re.match(r"#\w", line)]
    assert len(offers) > 5
    usual = load(tmp_path, "\n".join(head)).model_dump()
    for number in offers:
        key = re.match(r"#(\w+) = ", head[number])[1]
        replaced = next((at for at in range(number, 0, -1) if head[at].startswith(f"{key} = ")), None)
        chosen = [line for at, line in enumerate(head) if at != replaced]
        chosen[chosen.index(head[number])] = head[number][1:]
        recipe = load(tmp_path, "\n".join(chosen))
        if replaced is None and key in recipe.edits[0].settings:
            # Its line gives it the value that it has anyway.
            assert recipe.edits[0].method_settings() == load(tmp_path, "\n".join(head)).edits[0].method_settings()
        else:
            assert recipe.model_dump() != usual


@pytest.mark.parametrize("name", METHODS)
def test_every_edit_on_offer_can_be_taken_in_place_and_beside(tmp_path, name):
    before, after = recipe_text(name).split("# In place of the star, or beside it:\n")
    offers = re.findall(r"^#\[\[edits\]\]\n(?:#.+\n)+", after, re.MULTILINE)
    assert len(offers) == 5
    for offer in offers:
        taken = re.sub("^#", "", offer, flags=re.MULTILINE)
        beside = load(tmp_path, before + taken)
        in_place = load(tmp_path, before[: before.index("[[edits]]\n# The erasure method")] + taken)
        assert len(beside.edits) == 2
        assert beside.edits[1:] == in_place.edits
        (edit,) = in_place.edits
        assert edit.pairs(tmp_path)


def test_the_published_settings_of_conceptprune_are_offered(tmp_path):
    before, after = recipe_text("conceptprune").split("# In place of the star, or beside it:\n")
    taken = re.sub(r"^#(?! )", "", after, flags=re.MULTILINE)
    edits = {edit.concept: edit.method_settings() for edit in load(tmp_path, before + taken).edits}
    assert {concept: (it.sparsity, it.first_calls) for concept, it in edits.items()} == {
        "star": (0.05, 10), "striped": (0.05, 10), "Van Gogh": (0.02, 10), "nudity": (0.01, 9),
        "parachute": (0.02, 10), "male": (0.05, 20),
    }  # fmt: skip
    released = "# Settings from the released files: sparsity = 0.01, first_calls = 10.\n"
    for concept, count in (("Van Gogh", 1), ("male", 1), ("nudity", 0)):
        (offer,) = [it for it in after.split("\n\n") if f'#concept = "{concept}"' in it]
        assert (offer + "\n").count(released) == count


def test_the_published_settings_of_snce_are_offered_with_the_file_that_they_need(tmp_path):
    before, after = recipe_text("snce").split("# In place of the star, or beside it:\n")
    taken = re.sub(r"^#(?! )", "", after, flags=re.MULTILINE)
    edits = {edit.concept: edit for edit in load(tmp_path, before + taken).edits}
    assert {concept: (it.prompts.pack, it.method_settings().sae) for concept, it in edits.items()} == {
        "star": ("shapes-object", ()), "striped": ("shapes-style", ()), "red": ("shapes-colour", ()),
        "nudity": ("nudity-100", ("sae.safetensors",)), "violence": ("violence-100", ("sae.safetensors",)),
        "gun": ("gun-100", ("sae.safetensors",)),
    }  # fmt: skip
    assert (edits["nudity"].method_settings().strength, edits["violence"].method_settings().strength) == (0.8, 1.2)


def test_the_published_settings_of_acterase_are_offered(tmp_path):
    before, after = recipe_text("acterase").split("# In place of the star, or beside it:\n")
    taken = re.sub(r"^#(?! )", "", after, flags=re.MULTILINE)
    edits = {edit.concept: edit for edit in load(tmp_path, before + taken).edits}
    star = method("acterase").PUBLISHED["shapes"]
    assert {concept: (it.prompts.pack, it.method_settings().tau) for concept, it in edits.items()} == {
        "star": ("shapes-object", next(iter(star.values()))["tau"]),
        "striped": ("shapes-style", next(iter(star.values()))["tau"]),
        "Van Gogh": ("style", 0.02), "nudity": ("nudity", 0.01), "parachute": ("object", 0.01),
        "violence": ("violence-100", 0.01),
    }  # fmt: skip


def test_the_profile_of_acterase_that_folds_is_offered_with_the_targets_that_hold_it(tmp_path):
    text = recipe_text("acterase")
    said = " ".join(text.replace("\n# ", " ").split())
    assert "because its mask differs from token to token: so no diffusers, whose folder holds nothing else." in said
    assert 'With the profile "portable" it does, and both can be written. targets = ["onnx"]' in said
    portable = text.replace('profile = "paper"\n#profile = "portable"', 'profile = "portable"')
    assert load(tmp_path, portable).written == ("onnx",)
    both = portable.replace('targets = ["onnx"]\n#targets = ["diffusers"', 'targets = ["diffusers"')
    assert load(tmp_path, both).written == ("diffusers", "onnx")


def test_what_does_not_fold_is_said_and_written_elsewhere(other_method):
    text = " ".join(recipe_text(other_method).replace("\n# ", " ").split())
    assert "does not fold into weights, because it is a test: so no diffusers, whose folder holds nothing else." in text
    assert 'targets = ["onnx"]' in text
    assert 'targets = ["diffusers"' not in text


def test_a_method_may_have_no_published_settings(other_method):
    assert "settings = {" not in recipe_text(other_method)


@pytest.mark.parametrize("name", METHODS)
def test_every_key_and_choice_is_explained(name):
    text = recipe_text(name)
    said = tomllib.loads(text)
    explained = re.sub(r"^#(\w+ = )", r"\1", text, flags=re.MULTILINE)
    keys = {*Recipe.model_fields, *(key for key in EditRecipe.model_fields if key != "settings")}
    keys |= method(name).Settings.model_fields.keys()
    assert said.keys() == Recipe.model_fields.keys()
    # A setting whose usual value is none has no line, as TOML has no word for it.
    assert all(re.search(rf"^(\[*|# )({key}\b)", explained, re.MULTILINE) for key in keys)
    comments = "".join(re.findall(r"^# .*\n", text, re.MULTILINE))
    assert all(choice in comments for choice in (*BUILTIN, *TARGETS, *METHODS, *PACKS, "quick", "release"))
    assert {int(it) for it in re.findall(r"^#?shrink = (\d+)$", text, re.MULTILINE)} == set(SHRINKS)
    assert not re.search(r".{120}", text)


def test_settings_are_shown_as_their_schema_describes_them(other_method):
    text = recipe_text(other_method)
    assert '# profile: one of two.\nprofile = "second"\n#profile = "first"\n' in text
    shown = [
        "[edits.settings]", "# words: some text on two lines.", '#words = ["a", "b"]',
        "# limit: at most so much, if at all.", "# bare", "#bare = false", "",
    ]  # fmt: skip
    assert "\n".join(shown) in text


def test_a_file_is_overwritten_only_by_force(tmp_path):
    path = tmp_path / "below" / "recipe.toml"
    path.parent.mkdir()
    path.write_text("mine")
    done = invoke("-o", path)
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert "exists already: choose another file with -o, or overwrite it with --force" in done.stderr
    assert path.read_text() == "mine"
    assert invoke("-o", path, "--force").exit_code == 0
    assert Recipe.load(path).model == "shapes"


def test_folders_on_the_way_are_made(tmp_path):
    assert invoke("-o", tmp_path / "a" / "b" / "recipe.toml").exit_code == 0
    assert (tmp_path / "a" / "b" / "recipe.toml").is_file()


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    for path, words in (
        (tmp_path, "is a folder: name a file in it with -o"),
        (tmp_path / "file" / "recipe.toml", "cannot write"),
        (tmp_path / ("x" * 300), "cannot write"),
    ):
        done = invoke("-o", path)
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
        assert words in done.stderr
    assert [it.name for it in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "recipe.toml"
    path.write_text("mine")

    def full(self, *_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_recipe(path, next(iter(METHODS)), force=True)
    assert [it.name for it in tmp_path.iterdir()] == ["recipe.toml"]
    assert path.read_text() == "mine"


def test_a_method_that_is_not_there_is_refused():
    assert invoke("--method", "none").exit_code == 2
    with pytest.raises(InputError, match="there is no method 'none'"):
        init.recipe_text("none")
