"""Recipes as people write them, right and wrong: what loads, and the one sentence about what does not."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from types import ModuleType
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from bakeout.editor import recipe as recipes
from bakeout.editor.errors import InputError
from bakeout.editor.methods import METHODS
from bakeout.editor.prompts import PACKS, Pair, pairs_from_pack
from bakeout.editor.recipe import EditRecipe, Range, Recipe, Tensorrt


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    profile: Literal["released", "paper"] = "released"
    sparsity: float = Field(default=0.02, gt=0, le=1, description="a share of each row")
    calls: int = 10
    exact: bool = True
    name: str = Field(default="toy", min_length=2)
    layers: tuple[int, ...] = Field(default=(1, 2), min_length=2, max_length=3)
    gated: bool = False

    @field_validator("calls")
    @classmethod
    def _even(cls, calls: int) -> int:
        if calls % 2:
            raise ValueError("it must be even")
        return calls


@pytest.fixture(autouse=True)
def _method(monkeypatch):
    module = ModuleType("toy_method")
    module.Settings = Settings
    module.unfoldable = lambda settings: "it asks the prompt" if settings.gated else None
    monkeypatch.setitem(sys.modules, "toy_method", module)
    monkeypatch.setitem(METHODS, "toy", "toy_method")


EDIT = """
[[edits]]
method = "toy"
concept = "star"
prompts = { pack = "shapes-object" }
"""
MINIMAL = 'model = "shapes"\n' + EDIT
FULL = """
version = 1
model = "some/model"
targets = ["diffusers"]
[validation]
profile = "release"
[[edits]]
method = "toy"
concept = " Van Gogh "
profile = "paper"
prompts = { pack = "style" }
[[edits]]
method = "toy"
concept = "star"
settings = { sparsity = 0.5, exact = false, layers = [1, 2] }
[edits.prompts]
target = "a {hue} {concept}"
reference = "a {hue} shape"
lists = { hue = ["red", "blue"] }
"""


@pytest.fixture
def load(tmp_path):
    def load(text: str | bytes, kind: type[Recipe] = Recipe) -> Recipe:
        path = tmp_path / "recipe.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return kind.load(path)

    return load


@pytest.fixture
def fault(load, tmp_path):
    """What is said of a recipe, after its name: one line, never more than a terminal's few."""

    def fault(text: str | bytes) -> str:
        with pytest.raises(InputError) as caught:
            load(text)
        said = str(caught.value)
        assert said.isprintable()
        assert len(said) < 800
        path, _, rest = said.partition(str(tmp_path / "recipe.toml"))
        assert path == ""
        return rest.removeprefix(": ")

    return fault


def test_what_is_left_out_has_its_default(load):
    recipe = load(MINIMAL)
    assert (recipe.version, recipe.model, recipe.targets, recipe.validation.profile) == (1, "shapes", None, "quick")
    assert recipe.written == ("diffusers",)
    (edit,) = recipe.edits
    assert (edit.method, edit.concept, edit.profile, edit.settings) == ("toy", "star", None, {})
    assert edit.method_settings() == Settings()


def test_everything_that_is_given_is_there(load, tmp_path):
    recipe = load(FULL)
    style, star = recipe.edits
    assert (recipe.model, recipe.validation.profile, style.concept) == ("some/model", "release", "Van Gogh")
    assert style.method_settings() == Settings(profile="paper")
    assert style.pairs(tmp_path) == pairs_from_pack("style", "Van Gogh", "paper")
    assert star.method_settings() == Settings(sparsity=0.5, exact=False, layers=(1, 2))
    assert star.pairs(tmp_path) == (Pair("a red star", "a red shape"), Pair("a blue star", "a blue shape"))


