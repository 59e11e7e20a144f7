"""Open a diffusers folder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bakeout.editor.architecture import CLASSES, SUPPORTED, family_of
from bakeout.editor.assemble import Shapes, make_component
from bakeout.editor.errors import InputError
from bakeout.editor.ldm_names import Location
from bakeout.editor.model import Component, Model, Part
from bakeout.editor.model_files import PICKLE_CURE, PICKLE_SUFFIXES, WEIGHT_STEMS, read_component, read_json
from bakeout.editor.sites import Site

_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
_REQUIRED = ("unet", "vae", "scheduler")
# Not loaded: they judge a picture, or take a picture as prompt.
_OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")
_OLD_VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def open_folder(folder: Path, source: str, found_as: str) -> Model:
    """The model in a diffusers folder; `found_as` becomes its `format`. Raises InputError."""
    if not (folder / "model_index.json").is_file():
        raise _not_a_pipeline(folder, source)
    index = read_json(folder / "model_index.json")
    classes = component_classes(index, source)
    components: dict[str, Component] = {}
    configs: dict[str, dict[str, Any]] = {}
    sites: list[Site] = []
    for name in ("text_encoder", "text_encoder_2", "unet", "vae"):
        if name in classes:
            components[name], configs[name], found = _component(folder / name, name, classes[name])
            sites += found
    text = {name: config for name, config in configs.items() if name.startswith("text_encoder")}
    family = family_of(configs["unet"], configs["vae"], text, source)
    parts = {"scheduler": scheduler_part(folder, classes["scheduler"])}
    for encoder in text:
        name = encoder.replace("text_encoder", "tokenizer")
        if name not in classes:
            raise InputError(f"{source} has a {encoder} but no {name}; download the folder again, whole")
        parts[name] = tokenizer_part(folder / name, classes[name])
    return Model(source, found_as, family, folder, index, components, parts, tuple(sites))


def component_classes(index: Mapping[str, Any], source: str) -> dict[str, str]:
    """The class of each component that a `model_index.json` names, its absent ones left out.

    Raises InputError if it needs code that is not part of diffusers or transformers, or is of another kind of model.
    """
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str):
        raise InputError(f"{source} has a model_index.json for a custom pipeline, whose code is never run; {SUPPORTED}")
    classes: dict[str, str] = {}
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or value == [None, None]:
            continue
        if name not in (*CLASSES, "scheduler", *_OPTIONAL):
            what = "a diffusion transformer" if name == "transformer" else f"a pipeline with a component {name!a:.100}"
            raise InputError(f"{source} is {what} ({pipeline:.100}); {SUPPORTED}")
        if len(value) != 2 or value[0] not in _LIBRARIES or not isinstance(value[1], str):
            raise InputError(f"{source} wants {name} from {value!a:.100}, code that is never run; {SUPPORTED}")
        if name not in _OPTIONAL:
            classes[name] = value[1]
    missing = [name for name in _REQUIRED if name not in classes]
    if not any(name.startswith("text_encoder") for name in classes):
        missing.append("text_encoder")
    if missing:
        raise InputError(f"{source} has no {missing[0]} in its model_index.json ({pipeline:.100}); {SUPPORTED}")
    return classes


def scheduler_part(folder: Path, class_name: str) -> Part:
    """The scheduler of a diffusers folder. Raises InputError if it is no scheduler of diffusers."""
    import diffusers

    scheduler = getattr(diffusers, class_name, None) if re.fullmatch(r"[A-Z]\w*", class_name) else None
    if not isinstance(scheduler, type) or not issubclass(scheduler, diffusers.SchedulerMixin):
        raise InputError(
            f"{folder} wants the scheduler {class_name!a:.100}, which this diffusers lacks; name one of its schedulers "
            "in model_index.json, as DDIMScheduler"
        )
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    return Part("scheduler", class_name, config, folder / "scheduler")


def _component(folder: Path, name: str, class_name: str) -> tuple[Component, dict[str, Any], tuple[Site, ...]]:
    tensors = read_component(folder, name)
    path = folder / "config.json"
    return make_component(name, class_name, read_json(path), tensors, _locate, str(path))


def _locate(parameter: str, _: Shapes) -> Iterator[Location]:
    yield Location(parameter)
    if parameter.startswith("text_model."):
        yield Location(parameter.removeprefix("text_model."))
    elif parameter.startswith(("encoder.layers.", "embeddings.", "final_layer_norm.")):
        yield Location(f"text_model.{parameter}")
    elif ".mid_block.attentions." in parameter:
        # What diffusers called them before 0.15, as in the VAE of SD 1.5.
        for new, old in _OLD_VAE_ATTENTION.items():
            if f".{new}." in parameter:
                yield Location(parameter.replace(f".{new}.", f".{old}."))


def tokenizer_part(folder: Path, class_name: str) -> Part:
    """The tokenizer in `folder`. Raises InputError if it is of another class, or its files are not there."""
    if class_name not in CLASSES["tokenizer"]:
        raise InputError(f"{folder} wants the tokenizer class {class_name!a:.100}, not CLIPTokenizer; {SUPPORTED}")
    if not (folder / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise InputError(f"{folder / name} is missing; download the folder again with all of its components")
    return Part(folder.name, class_name, {}, folder)


def _not_a_pipeline(folder: Path, source: str) -> InputError:
    names = sorted(path.name for path in folder.iterdir())
    if "bakeout.json" in names:
        has_weights = (folder / "diffusers").is_dir()
        further = f"give {folder / 'diffusers'} to edit it further, or " if has_weights else ""
        return InputError(f"{source} is an artifact of bakeout: {further}give the model that it was baked from")
    if any(name.endswith(PICKLE_SUFFIXES) for name in names):
        return InputError(f"{source} has no model_index.json, only a pickle checkpoint; {PICKLE_CURE}")
    if checkpoints := [name for name in names if name.endswith(".safetensors")]:
        return InputError(
            f"{source} has no model_index.json; if {checkpoints[0]!a:.100} in it is the checkpoint, give its path"
        )
    if any((folder / name).is_dir() for name in WEIGHT_STEMS):
        return InputError(f"{source}/model_index.json is missing; download the folder again")
    return InputError(f"{source} has no model_index.json; give a folder that diffusers' save_pretrained wrote")
