"""The recipe: which model, what to erase from it and how, and what to write. A TOML file with a schema."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from bakeout.editor import methods
from bakeout.editor.errors import InputError
from bakeout.editor.model import BUILTIN
from bakeout.editor.prompts import Pair, Template, pairs_from_file, pairs_from_pack, pairs_from_template
from bakeout.editor.text_files import MAX_NAME, path_inside, read_text, text_fault

# What a bake can write; the first one holds nothing but weights.
TARGETS = ("diffusers", "onnx")
# Where a compiled target leaves constant hidden units out, an FFN's width is a multiple of it; 0 keeps all units.
SHRINKS = (0, 1, 8, 64)
DEFAULT_SHRINK = 8
MAX_BYTES = 100_000
MAX_CONCEPT = 200
MAX_EDITS = 100
# Of a picture's side, and of pictures at a time.
MAX_SIZE = 32_768
Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
INTEGER_LIMIT = 2**63  # TOML's; longer ones Python reads, but may refuse to print

_SOURCES = ({"pack"}, {"file"}, {"target", "reference"}, {"target", "reference", "lists"})
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]{1,60}")


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Prompts(_Table):
    """Where an edit's prompt pairs come from: a pack, a file, or a template; exactly one of them.

    Attributes:
        pack: a key of `prompts.PACKS`.
        file: a file as `prompts.pairs_from_file` reads it, in the recipe's folder or below.
        target: the template's prompt with the concept.
        reference: the template's prompt without.
        lists: the template's lists, which go side by side.
    """

    pack: str | None = None
    file: str | None = None
    target: str | None = None
    reference: str | None = None
    lists: dict[str, tuple[str, ...]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_one_source(self) -> Self:
        if {name for name, value in self if value not in (None, {})} not in _SOURCES:
            raise InputError(
                'give either pack = "…", or file = "…", or target = "…" and reference = "…" with or without lists = {…}'
            )
        if self.file is not None:
            path_inside(Path(), self.file)
        return self

    def pairs(self, concept: str, profile: str | None, folder: Path) -> tuple[Pair, ...]:
        """The pairs for a concept; `profile` chooses among a pack's, `folder` is the recipe's.

        Raises:
            InputError: there are no such pairs.
        """
        if self.pack is not None:
            return pairs_from_pack(self.pack, concept, profile)
        if self.file is not None:
            return pairs_from_file(path_inside(folder, self.file))
        return pairs_from_template(Template(str(self.target), str(self.reference), self.lists), concept)


class EditRecipe(_Table):
    """One concept to erase.

    Attributes:
        method: a key of `methods.METHODS`.
        concept: what to erase, in the user's words; `{concept}` in the prompts of a template or pack.
        profile: a published set of settings, by the method's name for it; None is the method's default.
        prompts: where the prompt pairs come from.
        settings: what wins over the profile, as the method's `Settings` has it.
    """

    method: str = Field(description=f"the erasure method, one of {', '.join(methods.METHODS)}")
    concept: str = Field(description="what to erase, in your words")
    profile: str | None = None
    prompts: Prompts = Field(description='where the prompt pairs come from, for example { pack = "style" }')
    settings: dict[str, Any] = Field(default_factory=dict, validate_default=True)

    @field_validator("method")
    @classmethod
    def _method_exists(cls, name: str) -> str:
        methods.method(name)
        return name

    @field_validator("concept")
    @classmethod
    def _concept_is_one_line(cls, concept: str) -> str:
        return _line(concept, MAX_CONCEPT)

    @field_validator("prompts")
    @classmethod
    def _prompts_expand(cls, prompts: Prompts, info: ValidationInfo) -> Prompts:
        # A file is read when its pairs are asked for: only `load` knows where the recipe lies.
        if prompts.file is None and "concept" in info.data:
            prompts.pairs(info.data["concept"], info.data.get("profile"), Path())
        return prompts

    @field_validator("settings")
    @classmethod
    def _settings_fit_the_method(cls, settings: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "profile" in settings:
            raise InputError("profile is no setting; write it beside method, above the settings")
        for name, value in settings.items():
            if isinstance(value, int) and abs(value) >= INTEGER_LIMIT:
                raise InputError(f"{name!a:.100} is beyond 64 bits; give a smaller number")
        if "method" in info.data and "profile" in info.data:
            _method_settings(info.data["method"], info.data["profile"], settings)
        return settings

    def method_settings(self) -> BaseModel:
        """The method's `Settings`, from the profile and the settings given."""
        return _method_settings(self.method, self.profile, self.settings)

    def pairs(self, folder: Path) -> tuple[Pair, ...]:
        """The prompt pairs; a file's path is relative to `folder`, the recipe's.

        Raises:
            InputError: the file cannot be read, or a line of it is no pair.
        """
        return self.prompts.pairs(self.concept, self.profile, folder)


