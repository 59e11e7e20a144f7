"""`bakeout.json`: what an artifact is made of, in a closed schema.

Whoever reads it trusts nothing: every key, type and file name is checked, and another format version is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from bakeout.editor.checkpoint_header import StoredTensor
from bakeout.editor.errors import InputError
from bakeout.editor.model import Component, Model
from bakeout.editor.model_files import read_json
from bakeout.editor.recipe import SHRINKS, Precision, Range
from bakeout.export.checkpoint import read_tensor

if TYPE_CHECKING:
    from bakeout.editor.edit import Edit

MANIFEST = "bakeout.json"
FORMAT_VERSION: Final = 1


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it has characters that cannot be printed")
    return text


def _one_of_shrinks(shrink: int) -> int:
    if shrink not in SHRINKS:
        raise ValueError(f"it is none of {', '.join(map(str, SHRINKS))}")
    return shrink


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# Printed as they stand, so without what moves a terminal's cursor, breaks a line or turns the direction of writing.
Text = Annotated[str, Field(max_length=2000), AfterValidator(_printable)]
Name = Annotated[Text, Field(min_length=1)]
# No part begins with a dot, so none leads out of the folder.
FileName = Annotated[Text, Field(pattern=r"^(diffusers|onnx|tensorrt)(/[\w-][\w.-]*){1,2}$", max_length=300)]
WeightsName = Annotated[FileName, Field(pattern=r"^diffusers/")]
_TEXT_SITE = re.compile(r"(?P<component>text_encoder\w*)\.layer\.(?P<layer>\d+)")
# Of latents: a side of 32,768 pixels in Stable Diffusion.
_MAX_SIDE = 4096
# As an operation's site is checked in `bakeout.editor.edit`, which imports torch.
SiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$", max_length=2000)]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class ComponentIdentity(_Record):
    """A network of the base: its class, how many tensors it stores, and the digest of all of them."""

    class_name: Name
    tensors: Annotated[int, Field(ge=1)]
    sha256: Sha256


class Base(_Record):
    """Which model was edited. `name` is how it was called, without the folders of the machine."""

    name: Name
    family: Literal["sd1", "sd2", "sdxl"]
    format: Literal["builtin", "folder", "single_file", "hub"]
    components: dict[Name, ComponentIdentity]


class EditedTensor(_Record):
    """A tensor that differs from the base: where it lies now and there, and the SHA-256 of its bytes now and there."""

    file: WeightsName
    name: Name
    sha256: Sha256
    component: Name
    base_name: Name
    base_sha256: Sha256


class Source(_Record):
    """One erasure: the method with its settings, the concept, and SHA-256 and number of the prompt pairs."""

    method: Name
    concept: str
    settings: dict[str, JsonValue]
    prompts: str
    pairs: Annotated[int, Field(ge=0)]


class Lowering(_Record):
    """How much one operation touches, how it was realised, why so, at what cost, and the rounding's relative error."""

    site: SiteName
    operation: Literal["PatchWeightInput", "PatchActivation", "ShiftActivation", "SteerLatents"]
    touched: Annotated[int, Field(ge=0)]
    of: Annotated[int, Field(ge=1)]
    unit: Name
    how: Literal["folded", "graph"]
    reason: Text
    cost: Text
    rounding: float | None

    @model_validator(mode="after")
    def _is_a_share(self) -> Self:
        if self.touched > self.of:
            raise ValueError("it touches more than there is")
        return self


class Resolution(_Record):
    """The only latents that the UNet of an artifact takes."""

    latent_height: Annotated[int, Field(ge=1, le=_MAX_SIDE)]
    latent_width: Annotated[int, Field(ge=1, le=_MAX_SIDE)]


