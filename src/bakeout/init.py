"""The recipe that `bakeout init` writes: it runs as it stands, and explains every key."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from inspect import getdoc
from pathlib import Path
from string import Template
from textwrap import wrap
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel

from bakeout.editor.errors import InputError
from bakeout.editor.methods import METHODS, method
from bakeout.editor.model import BUILTIN
from bakeout.editor.prompts import PACKS
from bakeout.editor.recipe import DEFAULT_SHRINK, SHRINKS, TARGETS

WIDTH = 110

_RECIPE = Template("""\
# A recipe of bakeout: which model, what to erase from it, and what to write.
#
#   bakeout bake FILE -o DIR
#
# As it stands, it erases the object "star" from shapes, the small model that comes with bakeout, and runs on a CPU.
# A line that starts with "# " explains. One that starts with "#" alone is another choice: to take it, delete the "#"
# and the line that it replaces.

# The format of this file.
version = 1

# What to edit: a built-in model ($builtin), a diffusers folder, a single .safetensors checkpoint, or the id of a model
# on the Hugging Face hub. A relative path that exists beside this file is that; else it counts from where you are.
model = "shapes"
#model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
#model = "models/my-model.safetensors"

# What to write. There is: $all_targets.
$targets

# Hidden units of an FFN that the edits hold constant are left out of compiled targets ($compiled), which are smaller
# and faster for it. The number of those that stay is a multiple of this. There is: $shrinks; with 0 all stay.
shrink = $shrink
$other_shrinks

# How `bakeout validate` judges the result unless it is told otherwise: "quick", or "release" before you publish.
[validation]
profile = "quick"
#profile = "release"

# Of which pictures `bakeout export --target tensorrt` makes engines, unless it is told otherwise: pictures at a time,
# and their sides in pixels, which without a line here are what the model draws unless told otherwise. A list is the
# least, the one to be fast at, and the most.
[tensorrt]
precision = "fp16"
#precision = "bf16"
#precision = "fp32"
batch = 1
#batch = [1, 1, 4]
#width = [256, 512, 768]
#height = [256, 512, 768]

# What to erase: one [[edits]] for each concept. The order of several changes nothing.
[[edits]]
# The erasure method. There is: $methods.
method = "$method"

# The concept, in your words. It stands for {concept} in prompts, and is recorded in what is baked.
concept = "star"

$profiles

# Pairs of prompts with the concept (target) and without (reference), from one of three sources. A built-in pack:
# $packs.
prompts = { pack = "shapes-object" }
# Two prompts with placeholders. The i-th pair has the i-th entry of each list, so all lists are equally long.
#prompts = { target = "a {hue} {concept}", reference = "a {hue} shape", lists = { hue = ["red", "blue"] } }
# A file in this folder or below: .csv or .tsv with two columns, target and reference, or .jsonl with these two keys.
#prompts = { file = "pairs.csv" }

# The method's settings. What stands here wins over the profile; the lines that start with "#" are what "$profile" has.
[edits.settings]
$settings

# In place of the star, or beside it:

