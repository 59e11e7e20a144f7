"""Whether a target's pipeline, scheduler, networks and tokenizers are configured as the base's."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from shutil import copyfile
from typing import Any

from bakeout.editor.architecture import describe
from bakeout.editor.errors import InputError
from bakeout.editor.folder import component_classes, scheduler_part
from bakeout.editor.model import Component, Model, Part
from bakeout.editor.model_files import read_json
from bakeout.validate.audit import told
from bakeout.validate.report.schema import Check

# What says of a configuration who wrote it, and not what the network does.
_ABOUT = ("architectures", "dtype", "torch_dtype", "transformers_version")
# Beside the prompts: empty, blank, of two lengths beyond a text encoder's, in other scripts, and with marks of its own.
ODD_TEXTS = (
    "", "   ", "A STAR, a star; (a star:1.2)", "word " * 60, "an unbroken" * 30, "étoile 星 звезда ★ 🌟",
    "a\nb\tc\u00a0d", "<|startoftext|> in <|endoftext|> the middle", "don't it's 1234567890 $%&",
)  # fmt: skip
_MAX_TOKENS = 10_000


def check_configuration(
    target: str, base: Model, folder: Path, texts: Sequence[str], latents: tuple[int, int] | None = None
) -> Check:
    """Whether a target's pipeline class, scheduler, networks and tokenizers are configured as the base's.

    Args:
        target: its name.
        base: the model that was edited.
        folder: of the target.
        texts: on which tokenizers are compared, beside `ODD_TEXTS`.
        latents: height and width, where the edit is for one size only, by which pipelines know what to draw.
    """
    faults = [
        *_faults_of(lambda: _index_faults(base, folder)),
        *_faults_of(lambda: _scheduler_faults(base, folder)),
        *(
            fault
            for it in base.components.values()
            for fault in _faults_of(partial(_network_faults, it, folder, latents))
        ),
        *(
            fault
            for name, part in base.parts.items()
            if name.startswith("tokenizer")
            for fault in _faults_of(partial(_tokenizer_faults, part, folder, [*texts, *ODD_TEXTS]))
        ),
    ]
    if faults:
        return Check(
            name="configuration",
            target=target,
            verdict="fail",
            summary=f"It is not configured as the base: {told(faults)}.",
        )
    summary = (
        f"Scheduler, networks and tokenizers (on {len(texts) + len(ODD_TEXTS)} texts) are configured as the base's."
    )
    return Check(name="configuration", target=target, verdict="pass", summary=summary)


def _faults_of(find: Callable[[], list[str]]) -> list[str]:
    try:
        return find()
    except InputError as error:
        return [str(error)]


def _index_faults(base: Model, folder: Path) -> list[str]:
    index = read_json(folder / "model_index.json")
    faults = []
    if index.get("_class_name") != base.index.get("_class_name"):
        faults.append(f"model_index.json is of a {index.get('_class_name')!a:.100}")
    key = "force_zeros_for_empty_prompt"
    if index.get(key, True) != base.index.get(key, True):
        faults.append(f"{key} is {index.get(key)!a:.100}")
    found, wanted = (component_classes(it, str(folder)) for it in (index, base.index))
    return faults + [
        f"{name} is {found.get(name, 'nothing')!a:.100} in place of {wanted.get(name, 'nothing')!a:.100}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]


def _scheduler_faults(base: Model, folder: Path) -> list[str]:
    own = base.parts["scheduler"]
    part = scheduler_part(folder, own.class_name)
    if part.config.get("_class_name", own.class_name) != own.class_name:
        return [f"scheduler: {part.config['_class_name']!a:.100} in place of {own.class_name}"]
    return _differences("scheduler", _scheduler_config(part), _scheduler_config(own))


def _scheduler_config(part: Part) -> Mapping[str, Any]:
    """The configuration with the library's defaults filled in."""
    import diffusers

    try:
        return dict(getattr(diffusers, part.class_name).from_config(dict(part.config)).config)
    except Exception as error:  # noqa: BLE001 - a constructor raises anything on values it was not written for
        raise InputError(f"{part.folder} describes no working scheduler ({type(error).__name__})") from None


def _network_faults(component: Component, folder: Path, latents: tuple[int, int] | None) -> list[str]:
    names = ("vae_encoder", "vae_decoder") if _is_onnx(folder) and component.name == "vae" else (component.name,)
    faults = []
    config = dict(component.config)
    if latents is not None and latents[0] == latents[1] and component.name == "unet":
        # One number for both sides; pipelines of diffusers fail at two.
        config["sample_size"] = latents[0]
    for name in names:
        path = folder / name / "config.json"
        found, wanted = (describe(component.class_name, it, str(path), None)[1] for it in (read_json(path), config))
        faults += _differences(name, found, wanted)
    return faults


def _differences(name: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    # As JSON has them: a list is as good as a tuple.
    one, other = (json.loads(json.dumps(dict(it), default=str)) for it in (found, wanted))
    keys = sorted(key for key in one.keys() | other.keys() if not key.startswith("_") and key not in _ABOUT)
    return [
        f"{name}: {key!a:.100} is {one.get(key)!a:.100} in place of {other.get(key)!a:.100}"
        for key in keys
        if one.get(key) != other.get(key)
    ]


def _tokenizer_faults(part: Part, folder: Path, texts: Sequence[str]) -> list[str]:
    own = _tokenizer(part.folder, part.config)
    # Every word that it knows, too: a vocabulary may be exchanged where no prompt looks.
    texts = [*texts, *(token.removesuffix("</w>") for token in own.get_vocab())]
    wanted = _token_ids(own, texts)
    home = folder / part.name
    found = {part.name: _token_ids(_tokenizer(home, {}), texts)}
    old = ("vocab.json", "merges.txt")
    # Of an ONNX folder older libraries read these two, newer ones the one that has all, so they must agree.
    needed = (*old, "tokenizer_config.json", "special_tokens_map.json") if _is_onnx(folder) else ()
    faults = [f"{part.name}: {name} is missing" for name in needed if not (home / name).is_file()]
    if (home / "tokenizer.json").is_file() and all((home / name).is_file() for name in old):
        with tempfile.TemporaryDirectory() as copy:
            for path in home.iterdir():
                if path.name != "tokenizer.json" and path.is_file():
                    copyfile(path, Path(copy) / path.name)
            found[f"{part.name} by {' and '.join(old)}"] = _token_ids(_tokenizer(Path(copy), {}), texts)
    for how, ids in found.items():
        differing = [text for text, one, other in zip(["", *texts], ids, wanted, strict=True) if one != other]
        faults += [f"{how} reads {text!a:.60} otherwise" for text in differing[:1]]
    return faults


def _tokenizer(folder: Path, config: Mapping[str, Any]) -> Any:
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True, **config)
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises bare Exception on such files
        raise InputError(f"the tokenizer in {folder.name} does not load ({type(error).__name__})") from None


def _token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """As the pipelines ask for them, but for what pads them all alike."""
    # One that is told no length has an endless one, to which nothing can be padded.
    length = min(tokenizer.model_max_length, _MAX_TOKENS)
    blank: list[int] = tokenizer("", padding="max_length", max_length=length).input_ids
    ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=length).input_ids
    return [blank, *ids]


def _is_onnx(folder: Path) -> bool:
    return (folder / "vae_decoder").is_dir()
