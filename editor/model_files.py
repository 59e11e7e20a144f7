"""The files of a diffusers folder: its JSON, and which weight files a component has. Nothing here imports torch."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from bakeout.editor.checkpoint_header import DOWNLOAD_AGAIN, LFS_POINTER, StoredTensor, read_header
from bakeout.editor.errors import InputError

MAX_JSON_BYTES = 16_000_000  # the index of a sharded SDXL UNet has 0.2 MB
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
PICKLE_CURE = (
    "pickles can run code when opened, so download the .safetensors version, or load it where you trust it and save it "
    "again with save_pretrained(..., safe_serialization=True)"
)
# In order of preference: what is stored without a variant is the model at full precision.
VARIANTS = ("", ".fp16", ".bf16")
WEIGHT_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model",
                "text_encoder": "model", "text_encoder_2": "model"}  # fmt: skip


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in the file `path`; InputError if there is none."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; {DOWNLOAD_AGAIN}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    if raw.startswith(LFS_POINTER):
        raise InputError(f"{path} is a Git LFS pointer; run `git lfs pull` in its repository")
    if len(raw) > MAX_JSON_BYTES:
        raise InputError(f"{path} is too large for a configuration file; {DOWNLOAD_AGAIN}")
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not JSON; {DOWNLOAD_AGAIN}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object; {DOWNLOAD_AGAIN}")
    return value


def weights_name(names: Collection[str], component: str, where: str) -> str:
    """Which of the file `names` of a component's folder holds its weights: a .safetensors file or the index of several.

    `where` is the folder as a message should call it. InputError if there are only pickles, or nothing.
    """
    stem = WEIGHT_STEMS[component]
    for variant in VARIANTS:
        for name in (f"{stem}{variant}.safetensors", f"{stem}.safetensors.index{variant}.json"):
            if name in names:
                return name
    if any(name.endswith(PICKLE_SUFFIXES) for name in names):
        raise InputError(f"{where} has its weights only as a pickle; {PICKLE_CURE}")
    others = sorted(name for name in names if name.endswith(".safetensors"))
    if others:
        raise InputError(f"{where} has no {stem}.safetensors but {others[0]!a}; rename the file that should be used")
    raise InputError(f"{where} has no weights ({stem}.safetensors is missing); download the folder again")


def shard_names(names: Collection[str], index_name: str) -> list[str]:
    """The shards among the file `names` that belong to an index by the naming of diffusers and transformers."""
    stem, _, rest = index_name.partition(".safetensors.index")
    variant = re.escape(rest.removesuffix(".json"))
    pattern = re.compile(rf"{re.escape(stem)}(?:{variant}-\d+-of-\d+|-\d+-of-\d+{variant})\.safetensors")
    return sorted(name for name in names if pattern.fullmatch(name))


def read_component(folder: Path, component: str) -> dict[str, StoredTensor]:
    """Every tensor that the component in `folder` stores, by its name on disk, from one file or from shards."""
    if not folder.is_dir():
        raise InputError(f"{folder} is missing; download the folder again with all of its components")
    name = weights_name([path.name for path in folder.iterdir()], component, str(folder))
    if name.endswith(".safetensors"):
        return dict(read_header(folder / name).tensors)
    return _read_shards(folder, name)


def _read_shards(folder: Path, index_name: str) -> dict[str, StoredTensor]:
    path = folder / index_name
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(f"{path} has no weight_map from tensors to files; {DOWNLOAD_AGAIN}")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        # Compared as text: a resolved path would leave the folder for every file of the hub's cache, which links.
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard):
            raise InputError(f"{path} names the file {shard!a:.200}, which is outside its folder; {DOWNLOAD_AGAIN}")
        found = read_header(folder / shard).tensors
        _check_shard(path, shard, found, weight_map)
        tensors.update(found)
    return tensors


def _check_shard(index: Path, shard: str, found: Mapping[str, StoredTensor], weight_map: Mapping[str, str]) -> None:
    listed = {name for name, file in weight_map.items() if file == shard}
    for name in sorted(listed - found.keys()):
        raise InputError(f"{index} promises tensor {name!a:.200} in {shard}, which lacks it; {DOWNLOAD_AGAIN}")
    for name in sorted(found.keys() - listed):
        raise InputError(f"{index} does not list tensor {name!a:.200} of {shard}; {DOWNLOAD_AGAIN}")