class Validity(_Record):
    """Where the artifact does what the method does, and what weakens, undoes or reveals the edit.

    Attributes:
        resolutions: of pictures: any that the model can draw, or one.
        schedules: of denoising steps.
        hidden_states: of each edited text encoder, the first hidden state that the whole edit reaches; those before it
            are ways around it.
        limits: where the method itself may be weaker, and where the artifact draws nothing.
        bypasses: what undoes the edit.
        reveals: what the artifact tells of it.
    """

    resolutions: Literal["any"] | Resolution
    schedules: Literal["any"]
    hidden_states: dict[Name, Annotated[int, Field(ge=1)]]
    limits: tuple[Text, ...]
    bypasses: tuple[Text, ...]
    reveals: Text

    @property
    def latents(self) -> tuple[int, int] | None:
        """Height and width of the only latents that the UNet takes; None is any."""
        at = self.resolutions
        return None if at == "any" else (at.latent_height, at.latent_width)


class File(_Record):
    """A file's size and SHA-256."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256


class Width(_Record):
    """How many of an FFN's hidden units a compiled target has, and how many the base."""

    kept: Annotated[int, Field(ge=1)]
    of: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _is_smaller(self) -> Self:
        if self.kept >= self.of:
            raise ValueError("it keeps what there is")
        return self


class _Compiled(_Record):
    """What holds for every compiled target.

    Attributes:
        precision: of the weights; what must not be computed in less stays fp32.
        shrink: of what the width of an FFN that lost constant hidden units is a multiple; 0 where none may go.
        widths: of the FFNs that lost some, by the site of their FFN-2.
        tools: versions of what wrote it.
    """

    precision: Precision
    shrink: Annotated[int, AfterValidator(_one_of_shrinks)]
    widths: dict[SiteName, Width]
    tools: dict[Name, Text]

    @model_validator(mode="after")
    def _has_widths_that_fit(self) -> Self:
        if any(self.shrink == 0 or width.kept % self.shrink for width in self.widths.values()):
            raise ValueError("it has an FFN of another width than it says")
        return self


class Onnx(_Compiled):
    """What `onnx/` was written with; `opset` is ONNX's, the newest of a graph."""

    opset: Annotated[int, Field(ge=1)]


class Shapes(_Record):
    """Of which pictures engines are made: how many at a time, and their sides in pixels."""

    batch: Range
    width: Range
    height: Range


class Engine(_Record):
    """A TensorRT engine.

    Attributes:
        key: digest of all that it was built from and for, as the cache of engines has it.
        layers: how many it has.
        plugins: how many of them are kernels of ours.
        doubt: why it is not known of all layers in which precision they compute; empty if it is.
        error: relative RMS of what it gives to what the fp32 graph gives on a CPU, the largest of its outputs.
    """

    key: Sha256
    layers: Annotated[int, Field(ge=1)]
    plugins: Annotated[int, Field(ge=0)]
    doubt: Text = ""
    error: Annotated[float, Field(ge=0)]


class Tensorrt(_Compiled):
    """What `tensorrt/` was built with. An engine runs with this version, on this kind of GPU, and on no other.

    Attributes:
        shapes: of the pictures.
        version: of TensorRT.
        gpu: its name.
        capability: its compute capability, major and minor.
        driver: its version.
        engines: by graph.
    """

    shapes: Shapes
    version: Name
    gpu: Name
    capability: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=0)]]
    driver: Name
    engines: Annotated[dict[Name, Engine], Field(min_length=1)]