def test_the_dump_is_the_recipe_and_says_not_where_it_lay(load, tmp_path):
    dump = load(FULL).model_dump(mode="json")
    text = json.dumps(dump, allow_nan=False)
    assert Recipe.model_validate(json.loads(text)).model_dump(mode="json") == dump
    assert str(tmp_path) not in text
    # The order of the keys in a file is not the recipe's.
    keys = FULL.replace('concept = " Van Gogh "\nprofile = "paper"', 'profile = "paper"\nconcept = "Van Gogh"')
    assert keys != FULL
    assert json.dumps(load(keys).model_dump(mode="json")) == text
    assert dump["edits"][1]["settings"] == {"sparsity": 0.5, "exact": False, "layers": [1, 2]}


def test_a_recipe_does_not_change(load):
    recipe = load(MINIMAL)
    for table, key in ((recipe, "model"), (recipe.edits[0], "concept"), (recipe.validation, "profile")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(table, key, "other")


def test_a_subclass_loads_as_itself(load):
    class Front(Recipe):
        """As the front adds `bake`."""

    recipe = load(MINIMAL, Front)
    assert type(recipe) is Front
    assert recipe.folder == load(MINIMAL).folder


def test_a_settings_table_may_stand_by_itself(load):
    assert load(MINIMAL + "[edits.settings]\nsparsity = 1\n").edits[0].method_settings() == Settings(sparsity=1)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_fault(load, encoding):
    text = MINIMAL.replace("star", "étoile").replace("shapes-object", "object")
    assert load(text.encode(encoding)).edits[0].concept == "étoile"


def test_a_model_beside_the_recipe_wins_over_one_from_here(load, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    for place in (elsewhere / "some" / "model", tmp_path / "shapes", elsewhere / "only-here"):
        place.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)

    def source(model: str) -> str:
        return load(MINIMAL.replace('"shapes"', json.dumps(model))).source

    assert source("some/model") == "some/model"
    (tmp_path / "some" / "model").mkdir(parents=True)
    assert source("some/model") == str(tmp_path / "some" / "model")
    assert source("./some/../some/model") == str(tmp_path / "some/../some/model")
    # A built-in name is always the built-in model; its folder is reached by a path.
    assert source("shapes") == "shapes"
    assert source("./shapes") == str(tmp_path / "shapes")
    assert source("only-here") == "only-here"
    assert source(str(elsewhere)) == str(elsewhere)
    assert source("x" * 300) == "x" * 300


def test_a_recipe_that_was_not_loaded_counts_from_here(load, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    recipe = Recipe.model_validate(load(MINIMAL.replace("shapes", "model", 1)).model_dump())
    monkeypatch.chdir(tmp_path)
    assert recipe.source == "model"


def test_a_file_of_prompts_lies_in_the_recipes_folder(load, tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "p.csv").write_text("a star,a shape\n")
    recipe = load(MINIMAL.replace('pack = "shapes-object"', 'file = "lists/p.csv"'))
    assert recipe.edits[0].pairs(recipe.folder) == (Pair("a star", "a shape"),)
    missing = load(MINIMAL.replace('pack = "shapes-object"', 'file = "none.csv"'))
    with pytest.raises(InputError, match=r"none\.csv does not exist"):
        missing.edits[0].pairs(missing.folder)


@pytest.mark.parametrize(
    "file", ["/etc/p.csv", "../p.csv", "a/../../p.csv", "C:/p.csv", "..\\p.csv", "\\\\host\\p.csv"]
)
def test_a_file_of_prompts_lies_nowhere_else(fault, file):
    said = fault(MINIMAL.replace('pack = "shapes-object"', f"file = '{file}'"))
    assert said.startswith("edits[0].prompts: the file '")
    assert said.endswith("is outside the recipe's folder; put it beside the recipe")


def test_a_link_that_stays_inside_a_name_is_the_users_own(load, tmp_path):
    (tmp_path / "real.csv").write_text("a,b\n")
    (tmp_path / "..p.csv").symlink_to(tmp_path / "real.csv")
    recipe = load(MINIMAL.replace('pack = "shapes-object"', 'file = "..p.csv"'))
    assert recipe.edits[0].pairs(recipe.folder) == (Pair("a", "b"),)


MODEL = "shapes, a diffusers folder, a .safetensors checkpoint, or a model's id on the Hugging Face hub"
OF_THIS = "(the version of recipes that this bakeout reads)"
VERSION = f"it must be 1 {OF_THIS}"
KEYS = "version, model, edits, targets, shrink, validation, tensorrt"
SHRINK = "the width of FFNs that lose constant hidden units is a multiple of it, 0 keeps all"
EDITS = "what to erase: a table [[edits]] for each concept"
EDIT_KEYS = "method, concept, profile, prompts, settings"
PROMPT_KEYS = "pack, file, target, reference, lists"
UNPARSED = "unable to parse string as a number"
ONE_MORE = "(and 1 other fault)"
SETTINGS = "sparsity, calls, exact, name, layers, gated"
SHARE = "a share of each row"
PROMPTS = 'where the prompt pairs come from, for example { pack = "style" }'


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("version = 1", "version = 2", f"version is 2: {VERSION}"),
        (
            "version = 1",
            "version = 0x" + "f" * 6000,
            f"version is a number beyond 64 bits: it must be smaller {OF_THIS}",
        ),
        ("version = 1", 'version = "1"', f"version is '1': {VERSION}"),
        ("version = 1", "version = true", "version: it is true; write the integer 1"),
        ("version = 1", "version = 1.0", "version: it is 1.0; write the integer 1"),
        ('model = "some/model"', "", f"model is missing: give {MODEL}"),
        ('model = "some/model"', "model = 3", f"model is 3: it must be text in quotes ({MODEL})"),
        ('"some/model"', '" "', "model: it is empty; write something"),
        ('"some/model"', r'"a\u0000b"', r"model: it has the control character '\x00' at place 2; take it out"),
        ('["diffusers"]', '"diffusers"', "targets is 'diffusers': it must be a list"),
        ('["diffusers"]', "[]", "targets is a list of 0: it must have at least 1"),
        ('["diffusers"]', '["diffusers", "onx"]', "targets: there is no target 'onx'; choose of diffusers, onnx"),
        ('["diffusers"]', '["diffusers", "diffusers"]', "targets: a target is named twice; name each once"),
        ('["diffusers"]', "[1]", "targets[0] is 1: it must be text in quotes"),
        ('["diffusers"]', '["onnx"]\nshrink = 3', "shrink: it is 3; choose of 0, 1, 8, 64"),
        ('["diffusers"]', '["onnx"]\nshrink = "8"', f"shrink is '8': it must be a valid integer ({SHRINK})"),
        ('["diffusers"]', '["onnx"]\nshrink = true', f"shrink is true: it must be a valid integer ({SHRINK})"),
        ('["diffusers"]', '["onnx"]\nshrink = 8.0', f"shrink is 8.0: it must be a valid integer ({SHRINK})"),
        ('"release"', '"slow"', "validation.profile is 'slow': it must be 'quick' or 'release'"),
        (
            'profile = "release"',
            'prfile = "quick"',
            "validation.prfile is not known: perhaps you mean profile; the keys here are profile",
        ),
        (
            "[validation]",
            "[valdation]",
            f"valdation is not known: perhaps you mean validation; the keys here are {KEYS}",
        ),
        (
            'method = "toy"\nconcept = "star"',
            'method = "tou"\nconcept = "star"',
            f"edits[1].method: there is no method 'tou'; choose one of {', '.join(METHODS)}, toy",
        ),
        ('concept = "star"', "", "edits[1].concept is missing: give what to erase, in your words"),
        (
            'concept = "star"',
            'consept = "star"',
            f"edits[1].consept is not known: perhaps you mean concept; the keys here are {EDIT_KEYS} {ONE_MORE}",
        ),
        ('concept = "star"', 'concept = ""', "edits[1].concept: it is empty; write something"),
        (
            'concept = "star"',
            r'concept = "a\nb"',
            r"edits[1].concept: it has the control character '\n' at place 2; take it out",
        ),
        ('concept = "star"', f'concept = "{"x" * 201}"', "edits[1].concept: it has 201 characters; write at most 200"),
        (
            'concept = "star"',
            "concept = 2020-01-02",
            "edits[1].concept is 2020-01-02: it must be text in quotes (what to erase, in your words)",
        ),
        ('profile = "paper"', 'profile = "papr"', "edits[0].profile is 'papr': it must be 'released' or 'paper'"),
        (
            "sparsity = 0.5",
            "sparsity = 5",
            f"edits[1].settings.sparsity is 5: it must be less than or equal to 1 ({SHARE})",
        ),
        (
            "sparsity = 0.5",
            "sparsity = nan",
            f"edits[1].settings.sparsity is nan: it must be less than or equal to 1 ({SHARE})",
        ),
        (
            "sparsity = 0.5",
            'sparsity = "x"',
            f"edits[1].settings.sparsity is 'x': it must be a valid number, {UNPARSED} ({SHARE})",
        ),
        (
            "sparsity = 0.5",
            "sparsty = 0.5",
            f"edits[1].settings.sparsty is not known: perhaps you mean sparsity; the keys here are {SETTINGS}",
        ),
        (
            "sparsity = 0.5",
            "zzz = 0.5",
            f"edits[1].settings.zzz is not known: take it out; the keys here are {SETTINGS}",
        ),
        (
            "sparsity = 0.5",
            '"a\\n" = 0.5',
            rf"edits[1].settings.'a\n' is not known: take it out; the keys here are {SETTINGS}",
        ),
        (
            "sparsity = 0.5, exact = false, layers = [1, 2]",
            "sparsity = 5, calls = 1.5, layers = []",
            f"edits[1].settings.sparsity is 5: it must be less than or equal to 1 ({SHARE}) (and 2 other faults)",
        ),
        ("sparsity = 0.5", "calls = 3", "edits[1].settings.calls: it must be even"),
        (
            "sparsity = 0.5",
            "sparsity = 0x" + "f" * 6000,
            "edits[1].settings: 'sparsity' is beyond 64 bits; give a smaller number",
        ),
        (
            "sparsity = 0.5",
            'profile = "paper"',
            "edits[1].settings: profile is no setting; write it beside method, above the settings",
        ),
        ("exact = false", 'name = "x"', "edits[1].settings.name is 'x': it must have at least 2 characters"),
        ("exact = false", "exact = {}", "edits[1].settings.exact is a table: it must be true or false"),
        ("exact = false", 'exact = "si"', "edits[1].settings.exact is 'si': it must be true or false"),
        ("layers = [1, 2]", "layers = [1]", "edits[1].settings.layers is a list of 1: it must have at least 2"),
        ("layers = [1, 2]", "layers = [1, 2, 3, 4]", "edits[1].settings.layers is a list of 4: it must have at most 3"),
        (
            "layers = [1, 2]",
            "layers = [1, true, {}]",
            "edits[1].settings.layers[2] is a table: it must be a valid integer",
        ),
        ('{ pack = "style" }', '"style"', f"edits[0].prompts is 'style': it must be a table ({PROMPTS})"),
        (
            '{ pack = "style" }',
            '{ pack = "stile" }',
            f"edits[0].prompts: there is no pack 'stile'; choose one of {', '.join(PACKS)}",
        ),
        (
            '{ pack = "style" }',
            '{ pakc = "style" }',
            f"edits[0].prompts.pakc is not known: perhaps you mean pack; the keys here are {PROMPT_KEYS}",
        ),
        ('prompts = { pack = "style" }', "", f"edits[0].prompts is missing: give {PROMPTS}"),
        (
            'lists = { hue = ["red", "blue"] }',
            "",
            "edits[1].prompts: the placeholder {hue} has no list; add hue = [...] to the lists",
        ),
        ('["red", "blue"]', '["red", 1]', "edits[1].prompts.lists.hue[1] is 1: it must be text in quotes"),
        ('["red", "blue"]', '"red"', "edits[1].prompts.lists.hue is 'red': it must be a list"),
        ('hue = ["red", "blue"]', "model = 1", "edits[1].prompts.lists.model is 1: it must be a list"),
    ],
)
def test_a_fault_is_told_by_its_key_what_was_given_and_what_is_allowed(fault, old, new, said):
    assert FULL.count(old) >= 1
    assert fault(FULL.replace(old, new, 1)) == said