class Range(_Table):
    """A size of what a compiled target takes: the least, the one it is made fast for, and the most.

    In a recipe also one integer, which is all three, or a list of the three.
    """

    min: int = Field(strict=True, ge=1, le=MAX_SIZE)
    opt: int = Field(strict=True, ge=1, le=MAX_SIZE)
    max: int = Field(strict=True, ge=1, le=MAX_SIZE)

    @model_validator(mode="before")
    @classmethod
    def _from_numbers(cls, given: object) -> object:
        match given:
            case [least, opt, most]:
                return {"min": least, "opt": opt, "max": most}
            case list() | tuple():
                raise InputError(f"it has {len(given)} numbers; give one, or the least, the usual and the most")
            case int() if not isinstance(given, bool):
                return {"min": given, "opt": given, "max": given}
            case Mapping() | Range():
                return given
        raise InputError("it is no whole number; give one, or a list of the least, the usual and the most")

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if not self.min <= self.opt <= self.max:
            raise InputError(f"{self.min}, {self.opt}, {self.max} do not rise; give the least, the usual and the most")
        return self


class Tensorrt(_Table):
    """How `bakeout export --target tensorrt` makes engines, unless it is told otherwise.

    Attributes:
        precision: of the networks, of `PRECISIONS`.
        width: of pictures, in pixels; None is what the model draws unless told otherwise, and so is `height`.
        height: see `width`.
        batch: pictures at a time.
    """

    precision: Precision = "fp16"
    width: Range | None = None
    height: Range | None = None
    batch: Range = Range(min=1, opt=1, max=1)


class Validation(_Table):
    """How `bakeout validate` judges what is baked, unless it is told otherwise; recorded in the artifact."""

    profile: Literal["quick", "release"] = "quick"