class Manifest(_Record):
    """The content of `bakeout.json`.

    Attributes:
        version: of this format.
        base: the model that was edited.
        edit: digest of the Edit, whether or not its file is there.
        edit_file: SHA-256 of `edit.safetensors` as it was written.
        edits: where the Edit comes from.
        lowering: one entry an operation.
        edited: every tensor in `diffusers` that differs from the base.
        validity: where the edit holds.
        targets: the formats in the folder, each a folder in it; `diffusers` only where the whole edit folds.
        precision: component → dtypes as stored in `diffusers`; nothing without it.
        calibration: on which kind of device, and in which dtype, the methods ran the model.
        recipe: the recipe, without the folders of the machine.
        tools: versions; another version, or another machine, may round otherwise.
        files: of the targets, all.
        onnx: how the target of that name was written; None without it.
        tensorrt: the same of that one.
    """

    version: Literal[1]
    base: Base
    edit: Sha256
    edit_file: Sha256
    edits: tuple[Source, ...]
    lowering: tuple[Lowering, ...]
    edited: tuple[EditedTensor, ...]
    validity: Validity
    targets: tuple[Literal["diffusers", "onnx", "tensorrt"], ...]
    precision: dict[Name, tuple[Name, ...]]
    calibration: dict[Name, str]
    recipe: dict[str, JsonValue]
    tools: dict[Name, str]
    files: dict[FileName, File]
    onnx: Onnx | None = None
    tensorrt: Tensorrt | None = None

    @model_validator(mode="after")
    def _has_what_it_names(self) -> Self:
        if set(self.targets) != {name.partition("/")[0] for name in self.files}:
            raise ValueError("its targets are not those of its files")
        if "diffusers" not in self.targets and (self.edited or self.precision):
            raise ValueError("it tells of weights that it does not have")
        if "diffusers" in self.targets and self.validity.latents is not None:
            raise ValueError("it is for latents of one size, and its diffusers folder draws any")
        if (
            not self.targets
            or len(set(self.targets)) < len(self.targets)
            or (self.onnx is None) == ("onnx" in self.targets)
            or (self.tensorrt is None) == ("tensorrt" in self.targets)
        ):
            raise ValueError("it names a target twice, or one without saying how it was written")
        return self

    def to_json(self) -> bytes:
        """The same manifest gives the same bytes."""
        return (json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the artifact in `folder`. Raises InputError if there is none, or for anything odd in it."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder} is no artifact (it has no {MANIFEST}); give a folder that `bakeout bake` wrote")
    said = read_json(path)
    version = said.get("version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise InputError(
            f"{path} is of version {version!a:.20} and this bakeout reads {FORMAT_VERSION}; install the bakeout that "
            "wrote it"
        )
    try:
        return Manifest.model_validate_json(json.dumps(said, allow_nan=False))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        fault = f"{where!a:.200}: {first['msg']!s:.200}"
    except (ValueError, RecursionError) as error:
        fault = f"{error!s:.200}"
    raise InputError(f"{path} is not a whole manifest ({fault}); take the artifact from its source again")


def base_of(model: Model, source: str) -> Base:
    """The identity of `model`, which reads all of its weights once; `source` is how it is called.

    The digest of a component is the SHA-256 of a line for each of its stored tensors, sorted by name, with name, dtype,
    shape and the SHA-256 of its bytes as a JSON list. So a model is the same whatever its files are called or sharded.
    """
    components = {component.name: _identity(component) for component in model.components.values()}
    name = source if source.isprintable() else ascii(source)
    return Base.model_validate({"name": name, "family": model.family, "format": model.format, "components": components})


def validity_of(edit: Edit, model: Model) -> Validity:
    """What holds for an edit that was baked into `model`. Raises InputError if it is for latents of several sizes."""
    operations = [(type(it).__name__, it) for it in edit.operations]
    masks = [it.mask for kind, it in operations if kind == "PatchActivation"]  # type: ignore[union-attr]
    pruned = any(kind == "PatchWeightInput" for kind, _ in operations)
    of_features, of_tokens = (any(mask.ndim == dimensions for mask in masks) for dimensions in (1, 2))
    latents = latents_of(edit)
    states = first_states(edit)
    limits = [limit for kind, it in operations if (limit := _limit(kind, it))]
    bypasses = ["training the model further, or merging its weights with those of others (a checkpoint, a dense LoRA)"]
    reveals = []
    if latents is not None:
        height, width = latents
        limits.append(f"latents of any other size than {width}x{height} (width x height) are refused")
    if pruned:
        reveals.append("zeros at known places tell what was pruned (arXiv 2603.06640)")
    if of_features:
        reveals.append(
            "rows or columns of zeros, or their absence from a smaller graph, tell which features are constant"
        )
    if pruned or of_features:
        bypasses.append("quantising the weights with a zero point, which keeps no zero")
    if of_tokens:
        reveals.append("constants in the graph tell which features are constant at which tokens, and their values")
        bypasses.append("taking the constants out of the graph, where the weights around them are the base's")
    if states:
        bypasses.append("a text encoder from elsewhere, as some programs bring along, or given prompt embeddings")
    bypasses += [_around(model, component, first) for component, first in states.items()]
    return Validity(
        resolutions="any" if latents is None else Resolution(latent_height=latents[0], latent_width=latents[1]),
        schedules="any",
        hidden_states=states,
        limits=tuple(dict.fromkeys(limits)),
        bypasses=tuple(bypasses),
        reveals=", and ".join([*reveals, "whoever has the base and this model can take the difference"]),
    )