@pytest.mark.parametrize(
    "prompts",
    [
        "{}",
        '{ pack = "style", file = "p.csv" }',
        '{ pack = "style", target = "a", reference = "b" }',
        '{ pack = "style", lists = { a = ["b"] } }',
        '{ target = "a" }',
        '{ reference = "a" }',
        '{ lists = { a = ["b"] } }',
        '{ file = "p.csv", lists = { a = ["b"] } }',
    ],
)
def test_prompts_come_from_one_source(fault, prompts):
    said = fault(MINIMAL.replace('{ pack = "shapes-object" }', prompts))
    assert said == (
        'edits[0].prompts: give either pack = "…", or file = "…", or target = "…" and reference = "…" with or without '
        "lists = {…}"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('model = "shapes"', f"edits is missing: give {EDITS}"),
        ('model = "shapes"\nedits = []', "edits is a list of 0: it must have at least 1"),
        (MINIMAL.replace("[[edits]]", "[edits]"), "edits is one table: write it as [[edits]], with two brackets"),
        ('model = "shapes"\nedits = [1]', "edits[0] is 1: it must be a table"),
        ('model = "shapes"\nedits = "star"', f"edits is 'star': it must be a list ({EDITS})"),
        ('model = "shapes"\n' + EDIT * 101, "edits is a list of 101: it must have at most 100"),
        ("a" + ".a" * 2_000 + " = 1\n" + MINIMAL, f"a is not known: take it out; the keys here are {KEYS}"),
    ],
)  # fmt: skip
def test_a_fault_of_the_whole_is_told(fault, text, said):
    assert fault(text).partition(" (and ")[0] == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model", " is not TOML: expected '=' after a key in a key/value pair (at end of document); mend it there"),
        ('model = "a"\nmodel = "b"', " is not TOML: cannot overwrite a value (at end of document); mend it there"),
        ("{}", " is not TOML: invalid statement (at line 1, column 1); mend it there"),
        ("a = " + "[" * 50_000, " is not a recipe: its brackets nest too deeply; take some out"),
        ("a = " + "9" * 5000, " is not TOML: exceeds the limit (4300 digits)"),
        (b'model = "\xff"', ", line 1: this is not UTF-8 text; save the file as UTF-8"),
        ("#" * 100_001, " has more than 100,000 bytes; give a smaller file"),
    ],
)  # fmt: skip
def test_what_is_no_toml_is_told(fault, text, said):
    assert fault(text).startswith(said)