class Recipe(_Table):
    """What to bake.

    `model_dump(mode="json")` is the recipe as JSON, the same for the same recipe wherever it lies.

    Attributes:
        version: of this format.
        model: what `open_model` takes; see `source`.
        edits: one for each concept; their order changes nothing.
        targets: what to write, of `TARGETS`; None is left to `written`.
        shrink: compiled targets leave out hidden units that the edits make constant, so that an FFN's width is a
            multiple of this; of `SHRINKS`, where 0 keeps all.
        validation: how the artifact is judged.
        tensorrt: how engines are made of it, where somebody asks for them.
    """

    version: Literal[1] = Field(default=1, description="the version of recipes that this bakeout reads")
    model: str = Field(
        description="shapes, a diffusers folder, a .safetensors checkpoint, or a model's id on the Hugging Face hub"
    )
    edits: tuple[EditRecipe, ...] = Field(
        min_length=1, max_length=MAX_EDITS, description="what to erase: a table [[edits]] for each concept"
    )
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)
    shrink: int = Field(
        default=DEFAULT_SHRINK,
        strict=True,
        description="the width of FFNs that lose constant hidden units is a multiple of it, 0 keeps all",
    )
    validation: Validation = Validation()
    tensorrt: Tensorrt = Tensorrt()
    _folder: Path = PrivateAttr(default=Path())

    @field_validator("version", mode="before")
    @classmethod
    def _version_is_an_integer(cls, version: object) -> object:
        # To Python they equal 1.
        if isinstance(version, bool | float):
            raise InputError(f"it is {_told(version)}; write the integer 1")
        return version

    @field_validator("model")
    @classmethod
    def _model_is_one_line(cls, model: str) -> str:
        return _line(model, MAX_NAME)

    @field_validator("targets")
    @classmethod
    def _targets_exist(cls, targets: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if targets is None:
            return None
        for target in targets:
            if target not in TARGETS:
                raise InputError(f"there is no target {target!a:.100}; choose of {', '.join(TARGETS)}")
        if len(set(targets)) < len(targets):
            raise InputError("a target is named twice; name each once")
        # Their order means nothing, so it does not show in what is baked.
        return tuple(sorted(targets, key=TARGETS.index))

    @field_validator("shrink")
    @classmethod
    def _shrink_is_one_of_them(cls, shrink: int) -> int:
        if shrink not in SHRINKS:
            raise InputError(f"it is {_told(shrink)}; choose of {', '.join(map(str, SHRINKS))}")
        return shrink

    @property
    def written(self) -> tuple[str, ...]:
        """The targets that a bake writes: those named, else `diffusers` if every edit folds into weights, else `onnx`.

        Raises:
            InputError: `diffusers` is named, and an edit does not fold.
        """
        whys = [methods.method(it.method).unfoldable(it.method_settings()) for it in self.edits]
        unfolded = next((number for number, why in enumerate(whys) if why is not None), None)
        if unfolded is None:
            return self.targets or ("diffusers",)
        if "diffusers" in (self.targets or ()):
            raise InputError(
                f"edits[{unfolded}] (concept {self.edits[unfolded].concept!a}) does not fold into weights, because "
                f'{whys[unfolded]}, and a diffusers folder holds nothing else: write targets = ["onnx"], or choose '
                "settings that fold"
            )
        return self.targets or ("onnx",)

    @property
    def folder(self) -> Path:
        """Where the recipe lies, and relative paths in it start; the working directory if it was not loaded."""
        return self._folder

    @property
    def source(self) -> str:
        """`model` for `open_model`: a relative path that exists beside the recipe is that path.

        Everything else is left as it stands: a built-in name, a hub id, a path from the working directory.
        """
        beside = self._folder / self.model
        return str(beside) if self.model not in BUILTIN and os.path.lexists(beside) else self.model

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a recipe.

        Raises:
            InputError: there is no such file, it is not TOML, or not a recipe: names the key, what was given, and what
                is allowed.
        """
        file = Path(path)
        text = read_text(file, MAX_BYTES)
        try:
            given = tomllib.loads(text)
        except RecursionError:
            raise InputError(f"{file} is not a recipe: its brackets nest too deeply; take some out") from None
        except ValueError as error:
            fault = str(error)[:200]
            raise InputError(f"{file} is not TOML: {fault[:1].lower()}{fault[1:]}; mend it there") from None
        try:
            recipe = cls.model_validate(given)
        except ValidationError as error:
            raise InputError(f"{file}: {_sentence(error, cls, given)}") from None
        recipe._folder = file.parent
        return recipe


def _line(text: str, limit: int) -> str:
    if fault := text_fault(text, limit):
        raise InputError(f"it {fault}")
    return text.strip()


def _method_settings(name: str, profile: str | None, settings: Mapping[str, Any]) -> BaseModel:
    return methods.method(name).Settings.model_validate(
        {**settings, **({} if profile is None else {"profile": profile})}
    )


# What pydantic says of a type, in the words of TOML.
_TYPES = {
    "string_type": "be text in quotes",
    "tuple_type": "be a list",
    "list_type": "be a list",
    "dict_type": "be a table",
    "model_type": "be a table",
    "bool_type": "be true or false",
    "bool_parsing": "be true or false",
    "int_parsing_size": "be smaller",
}


def _sentence(error: ValidationError, recipe: type[Recipe], given: Mapping[str, Any]) -> str:
    """The first fault and how many others there are. An unknown key comes first: often it is why another is missing."""
    faults: list[Any] = sorted(error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden")
    # A list with a faulty entry is also said to be too short, because the entry is not counted.
    faults = [it for it in faults if it["type"] != "too_short" or len(it["input"]) < it["ctx"]["min_length"]]
    told = _fault(faults[0], recipe, given)
    others = len(faults) - 1
    return told + (f" (and {others} other fault{'s' * (others > 1)})" if others else "")


def _fault(fault: Any, recipe: type[Recipe], given: Mapping[str, Any]) -> str:
    kind, place = fault["type"], fault["loc"]
    if len(place) == 4 and place[0] == "edits" and place[2:] == ("settings", "profile"):
        place = (*place[:2], "profile")  # where the recipe has it
    key = _dotted(place)
    fields = _fields(place[:-1], recipe, given)
    description = fields[str(place[-1])].description if place and place[-1] in fields else None
    if kind == "extra_forbidden":
        close = get_close_matches(str(place[-1])[:60], fields, n=1)
        cure = f"perhaps you mean {close[0]}" if close else "take it out"
        return f"{key} is not known: {cure}; the keys here are {', '.join(fields)}"
    if kind == "missing":
        return f"{key} is missing: give {description or 'it'}"
    if kind == "value_error":
        return f"{key}: {fault['ctx']['error']}"
    if place == ("edits",) and isinstance(fault["input"], dict):
        return "edits is one table: write it as [[edits]], with two brackets"
    if kind in ("too_short", "too_long"):
        said = fault["ctx"]
        bound = f"at least {said['min_length']}" if kind == "too_short" else f"at most {said['max_length']}"
        return f"{key} is a list of {len(fault['input'])}: it must have {bound}"
    allowed = _TYPES.get(kind) or re.sub(r"^\w+ should ", "", fault["msg"])
    return f"{key} is {_told(fault['input'])}: it must {allowed}" + (f" ({description})" if description else "")


def _fields(place: tuple[int | str, ...], recipe: type[Recipe], given: Mapping[str, Any]) -> Mapping[str, FieldInfo]:
    """What the table at a place may hold; nothing where the keys are the user's own."""
    match place:
        case ():
            return recipe.model_fields
        case ("edits", int()):
            return EditRecipe.model_fields
        case ("edits", int(), "prompts"):
            return Prompts.model_fields
        case ("edits", int(number), "settings"):
            settings = methods.method(given["edits"][number]["method"]).Settings
            return {name: field for name, field in settings.model_fields.items() if name != "profile"}
        case ("validation",):
            return Validation.model_fields
        case ("tensorrt",):
            return Tensorrt.model_fields
    return {}


def _dotted(place: tuple[int | str, ...]) -> str:
    """A place as a recipe's reader writes it: edits[0].settings.sparsity."""
    steps = [
        f"[{step}]" if isinstance(step, int) else f".{step}" if _PLAIN_KEY.fullmatch(step) else f".{step!a:.60}"
        for step in place
    ]
    return "".join(steps).removeprefix(".") or "the recipe"


def _told(value: object) -> str:
    """What was given, in TOML's words; never a whole table or list, which may be large or nest deeply."""
    match value:
        case bool():
            return str(value).lower()
        case int() if abs(value) >= INTEGER_LIMIT:
            return "a number beyond 64 bits"
        case dict():
            return "a table"
        case list() | tuple():
            return "a list"
        case str():
            return f"{value!a:.100}"
    return f"{value!s:.100}"