def latents_of(edit: Edit) -> tuple[int, int] | None:
    """Height and width of the only latents that `edit` is for; None is any. Raises InputError for several sizes."""
    sizes = {size for it in edit.operations if (size := getattr(it, "latents", None)) is not None}
    if len(sizes) > 1:
        listed = " and ".join(f"{width}x{height}" for height, width in sorted(sizes))
        raise InputError(f"the edits are for latents of {listed}; calibrate all of them at one picture size")
    return next(iter(sizes), None)


def first_states(edit: Edit) -> dict[str, int]:
    """Of each text encoder that `edit` acts on, the first hidden state that all of it reaches.

    What acts on layer i reaches hidden state i + 1. Prunings, which are spread over layers, count with their first one.
    """
    layers: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for operation in edit.operations:
        if match := _TEXT_SITE.match(operation.site):
            spread = type(operation).__name__ == "PatchWeightInput"
            layers[match["component"]][not spread].append(int(match["layer"]))
    return {
        component: max([*others, *([min(spread)] if spread else [])]) + 1
        for component, (spread, others) in sorted(layers.items())
    }


def max_clip_skip(family: str, layers: int, first: int) -> int:
    """The largest `clip_skip` of diffusers that reads hidden state `first` or a later one; below 1 there is none.

    Args:
        family: of the model; SDXL's pipelines skip one layer more.
        layers: of the text encoder, which has one hidden state more.
        first: of its hidden states.
    """
    return layers - first - (family == "sdxl")


def _around(model: Model, component: str, first: int) -> str:
    layers = model.components[component].config["num_hidden_layers"]
    largest = max_clip_skip(model.family, layers, first)
    skips = f"a clip skip above {largest}" if largest > 0 else "any clip skip"
    before = "hidden_states.0" + (f" to hidden_states.{first - 1}" if first > 1 else "")
    return f"{skips}, which reads {component}'s {before}, before the edit"


def _limit(kind: str, operation: Any) -> str | None:
    """Where a shift of a text encoder, which is the same whatever the prompt says, is weaker."""
    if kind != "ShiftActivation" or not _TEXT_SITE.match(operation.site):
        return None
    if operation.rows == "all":
        return (
            "guidance subtracts what the shift does to the empty or negative prompt, so the erasure may be weaker the "
            "larger the guidance scale is"
        )
    return "with a negative prompt, guidance subtracts what the shift does to it, so the erasure may be weaker"


def tensor_digest(tensor: StoredTensor) -> str:
    """SHA-256 of a stored tensor's bytes."""
    total = hashlib.sha256()
    for chunk in read_tensor(tensor):
        total.update(chunk)
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _identity(component: Component) -> ComponentIdentity:
    total = hashlib.sha256()
    for name, tensor in sorted(component.tensors.items()):
        total.update(json.dumps([name, tensor.dtype, list(tensor.shape), tensor_digest(tensor)]).encode() + b"\n")
    return ComponentIdentity(class_name=component.class_name, tensors=len(component.tensors), sha256=total.hexdigest())