def test_what_is_no_file_is_told(tmp_path):
    for path, words in ((tmp_path, "is not a file"), (tmp_path / "none.toml", "does not exist; check the path")):
        with pytest.raises(InputError, match=words):
            Recipe.load(path)


def test_a_new_target_is_one_line(load, monkeypatch):
    text = MINIMAL.replace("\n", '\ntargets = ["fax", "diffusers"]\n', 1)
    with pytest.raises(InputError, match="there is no target 'fax'"):
        load(text)
    monkeypatch.setattr(recipes, "TARGETS", ("diffusers", "fax"))
    assert load(text).targets == ("diffusers", "fax")


def test_what_is_shrunk_is_recorded(load):
    assert load(MINIMAL).model_dump(mode="json")["shrink"] == 8
    for shrink in (0, 1, 8, 64):
        assert load(MINIMAL.replace("\n", f"\nshrink = {shrink}\n", 1)).model_dump(mode="json")["shrink"] == shrink


def test_the_order_of_targets_means_nothing(load):
    said = [load(MINIMAL.replace("\n", f"\ntargets = {targets}\n", 1)).targets
            for targets in ('["onnx", "diffusers"]', '["diffusers", "onnx"]')]  # fmt: skip
    assert said == [("diffusers", "onnx")] * 2


