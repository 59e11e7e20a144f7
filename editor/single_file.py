"""Open a single-file checkpoint (LDM names, as A1111 and ComfyUI write them) with the configurations shipped here."""

from __future__ import annotations

import re
import statistics
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bakeout.editor.architecture import SUPPORTED, describe_single_file, describe_without_unet, family_of
from bakeout.editor.assemble import UNUSED, Locate, make_component
from bakeout.editor.checkpoint_header import Header, StoredTensor, read_header
from bakeout.editor.errors import InputError
from bakeout.editor.folder import component_classes, scheduler_part
from bakeout.editor.ldm_names import (
    TEXT_PREFIXES,
    UNET,
    VAE_PREFIXES,
    clip_location,
    open_clip_location,
    unet_location,
    vae_location,
)
from bakeout.editor.model import Component, Model, Part
from bakeout.editor.model_files import read_json
from bakeout.editor.sites import Site

CONFIGS = Path(__file__).parent / "configs"
TOKENIZER = CONFIGS / "clip_tokenizer"
# A family's configuration, by what its UNet predicts; where a pair is missing, the other with the prediction replaced.
FAMILY_CONFIGS: dict[tuple[str, str], Path] = {
    ("sd1", "epsilon"): CONFIGS / "sd15",
    ("sd2", "v_prediction"): CONFIGS / "sd21",
    ("sd2", "epsilon"): CONFIGS / "sd21-base",
    ("sdxl", "epsilon"): CONFIGS / "sdxl",
}
_CURE = "a single file must have the sizes of the original models, so give the diffusers folder of a smaller one"
_LAST_BIAS = re.compile(re.escape(UNET) + r"output_blocks\.\d+\.1\.transformer_blocks\.0\.norm1\.bias")
_MAX_BIAS_BYTES = 65_536
# ComfyUI tells SD 2.x models that predict v by this spread of one bias of the UNet (`supported_models.py`, class SD20).
V_PREDICTION_SPREAD = 0.09


def open_single_file(path: Path, source: str) -> Model:
    """The model in a single `.safetensors` file. Raises InputError."""
    header = read_header(path)
    family = _family(header, source)
    prediction = _prediction(header, family, path)
    folder = FAMILY_CONFIGS.get((family, prediction), FAMILY_CONFIGS[family, "epsilon"])
    index = read_json(folder / "model_index.json")
    classes = component_classes(index, source)
    components: dict[str, Component] = {}
    configs: dict[str, Mapping[str, Any]] = {}
    sites: list[Site] = []
    for name in ("text_encoder", "text_encoder_2", "unet", "vae"):
        if name in classes:
            component = _component(header, family, name, classes[name], folder, source)
            components[name], configs[name] = component[:2]
            sites += component[2]
    text = {name: config for name, config in configs.items() if name.startswith("text_encoder")}
    family_of(configs["unet"], configs["vae"], text, source)
    parts = {"scheduler": _scheduler(folder, classes["scheduler"], prediction, header)}
    for name in classes:
        if name.startswith("tokenizer"):
            parts[name] = Part(name, classes[name], read_json(folder / name / "tokenizer_config.json"), TOKENIZER)
    return Model(source, "single_file", family, path, index, components, parts, tuple(sites))


def _family(header: Header, source: str) -> str:
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    if what := describe_single_file(shapes):
        raise InputError(f"{source} is {what}; {SUPPORTED}")
    if not any(name.startswith(UNET) for name in shapes):
        raise InputError(f"{source} is {describe_without_unet(shapes)}; {SUPPORTED}")
    for family in ("sdxl", "sd2", "sd1"):
        prefixes = [prefix for (of, _), (prefix, _) in TEXT_PREFIXES.items() if of == family]
        if all(any(name.startswith(prefix) for name in shapes) for prefix in prefixes):
            return family
    raise InputError(f"{source} has a UNet but no CLIP text encoder; give a checkpoint that holds all components")


def _component(
    header: Header, family: str, name: str, class_name: str, folder: Path, source: str
) -> tuple[Component, dict[str, Any], tuple[Site, ...]]:
    config = read_json(folder / name / "config.json")
    prefix, locate = _layout(header, family, name)
    tensors = {key: tensor for key, tensor in header.tensors.items() if key.startswith(prefix)}
    if not tensors:
        raise InputError(f"{source} holds no {name} ({prefix}...); give a checkpoint that holds all components")
    unused = UNUSED
    if family == "sd2" and name == "text_encoder":
        # SD 2.x reads the last layer but one; the file has the last as well, the network that is built does not.
        last = re.escape(f"{prefix}transformer.resblocks.{config['num_hidden_layers']}.")
        unused = re.compile(f"{last}.*|{UNUSED.pattern}")
    where = f"{name} of {folder.name}"
    return make_component(name, class_name, config, tensors, locate, where, unused, _CURE)


def _layout(header: Header, family: str, name: str) -> tuple[str, Locate]:
    if name == "unet":
        return UNET, lambda parameter, shapes: [unet_location(parameter, shapes)]
    if name == "vae":
        prefix = next((p for p in VAE_PREFIXES if any(key.startswith(p) for key in header.tensors)), VAE_PREFIXES[-1])
        return prefix, lambda parameter, shapes: [vae_location(parameter, shapes, prefix)]
    prefix, open_clip = TEXT_PREFIXES[family, name]
    location = open_clip_location if open_clip else clip_location
    return prefix, lambda parameter, _: [location(parameter, prefix)]


def _scheduler(folder: Path, class_name: str, prediction: str, header: Header) -> Part:
    part = scheduler_part(folder, class_name)
    config = dict(part.config, prediction_type=prediction)
    if "ztsnr" in header.tensors:
        config.update(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    return replace(part, config=config)


def _prediction(header: Header, family: str, path: Path) -> str:
    """`epsilon` or `v_prediction`: the file's word, else that of A1111's `.yaml` beside it, else what ComfyUI goes by.

    Shapes do not tell. ComfyUI goes by an empty tensor `v_pred`, or for SD 2.x by the spread of one small bias, the
    only values that opening a model ever reads.
    """
    said = header.metadata.get("modelspec.prediction_type") or _yaml_parameterization(path.with_suffix(".yaml"))
    if said:
        return "v_prediction" if said.startswith("v") else "epsilon"
    if "v_pred" in header.tensors:
        return "v_prediction"
    biases = [name for name in header.tensors if _LAST_BIAS.fullmatch(name)]
    if family == "sd2" and biases:
        last = max(biases, key=lambda name: int(name.split(".")[3]))
        return "v_prediction" if statistics.pstdev(_values(header.tensors[last])) > V_PREDICTION_SPREAD else "epsilon"
    return "epsilon"


def _yaml_parameterization(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    match = re.search(r"""^\s*parameterization:\s*["']?(v|eps)\b""", text, re.MULTILINE)
    return match[1] if match else None


def _values(tensor: StoredTensor) -> list[float]:
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.begin)
        raw = stream.read(min(tensor.end - tensor.begin, _MAX_BIAS_BYTES))
    if tensor.dtype == "BF16":  # the upper half of a float32
        raw = b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))
    code = {"F16": "e", "BF16": "f", "F32": "f", "F64": "d"}.get(tensor.dtype)
    return [value for (value,) in struct.iter_unpack(f"<{code}", raw)] if code and raw else [0.0]
