"""Write the diffusers folder of a model with a few of its tensors replaced.

From a diffusers folder its own files are copied, and in them only the bytes of the replaced tensors differ: names,
order, sharding, metadata and dtypes stay, so the result loads wherever the base loads. A single file is converted: the
same bytes under diffusers' names. Never more than one tensor is in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from bakeout.editor.checkpoint_header import DTYPE_BYTES, StoredTensor
from bakeout.editor.errors import InputError
from bakeout.editor.hub import fetch_beside
from bakeout.editor.ldm_names import Location
from bakeout.editor.model import Component, Model
from bakeout.editor.model_files import VARIANTS, WEIGHT_STEMS, read_component, read_json, weights_name

if TYPE_CHECKING:
    from torch import Tensor

# Component → stored tensor's name → its new values, in the shape and dtype that are stored.
Changed = Mapping[str, Mapping[str, "Tensor"]]

_TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
# Networks that a pipeline may name and that bakeout does not load; transformers saves all of them under one file name.
_NETWORKS_BESIDE = ("safety_checker", "image_encoder")
_SAVED_AS = "text_encoder"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Plan:
    """What a model's diffusers folder will be made of.

    Attributes:
        model: the base.
        files: name in the folder, with `/`, → its content: a file of the base, bytes, or a component to convert.
        left_out: what of the base's folder is not copied, and a component that is named but not there, in words.
        variant: what `from_pretrained(..., variant=)` must be told; None where it needs no telling.
    """

    model: Model
    files: Mapping[str, Path | bytes | Component]
    left_out: tuple[str, ...]
    variant: str | None

    @property
    def size(self) -> int:
        """How many bytes will be written, to within a few kB a component."""
        return sum(_size(content) for content in self.files.values())


def plan_diffusers(model: Model) -> Plan:
    """Which files make the diffusers folder of `model`: a closed list, so that no unedited weights come along.

    Of a model on the hub, those that only a copy of it needs are fetched, as its safety checker.

    Raises:
        InputError: those files are not in the hub's cache and cannot be fetched.
    """
    if model.format == "single_file":
        return Plan(model, _converted_files(model), (), None)
    return _plan_of_folder(model)


def write_diffusers(plan: Plan, changed: Changed, folder: Path) -> None:
    """Write the folder, every file flushed to the disk.

    Args:
        plan: of the base.
        changed: the replaced tensors.
        folder: is made; must not exist.

    Raises:
        InputError: a file of the base is shorter than its header said when it was opened.
        OSError: a file cannot be read or written.
        ValueError: a replaced tensor is not one of the base's, or of another dtype or shape.
    """
    new = {
        component: {name: _bytes_for(plan.model.components[component].tensors[name], tensor)
                    for name, tensor in tensors.items()}
        for component, tensors in changed.items()
    }  # fmt: skip
    patches: dict[Path, dict[int, bytes]] = {}
    for component, tensors in new.items():
        for name, raw in tensors.items():
            stored = plan.model.components[component].tensors[name]
            patches.setdefault(stored.file, {})[stored.begin] = raw
    folder.mkdir()
    for name, content in sorted(plan.files.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            write_synced(path, _patched(content, patches.get(content, {})))
        elif isinstance(content, bytes):
            write_synced(path, [content])
        else:
            write_synced(path, _converted(content, new.get(content.name, {})))


def write_synced(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a new file and wait until it is on the disk."""
    with path.open("xb") as stream:
        for chunk in chunks:
            stream.write(chunk)
        stream.flush()
        os.fsync(stream.fileno())