def test_what_does_not_fold_is_written_to_graphs_alone(load):
    def recipe(targets: str = "", settings: str = "{}") -> Recipe:
        return load(f'model = "shapes"\n{targets}\n{EDIT}{EDIT.replace("star", "moon")}settings = {settings}\n')

    gated = "{ gated = true }"
    assert recipe().written == ("diffusers",)
    assert recipe('targets = ["onnx"]').written == ("onnx",)
    assert recipe('targets = ["onnx", "diffusers"]').written == ("diffusers", "onnx")
    assert recipe(settings=gated).written == recipe('targets = ["onnx"]', gated).written == ("onnx",)
    with pytest.raises(InputError, match=r"edits\[1\] \(concept 'moon'\).*because it asks.*targets = \[\"onnx\"\]"):
        _ = recipe('targets = ["diffusers", "onnx"]', gated).written


def test_an_edit_made_in_python_is_checked_as_well():
    given = {"method": "toy", "concept": "star", "prompts": {"pack": "shapes-object"}}
    assert EditRecipe(**given, settings={"sparsity": 1}).method_settings() == Settings(sparsity=1)
    with pytest.raises(ValidationError, match=r"settings\.sparsity"):
        EditRecipe(**given, settings={"sparsity": math.inf})
    with pytest.raises(ValidationError, match=r"settings\.profile"):
        EditRecipe(**given, profile="none")