$offers
""")


class _Offer(NamedTuple):
    """An edit to take in place of the recipe's, or beside it.

    Attributes:
        title: what it erases.
        concept: the recipe's word for it.
        pack: of prompts.
        kind: of concept, for which the method may know settings.
        settings: what else it needs.
    """

    title: str
    concept: str
    pack: str
    kind: str
    settings: Mapping[str, Any] = MappingProxyType({})


_STYLE_OF_SHAPES = _Offer("A style of shapes (striped, dotted, checkered)", "striped", "shapes-style", "shapes")
_COMMON = (
    _STYLE_OF_SHAPES,
    _Offer("With a Stable Diffusion as the model, a style", "Van Gogh", "style", "style"),
    _Offer("Nudity", "nudity", "nudity", "nudity"),
    _Offer("An object", "parachute", "object", "object"),
)
_OFFERS = (*_COMMON, _Offer("A gender, so that the other is drawn", "male", "male-to-female", "gender"))
_SAE = {"sae": ["sae.safetensors"]}
_OFFERS_OF: Mapping[str, Sequence[_Offer]] = {
    "acterase": (*_COMMON, _Offer("Violence", "violence", "violence-100", "violence")),
    "snce": (
        _STYLE_OF_SHAPES,
        _Offer("A colour of shapes", "red", "shapes-colour", "shapes"),
        _Offer(
            "With a Stable Diffusion as the model, for whose text encoder you trained sae.safetensors, nudity",
            "nudity", "nudity-100", "nudity", _SAE,
        ),
        _Offer("Violence", "violence", "violence-100", "violence", _SAE),
        _Offer("An object", "gun", "gun-100", "gun", _SAE),
    ),
}  # fmt: skip


def recipe_text(name: str) -> str:
    """A commented recipe that erases a star from `shapes` by the method `name`, its settings from the method's schema.

    Raises:
        InputError: there is no such method.
    """
    settings = method(name).Settings
    published = getattr(method(name), "PUBLISHED", {})
    chosen: Mapping[str, Any] = next(iter(published.get("shapes", {}).values()), {})
    why = method(name).unfoldable(settings(**chosen))
    profiles = get_args(settings.model_fields["profile"].annotation)
    folding = [it for it in profiles if method(name).unfoldable(settings(**{**chosen, "profile": it})) is None]
    return _RECIPE.substitute(
        method=name,
        methods=", ".join(METHODS),
        builtin=", ".join(BUILTIN),
        all_targets=", ".join(TARGETS),
        targets="\n".join(_target_lines(why, folding)),
        compiled=", ".join(TARGETS[1:]),
        shrinks=", ".join(map(str, SHRINKS)),
        shrink=DEFAULT_SHRINK,
        other_shrinks="\n".join(f"#shrink = {it}" for it in SHRINKS if it != DEFAULT_SHRINK),
        packs="\n# ".join(wrap(", ".join(PACKS), WIDTH)),
        profile=settings().profile,  # type: ignore[attr-defined]
        profiles="\n".join(_profile_lines(settings)),
        settings="\n".join(_setting_lines(settings, published.get("shapes", {}))),
        offers="\n\n".join(
            "\n".join(_offer_lines(name, offer, published.get(offer.kind, {}), settings()))
            for offer in _OFFERS_OF.get(name, _OFFERS)
        ),
    )


def write_recipe(path: Path, name: str, *, force: bool = False) -> None:
    """Write `recipe_text` to `path`; the file is there whole or not at all.

    Raises:
        InputError: there is no such method, the file exists and `force` is not given, or it cannot be written.
    """
    text = recipe_text(name)
    part = path.with_name(f".{path.name}.part")
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder: name a file in it with -o, for example {path / 'recipe.toml'}")
        if path.exists() and not force:
            raise InputError(f"{path} exists already: choose another file with -o, or overwrite it with --force")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): choose another file with -o") from error


def _target_lines(why: str | None, folding: Sequence[str]) -> Iterator[str]:
    """What to write.

    `why` says why the edit does not fold into weights, None if it does; `folding` are the profiles with which it would.
    """
    both = 'targets = ["diffusers", "onnx"]'
    if why is None:
        yield from ('targets = ["diffusers"]', f"#{both}")
        return
    said = (
        f"With the settings below the edit does not fold into weights, because {why}: so no diffusers, whose folder "
        "holds nothing else."
    )
    if folding:
        said += f" With the profile {' or '.join(map(json.dumps, folding))} it does, and both can be written."
    yield from (f"# {line}" for line in wrap(said, WIDTH))
    yield 'targets = ["onnx"]'
    if folding:
        yield f"#{both}"


def _profile_lines(settings: type[BaseModel]) -> Iterator[str]:
    """What a profile is, the default one, and the others as lines to choose."""
    default = settings().profile  # type: ignore[attr-defined]
    yield "# A published set of the method's settings, which also chooses between the two versions of a pack's prompts."
    yield from (f"# {line}" for line in wrap(_descriptions(settings)["profile"], WIDTH))
    yield f"profile = {json.dumps(default)}"
    for other in get_args(settings.model_fields["profile"].annotation):
        if other != default:
            yield f"#profile = {json.dumps(other)}"


def _offer_lines(
    name: str, offer: _Offer, published: Mapping[str, Mapping[str, Any]], usual: BaseModel
) -> Iterator[str]:
    """An edit to take, with the first of the published settings; the others are told."""
    yield f"# {offer.title}:"
    for source, chosen in published.items():
        yield from (f"# {line}" for line in wrap(f"Settings {source}: {_inline(chosen)}.", WIDTH))
    yield from ("#[[edits]]", f'#method = "{name}"', f'#concept = "{offer.concept}"')
    yield f'#prompts = {{ pack = "{offer.pack}" }}'
    wanted = {**offer.settings, **next(iter(published.values()), {})}
    if changed := {key: value for key, value in wanted.items() if value != getattr(usual, key)}:
        yield f"#settings = {{ {_inline(changed)} }}"


def _inline(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {json.dumps(value)}" for key, value in values.items())


def _setting_lines(settings: type[BaseModel], published: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Each setting as it is described, and its usual value as a line to change; TOML has no word for none.

    Those of the first `published` ones stand as lines that count, with their source.
    """
    source, chosen = next(iter(published.items()), ("", {}))
    usual = settings().model_dump(mode="json")
    described = _descriptions(settings)
    for name in usual:
        if name == "profile":
            continue
        yield from (f"# {line}" for line in wrap(described[name], WIDTH))
        if name in chosen:
            yield from (f"# {line}" for line in wrap(f"This value is {source}; leave it out for others.", WIDTH))
            yield f"{name} = {json.dumps(chosen[name])}"
        if usual[name] is not None:
            # JSON's texts, numbers, truth values and flat lists are TOML's too.
            yield f"#{name} = {json.dumps(usual[name], ensure_ascii=False)}"


def _descriptions(settings: type[BaseModel]) -> Mapping[str, str]:
    """`name: what the schema's docstring says of it` for each setting, without the marks of code."""
    _, _, attributes = (getdoc(settings) or "").partition("Attributes:\n")
    said = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", attributes, re.MULTILINE)
    texts = {name: f"{name}: {' '.join(text.split())}".replace("`", "") for name, text in said}
    return {name: texts.get(name, name) for name in settings.model_fields}