def sync_files(folder: Path) -> None:
    """Wait until the files in `folder` and below, that somebody else wrote, are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as stream:
                os.fsync(stream.fileno())


def places(model: Model, component: str, tensor: str) -> tuple[tuple[str, str], ...]:
    """Where a stored tensor of `model` lies in its diffusers folder: file (with `/`) and name of each tensor there."""
    part = model.components[component]
    if model.format != "single_file":
        return ((f"{component}/{part.tensors[tensor].file.name}", tensor),)
    return tuple(
        (_weights_file(component), _name_on_disk(part, parameter))
        for parameter, location in part.locations.items()
        if location.tensor == tensor
    )


def read_tensor(tensor: StoredTensor) -> Iterator[bytes]:
    """The bytes of a stored tensor, in chunks."""
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.begin)
        yield from _read(stream, tensor.end - tensor.begin, tensor.file)


def parameter_shape(component: Component, parameter: str) -> tuple[int, ...]:
    """The shape of a parameter, by its name in memory."""
    location = component.locations[parameter]
    return _shape(component.tensors[location.tensor], location)


def read_parameter(component: Component, parameter: str, new: Mapping[str, Tensor] = MappingProxyType({})) -> bytes:
    """The bytes of a parameter, by its name in memory, in the dtype that is stored.

    Args:
        component: whose it is.
        parameter: its name.
        new: stored tensors that are replaced, as in `Changed`.

    Raises:
        InputError: the file became shorter since it was opened.
        ValueError: the replaced tensor is of another dtype or shape.
    """
    location = component.locations[parameter]
    stored = component.tensors[location.tensor]
    replaced = new.get(location.tensor)
    raw = b"".join(read_tensor(stored)) if replaced is None else _bytes_for(stored, replaced)
    return _parameter(stored, location, raw)


def _plan_of_folder(model: Model) -> Plan:
    folder = model.path
    files: dict[str, Path | bytes | Component] = {}
    for component in model.components.values():
        home = folder / component.name
        chosen = weights_name([path.name for path in home.iterdir()], component.name, str(home))
        for path in (home / "config.json", home / chosen, *component.files):
            files[f"{component.name}/{path.name}"] = path
    for part in model.parts.values():
        names = ("scheduler_config.json",) if part.name == "scheduler" else _TOKENIZER_FILES
        files |= {f"{part.name}/{name}": part.folder / name for name in names if (part.folder / name).is_file()}
    beside = _beside(model)
    files |= {name: path for found in beside.values() for name, path in found.items()}
    absent = [name for name, found in beside.items() if not found]
    files["model_index.json"] = folder / "model_index.json"
    if absent:
        files["model_index.json"] = _json({**model.index, **{name: [None, None] for name in absent}})
    variants = [v for v in VARIANTS[1:] if any(v in Path(name).name for name in files if name.endswith("safetensors"))]
    left_out = (*(f"{name} (not there as safetensors)" for name in absent), *_left_out(folder, files))
    return Plan(model, files, left_out, variants[0].removeprefix(".") if variants else None)


def _beside(model: Model) -> dict[str, dict[str, Path]]:
    """The files of each component that `model_index.json` names and bakeout does not load; none if it is not whole."""
    named = [
        name for name in (*_NETWORKS_BESIDE, "feature_extractor") if model.index.get(name) not in (None, [None, None])
    ]
    unreachable = fetch_beside(model.source, model.path, named) if named and model.format == "hub" else None
    found = {
        name: _network(model.path, name) if name in _NETWORKS_BESIDE else _feature_extractor(model.path)
        for name in named
    }
    for name, files in found.items():
        if unreachable and not files:
            # Left out now and copied another time, one recipe would give two artifacts.
            raise InputError(
                f"{model.source} names its {name}, which is not in the hub's cache as safetensors, and {unreachable}; "
                "connect, or give the path of a copy of the model"
            )
    # The pipeline refuses a safety checker that has nothing to prepare its pictures.
    if found.get("safety_checker") and not found.get("feature_extractor"):
        found["safety_checker"] = {}
    return found


def _network(folder: Path, name: str) -> dict[str, Path]:
    home = folder / name
    try:
        read_json(home / "config.json")
        tensors = read_component(home, _SAVED_AS)
    except InputError:
        return {}
    chosen = weights_name([path.name for path in home.iterdir()], _SAVED_AS, str(home))
    files = {home / "config.json", home / chosen, *(tensor.file for tensor in tensors.values())}
    return {f"{name}/{path.name}": path for path in files}


def _feature_extractor(folder: Path) -> dict[str, Path]:
    path = folder / "feature_extractor" / "preprocessor_config.json"
    return {"feature_extractor/preprocessor_config.json": path} if path.is_file() else {}


def _left_out(folder: Path, files: Iterable[str]) -> list[str]:
    """What lies in the base's folder and its components' folders and is not copied; other folders as one entry."""
    taken = set(files)
    homes = {name.partition("/")[0] for name in taken if "/" in name}
    left = []
    for path in sorted(folder.iterdir()):
        if path.name in homes:
            inside = (f"{path.name}/{entry.name}" for entry in sorted(path.iterdir()))
            left += [name for name in inside if name not in taken]
        elif path.name not in taken:
            left.append(f"{path.name}/" if path.is_dir() else path.name)
    return left


def _patched(file: Path, patches: Mapping[int, bytes]) -> Iterator[bytes]:
    """The bytes of a file with some replaced; `patches` are by their offset."""
    with file.open("rb") as stream:
        for begin, raw in sorted(patches.items()):
            yield from _read(stream, begin - stream.tell(), file)
            yield raw
            stream.seek(len(raw), os.SEEK_CUR)
        while chunk := stream.read(_CHUNK):
            yield chunk


def _read(stream: BinaryIO, count: int, file: Path) -> Iterator[bytes]:
    while count:
        chunk = stream.read(min(count, _CHUNK))
        if not chunk:
            raise InputError(f"{file} became shorter while it was read; leave the model alone during a bake")
        count -= len(chunk)
        yield chunk


def _bytes_for(stored: StoredTensor, tensor: Tensor) -> bytes:
    import torch

    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
    if tensor.dtype != dtypes.get(stored.dtype) or tuple(tensor.shape) != stored.shape:
        raise ValueError(
            f"{stored.name} is stored as {stored.dtype} {list(stored.shape)}, not {tensor.dtype} {list(tensor.shape)}"
        )
    raw: bytes = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return raw


def _converted_files(model: Model) -> dict[str, Path | bytes | Component]:
    files: dict[str, Path | bytes | Component] = {"model_index.json": _json(model.index)}
    for name, component in model.components.items():
        files[f"{name}/config.json"] = _json(component.config)
        files[_weights_file(name)] = component
    for name, part in model.parts.items():
        if name == "scheduler":
            files["scheduler/scheduler_config.json"] = _json({**part.config, "_class_name": part.class_name})
            continue
        for file in ("vocab.json", "merges.txt", "NOTICE.txt"):
            files[f"{name}/{file}"] = part.folder / file
        config = {**read_json(part.folder / "tokenizer_config.json"), **part.config}
        # Older transformers let this file win over the other.
        tokens = {key: config[key] for key in read_json(part.folder / "special_tokens_map.json")}
        files[f"{name}/tokenizer_config.json"] = _json(config)
        files[f"{name}/special_tokens_map.json"] = _json(tokens)
    return files


def _weights_file(component: str) -> str:
    return f"{component}/{WEIGHT_STEMS[component]}.safetensors"


def _name_on_disk(component: Component, parameter: str) -> str:
    """The name that every version of the libraries reads: transformers 5 also knows one without the prefix."""
    if component.name.startswith("text_encoder") and not parameter.startswith(("text_model.", "text_projection.")):
        return f"text_model.{parameter}"
    return parameter


def _converted(component: Component, new: Mapping[str, bytes]) -> Iterator[bytes]:
    """A safetensors file of the component's parameters: the header, then tensor by tensor."""
    entries = sorted(
        (-DTYPE_BYTES[stored.dtype], _name_on_disk(component, parameter), stored, location)
        for parameter, location in component.locations.items()
        for stored in [component.tensors[location.tensor]]
    )
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for _, name, stored, location in entries:
        shape = _shape(stored, location)
        begin, end = end, end + prod(shape) * DTYPE_BYTES[stored.dtype]
        header[name] = {"dtype": stored.dtype, "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    # The data begin at a multiple of 8, as the library writes it.
    raw += b" " * (-len(raw) % 8)
    yield len(raw).to_bytes(8, "little") + raw
    for _, _, stored, location in entries:
        yield _parameter(stored, location, new.get(stored.name) or b"".join(read_tensor(stored)))


def _shape(stored: StoredTensor, location: Location) -> tuple[int, ...]:
    """The shape of the parameter that lies in a stored tensor; see `Location.stored_shapes`."""
    if location.change == "transposed":
        return stored.shape[::-1]
    if location.change == "third":
        return (stored.shape[0] // 3, *stored.shape[1:])
    return stored.shape[:2] if location.change == "pointwise" else stored.shape


def _parameter(stored: StoredTensor, location: Location, raw: bytes) -> bytes:
    if location.change == "third":
        size = len(raw) // 3
        return raw[location.part * size : (location.part + 1) * size]
    if location.change == "transposed":
        # Moved as integers: numpy has no bfloat16.
        values = np.frombuffer(raw, f"u{DTYPE_BYTES[stored.dtype]}").reshape(stored.shape)
        return np.ascontiguousarray(values.T).tobytes()
    return raw


def _size(content: Path | bytes | Component) -> int:
    if isinstance(content, Path):
        return content.stat().st_size
    if isinstance(content, bytes):
        return len(content)
    stored = [(content.tensors[location.tensor], location) for location in content.locations.values()]
    return sum(prod(_shape(tensor, location)) * DTYPE_BYTES[tensor.dtype] for tensor, location in stored)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