def test_a_method_is_imported_only_to_check_its_settings():
    program = (
        "import sys, bakeout.editor.recipe\n"
        "print(sorted({'torch', 'numpy', 'bakeout.editor.methods.conceptprune'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("batch = 4", Range(min=4, opt=4, max=4)),
        ("batch = [1, 2, 4]", Range(min=1, opt=2, max=4)),
        ("batch = { min = 1, opt = 1, max = 8 }", Range(min=1, opt=1, max=8)),
    ],
)
def test_a_range_is_one_number_or_three(load, line, expected):
    recipe = load(f"{MINIMAL}\n[tensorrt]\n{line}\n")
    assert recipe.tensorrt.batch == expected
    assert Tensorrt.model_validate(recipe.model_dump(mode="json")["tensorrt"]) == recipe.tensorrt


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("batch = 0", "tensorrt.batch.min is 0: it must"),
        ("batch = 1.5", "tensorrt.batch: it is no whole number; give one, or a list of the least, the usual and the"),
        ("batch = true", "tensorrt.batch: it is no whole number"),
        ('batch = "4"', "tensorrt.batch: it is no whole number"),
        ("batch = [4, 2, 1]", "tensorrt.batch: 4, 2, 1 do not rise; give the least, the usual and the most"),
        ("batch = [1, 4]", "tensorrt.batch: it has 2 numbers; give one, or the least, the usual and the most"),
        ("width = 40000", "tensorrt.width.min is 40000: it must"),
        ('precision = "int8"', "tensorrt.precision is 'int8': it must"),
        ("size = 512", "tensorrt.size is not known"),
    ],
)
def test_a_fault_of_a_range_is_told(load, line, said):
    with pytest.raises(InputError) as caught:
        load(f"{MINIMAL}\n[tensorrt]\n{line}\n")
    assert said in str(caught.value)
