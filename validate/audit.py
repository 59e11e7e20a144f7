"""What an artifact's files say, without drawing: every weight by its name, configurations, names of inputs and outputs.

Nothing of what `bakeout.export` computes is used: what a weight must be follows from the base's and from what the
operations mean (`bakeout.editor.edit`), and graphs are read as the files that they are.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bakeout.editor.architecture import describe
from bakeout.editor.edit import (
    Edit,
    Operation,
    PatchActivation,
    PatchWeightInput,
    ShiftActivation,
    SteerLatents,
    merge,
)
from bakeout.editor.errors import InputError
from bakeout.editor.folder import component_classes, scheduler_part
from bakeout.editor.model import Component, Model, Part
from bakeout.editor.model_files import read_json, weights_name
from bakeout.validate.contract import FREE, Interface, contract
from bakeout.validate.metrics import worst_element
from bakeout.validate.report.schema import Check, Verdict
from bakeout.validate.widths import Entries, entries_of

# Faults that a summary tells; their number is told as well.
_TOLD = 3
# What text encoders and UNets take and give of which dimension 1 are a prompt's tokens.
_TOKENS = ("input_ids", "last_hidden_state", "encoder_hidden_states")
# What says of a configuration who wrote it, and not what the network does.
_ABOUT = ("architectures", "dtype", "torch_dtype", "transformers_version")
# Beside the prompts: empty, blank, of two lengths beyond a text encoder's, in other scripts, and with marks of its own.
ODD_TEXTS = (
    "", "   ", "A STAR, a star; (a star:1.2)", "word " * 60, "an unbroken" * 30, "étoile 星 звезда ★ 🌟",
    "a\nb\tc\u00a0d", "<|startoftext|> in <|endoftext|> the middle", "don't it's 1234567890 $%&",
)  # fmt: skip

_MAX_TOKENS = 10_000

# Of a dtype, what ONNX calls it, how its bytes lie, and the field that may have the values in place of bytes.
_STORED: Mapping[torch.dtype, tuple[str, np.dtype[Any], str]] = {
    torch.float32: ("FLOAT", np.dtype("<f4"), "float_data"),
    torch.int64: ("INT64", np.dtype("<i8"), "int64_data"),
    torch.int32: ("INT32", np.dtype("<i4"), "int32_data"),
}

Parameter = tuple[str, str]
Read = Callable[[Parameter], Tensor]


class MissingError(Exception):
    """A target does not have a tensor, or not in a form that can be read; the message says which and why."""


def check_weights(
    target: str,
    base: Model,
    edit: Edit,
    names: Mapping[Parameter, str],
    read: Read,
    beside: Sequence[str] = (),
    elsewhere: Sequence[Operation] = (),
    units: Mapping[str, Tensor] = {},
) -> Check:
    """Every weight of a target against what the base and the Edit give: exactly, and changed biases to one rounding.

    Args:
        target: its name.
        base: the model that was edited.
        edit: what was baked.
        names: every parameter of the base, by component and name in memory, and what it is called in the target.
        read: reads a parameter of the target, or raises MissingError.
        beside: files beside those that are read, which another program may read instead.
        elsewhere: operations that another check finds in the target's graphs, and no weight may hold as well.
        units: of FFNs that must be narrower than the base's, the hidden units that must be there, as of `units_of`.
    """
    linears, entries = _linears(edit, base, elsewhere), entries_of(units, base)
    uncovered = [repr(it) for operations in linears.values() for it in operations if not _is_static(it)]
    faults = [f"{name} lies beside the weights, and other programs may load it" for name in beside]
    wrong = edited = 0
    with parameters(base) as read_base:
        for place, name in names.items():
            module, _, part = place[1].rpartition(".")
            operations = linears.get((place[0], module), ())
            if not all(map(_is_static, operations)):
                continue
            edited += bool(operations)
            own = entries.get(place)
            stored = expected = _some(own, read_base(place))
            if operations:
                expected = _some(own, _edited(read_base, names, place[0], module, operations)[part == "bias"])
            try:
                found = read(place)
            except MissingError as missing:
                faults.append(str(missing))
                wrong += stored.numel()
                continue
            if count := unlike(found, expected, stored):
                wrong += count
                faults.append(difference(f"{place[0]} {name}", found, expected, count))
        for (component, module), operations in linears.items():
            if (component, f"{module}.bias") in names or not all(map(_is_static, operations)):
                continue
            if _edited(read_base, names, component, module, operations)[1].any():
                faults.append(f"{component} {module} has no bias to hold what the edit adds")
    if faults:
        summary = f"Its weights are not what the base and the edit give: {told(faults)}."
        return _check("weights", target, "fail", summary, wrong)
    if uncovered:
        return _check("weights", target, "unjudged", f"Weights cannot show whether these are there: {told(uncovered)}.")
    beyond = "; the rest of the edit is in the graphs" if elsewhere else ""
    lost = sum(base.site(name).d_in - len(own) for name, own in units.items())
    gone = f"; {lost:,} hidden units that are constant are gone, of {len(units):,} FFNs" if units else ""
    summary = (
        f"All {len(names):,} tensors are what the base and the edit give: {edited:,} of edited layers, "
        f"{len(names) - edited:,} as in the base to the last bit{beyond}{gone}."
    )
    return _check("weights", target, "pass", summary, wrong)


def edited_linear(weight: Tensor, bias: Tensor, operations: Sequence[Operation]) -> tuple[Tensor, Tensor]:
    """Weight and bias of a Linear that computes what the operations mean (`bakeout.editor.edit`), in fp64.

    Args:
        weight: [d_out, d_in], W.
        bias: [d_out], b, zeros where there is none.
        operations: at most one of a sort but for shifts; the same at every token and in every row.
    """
    weight, bias = weight.double(), bias.double()
    replaced = torch.zeros(weight.shape, dtype=torch.bool)
    at_input, at_output = (torch.zeros(size, dtype=torch.bool) for size in (weight.shape[1], weight.shape[0]))
    constant, inside, outside = torch.zeros_like(weight[0]), torch.zeros_like(weight[0]), torch.zeros_like(bias)
    shift = torch.zeros_like(bias)
    for it in operations:
        if isinstance(it, PatchWeightInput) and it.value is None:
            weight = weight.masked_fill(it.mask, 0)
        elif isinstance(it, PatchWeightInput):
            replaced, constant = it.mask, torch.as_tensor(it.value).double()
        elif isinstance(it, PatchActivation) and it.at == "input":
            at_input, inside = it.mask, it.value.double()
        elif isinstance(it, PatchActivation):
            at_output, outside = it.mask, it.value.double()
        elif isinstance(it, ShiftActivation):
            shift = shift + it.value.double()
    # What each weight sees in place of its input, where that is a constant.
    seen = torch.where(replaced, constant, torch.where(at_input, inside, 0.0))
    bias = torch.where(at_output, outside, bias + (weight * seen).sum(1)) + shift
    return weight.masked_fill(replaced | at_input | at_output[:, None], 0), bias


def unlike(found: Tensor, expected: Tensor, stored: Tensor) -> int:
    """How many elements are not what they must be; all of them where the shapes differ.

    Args:
        found: in the target, of any float dtype.
        expected: `stored` itself, or fp64 where the layer is edited.
        stored: in the base. What the edit changes to another value than zero is rounded to its dtype once.
    """
    if found.shape != expected.shape:
        return expected.numel()
    if expected is stored:
        return int((found.float().view(torch.int32) != stored.float().view(torch.int32)).sum())
    kind = torch.finfo(stored.dtype)
    rounding = expected.abs() * kind.eps + kind.smallest_normal * kind.eps
    allowed = torch.where((expected == stored.double()) | (expected == 0), 0.0, rounding)
    return int((~((found.double() - expected).abs() <= allowed)).sum())


def weights_beside(model: Model) -> list[str]:
    """What lies in the folders of a diffusers folder's networks besides their configuration and weights."""
    found = []
    for component in model.components.values():
        home = model.path / component.name
        names = {path.name for path in home.iterdir()}
        used = {"config.json", weights_name(sorted(names), component.name, str(home))}
        found += [f"{component.name}/{name}" for name in sorted(names - used - {it.name for it in component.files})]
    return found


@contextmanager
def parameters(model: Model) -> Iterator[Read]:
    """A function that reads a parameter of a model's files, by component and name in memory, as it is in memory."""
    from safetensors import safe_open

    with ExitStack() as stack:
        files = {
            file: stack.enter_context(safe_open(file, framework="pt"))
            for component in model.components.values()
            for file in component.files
        }

        def read(place: Parameter) -> Tensor:
            component = model.components[place[0]]
            if place[1] not in component.locations:
                raise MissingError(f"{place[0]} {place[1]} is missing")
            location = component.locations[place[1]]
            stored: Tensor = files[component.tensors[location.tensor].file].get_tensor(location.tensor)
            if location.change == "third":
                return stored.chunk(3)[location.part]
            if location.change == "transposed":
                return stored.T
            return stored.reshape(stored.shape[:2]) if location.change == "pointwise" else stored

        yield read


def names_of(model: Model) -> dict[Parameter, str]:
    """What each parameter is called in files made of `model`: as stored where it is stored as it stands."""
    return {
        (component.name, parameter): location.tensor if location.change == "same" else parameter
        for component in model.components.values()
        for parameter, location in component.locations.items()
    }


def kept_in_graphs(edit: Edit, base: Model) -> list[PatchActivation | ShiftActivation | SteerLatents]:
    """The operations that only graphs can hold, in the order of the Edit: patches, and what text encoders have besides.

    A patch is that differs from token to token, or whose constants no bias can hold. A shift that is the same at every
    token and in every row is in a bias, unless latents read what it would change, or a patch would overwrite it. None
    is for the rows of prompts and not of negative prompts, for some calls only, or for latents of no known size: these
    no graph can tell apart.
    """
    merged = merge([edit]).operations
    patches = [it for it in merged if isinstance(it, PatchActivation) and _is_patch_of_graphs(it, base)]
    at_output = [it for it in patches if it.at == "output"]
    moving = [
        it
        for it in merged
        if isinstance(it, ShiftActivation | SteerLatents)
        if it.site.startswith("text_encoder") and it.rows != "conditional"
    ]
    read = [it.site for it in moving if isinstance(it, SteerLatents)]
    kept = [
        it
        for it in moving
        if not _is_static(it)
        or any(f"{site}.".startswith(f"{it.site}.") for site in read)
        or any(_overwrites(patch, it) for patch in at_output)
    ]
    return [it for it in merged if it in [*patches, *kept]]  # type: ignore[misc]


def _is_patch_of_graphs(patch: PatchActivation, base: Model) -> bool:
    site = base.site(patch.site)
    if patch.rows != "all" or patch.calls is not None:
        return False
    if patch.mask.ndim == 1:
        return site.bias is None and bool(patch.value.any())
    of_prompts = site.component.startswith("text_encoder") or site.kind in ("attn_key", "attn_value")
    return of_prompts or patch.latents is not None


def _overwrites(patch: PatchActivation, moving: ShiftActivation | SteerLatents) -> bool:
    """Whether a shift in the bias of a Linear, or of the layer around it, would be lost to a patch of its output."""
    if isinstance(moving, SteerLatents) or not patch.site.startswith(moving.site):
        return False
    features = patch.mask if patch.mask.ndim == 1 else patch.mask.any(0)
    return bool((features & (moving.value != 0)).any())


def rounding_of(edit: Edit, base: Model) -> Edit:
    """What is added to the outputs of edited layers by rounding their biases, once, to the dtypes of the base."""
    sites = {(site.component, site.module): site.name for site in base.sites if site.weight is not None}
    names, shifts, kept = names_of(base), [], kept_in_graphs(edit, base)
    with parameters(base) as read:
        for (component, module), operations in _linears(edit, base, kept).items():
            if (component, f"{module}.bias") in names and all(map(_is_static, operations)):
                exact = _edited(read, names, component, module, operations)[1]
                error = exact.to(read((component, f"{module}.bias")).dtype).double() - exact
                for it in kept:
                    if isinstance(it, PatchActivation) and (it.site, it.at) == (sites[component, module], "output"):
                        # What the graph patches is not what the bias made of it.
                        error = error.where(~it.mask, 0)
                if error.any():
                    shifts.append(ShiftActivation(sites[component, module], error))
    return Edit(tuple(shifts))


def _linears(edit: Edit, model: Model, elsewhere: Sequence[Operation]) -> dict[Parameter, tuple[Operation, ...]]:
    """The operations by the Linear that they act on, its component and its name in memory, but for those elsewhere."""
    grouped: dict[Parameter, list[Operation]] = {}
    for operation in merge([edit]).operations:
        if operation in elsewhere:
            continue
        site = model.site(operation.site)
        # The output of an encoder layer is the residual plus what its second FFN Linear gives.
        module = site.module if site.weight is not None else f"{site.module}.mlp.fc2"
        grouped.setdefault((site.component, module), []).append(operation)
    return {place: tuple(operations) for place, operations in grouped.items()}


def _is_static(operation: Operation) -> bool:
    """Whether an operation is the same at every token and in every row, so that weight and bias can hold it."""
    if isinstance(operation, PatchActivation):
        return operation.mask.ndim == 1 and operation.rows == "all" and operation.calls is None
    if isinstance(operation, ShiftActivation):
        return operation.value.ndim == 1 and operation.rows == "all"
    return not isinstance(operation, SteerLatents)


def _edited(
    read: Read, names: Collection[Parameter], component: str, module: str, operations: Sequence[Operation]
) -> tuple[Tensor, Tensor]:
    weight, bias = (component, f"{module}.weight"), (component, f"{module}.bias")
    matrix = read(weight)
    return edited_linear(matrix, read(bias) if bias in names else matrix.new_zeros(len(matrix)), operations)


def _some(own: Entries | None, whole: Tensor) -> Tensor:
    return whole if own is None else own.of(whole)


def difference(name: str, found: Tensor, expected: Tensor, count: int) -> str:
    """In words, what is other in a tensor of which `count` elements are others."""
    if found.shape != expected.shape:
        return f"{name} is {list(found.shape)} in place of {list(expected.shape)}"
    worst = worst_element(found, expected)
    where = f", as at {list(worst.index)}: {worst.artifact} in place of {worst.reference}" if worst else ""
    return f"{name}: {count:,} of {expected.numel():,} values are others{where}"


class OnnxFolder:
    """The graphs of an ONNX folder as files: nothing is run, and external data are read when they are asked for.

    Args:
        folder: in the directory contract.
        base: the model that was edited.
    """

    def __init__(self, folder: Path, base: Model) -> None:
        self._folder = folder
        self._base = base
        self._models: dict[str, Any] = {}
        self._faults: dict[str, str] = {}
        self._initializers: dict[str, dict[str, Any]] = {}
        for name in contract(base):
            try:
                self._models[name] = model = _read_model(folder / name / "model.onnx")
                self._initializers[name] = _by_name(model.graph.initializer, name)
            except MissingError as missing:
                self._faults[name] = str(missing)

    def read(self, names: Mapping[Parameter, str], place: Parameter) -> Tensor:
        """A parameter, float32, called as `names` says. Raises MissingError if its graph has it not, or otherwise."""
        component, name = place[0], names[place]
        graph = component
        if component == "vae":
            graph = "vae_encoder" if place[1].startswith(("encoder.", "quant_conv.")) else "vae_decoder"
        return self.tensor(graph, name)

    def model(self, name: str) -> Any:
        """A graph in its ONNX model, without external data. Raises MissingError."""
        if name in self._faults:
            raise MissingError(self._faults[name])
        return self._models[name]

    def tensor(self, graph: str, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """An initializer of a graph, of a dtype of `_STORED`. Raises MissingError if it is not there, or of another."""
        if name not in self.initializers(graph):
            raise MissingError(f"{graph} has no initializer {name}")
        return _tensor(self._initializers[graph][name], self._folder / graph, dtype)

    def whole(self, graph: str, name: str) -> Any:
        """An initializer of a graph with its data in it. Raises MissingError if they are not where they should be."""
        from onnx import TensorProto, numpy_helper

        initializer = self.initializers(graph)[name]
        if initializer.data_location != TensorProto.EXTERNAL:
            return initializer
        kind = TensorProto.DataType.Name(initializer.data_type)
        dtype = next((dtype for dtype, (own, _, _) in _STORED.items() if own == kind), torch.float32)
        return numpy_helper.from_array(self.tensor(graph, name, dtype).numpy(), name)

    def initializers(self, graph: str) -> Mapping[str, Any]:
        """The initializers of a graph by name; external data are not in them. Raises MissingError."""
        self.model(graph)
        return self._initializers[graph]

    def beside(self) -> list[str]:
        """What lies in the graphs' folders besides their configurations, graphs and data."""
        return [
            f"{name}/{path.name}"
            for name in contract(self._base)
            for path in sorted((self._folder / name).glob("*"))
            if path.name not in ("config.json", "model.onnx", "model.onnx_data")
        ]

    def check_interface(
        self, target: str, lengths: Mapping[str, int] = {}, latents: tuple[int, int] | None = None
    ) -> Check:
        """Whether every graph is there, with the inputs and outputs of the contract, in order and of any size.

        Where an edit is for one size only, the graph must take no other: of tokens ONNX Runtime would broadcast another
        number, or fail somewhere inside, and latents of another shape may have as many tokens.

        Args:
            target: its name.
            lengths: of networks, the only number of a prompt's tokens that they may take.
            latents: height and width, the only ones that the UNet may take.
        """
        interfaces = contract(self._base)
        faults = [
            fault
            for name, interface in interfaces.items()
            for fault in (
                [self._faults[name]]
                if name in self._faults
                else _interface_faults(
                    name, self._models[name].graph, interface, _sizes(name, lengths.get(name), latents)
                )
            )
        ]
        if faults:
            summary = f"Its inputs and outputs are not those of the directory contract: {told(faults)}."
            return _check("interface", target, "fail", summary)
        count = sum(len(it.inputs) + len(it.outputs) for it in interfaces.values())
        summary = f"All {count} inputs and outputs are those of the directory contract."
        return _check("interface", target, "pass", summary)


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
        return _check("configuration", target, "fail", f"It is not configured as the base: {told(faults)}.")
    summary = (
        f"Scheduler, networks and tokenizers (on {len(texts) + len(ODD_TEXTS)} texts) are configured as the base's."
    )
    return _check("configuration", target, "pass", summary)


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


def _read_model(path: Path) -> Any:
    """An ONNX file; external data stay where they are."""
    import onnx

    if not path.is_file():
        raise MissingError(f"{path.parent.name} has no {path.name}")
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # noqa: BLE001 - that of protobuf, which is not among this project's dependencies
        raise MissingError(f"{path.parent.name}/{path.name} is no ONNX file ({type(error).__name__})") from None


def _sizes(name: str, length: int | None, latents: tuple[int, int] | None) -> Mapping[str, Mapping[int, int]]:
    """Of a graph's inputs and outputs, the only sizes that dimensions may have."""
    sizes: dict[str, Mapping[int, int]] = {}
    if length is not None:
        sizes |= {own: {1: length} for own in _TOKENS}
    if latents is not None and name == "unet":
        sizes |= {own: {2: latents[0], 3: latents[1]} for own in ("sample", "out_sample")}
    return sizes


def _interface_faults(
    name: str, graph: Any, interface: Interface, sizes: Mapping[str, Mapping[int, int]]
) -> Iterator[str]:
    for what, given, wanted in (("input", graph.input, interface.inputs), ("output", graph.output, interface.outputs)):
        dims = {it.name: it.type.tensor_type.shape.dim for it in given}
        if list(dims) != list(wanted):
            odd = sorted(dims.keys() ^ wanted.keys())
            said = f"{'lacks' if odd[0] in wanted else 'also has'} {odd[0]!a:.100}" if odd else "has another order"
            yield f"{name}: the list of its {what}s {said}"
            continue
        for own, found in dims.items():
            # Hidden states have their tokens where the last one has them.
            only = sizes.get("last_hidden_state" if own.startswith("hidden_states.") else own, {})
            if len(found) != wanted[own]:
                yield f"{name}: {own} has {len(found)} dimensions in place of {wanted[own]}"
                continue
            fixed = {place: it.dim_value for place, it in enumerate(found) if it.HasField("dim_value")}
            free = [place for place in FREE.get(own, ()) if place not in only]
            if what == "input" and (odd_ones := [place for place in free if place in fixed]):
                yield f"{name}: {own} takes one size only in dimension {odd_ones[0]}, {fixed[odd_ones[0]]}"
            for place, size in only.items():
                if fixed.get(place) != size:
                    said = fixed.get(place, "any size")
                    yield f"{name}: {own} has {said} in dimension {place}, where the edit is for {size} alone"


def _by_name(initializers: Iterable[Any], graph: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for it in initializers:
        if it.name in found:
            raise MissingError(f"{graph} has two initializers {it.name!a:.200}")
        found[it.name] = it
    return found


def _tensor(initializer: Any, folder: Path, dtype: torch.dtype) -> Tensor:
    """Its values, copied. External data must lie in a file of the folder itself."""
    import onnx

    name, shape = f"{folder.name} {initializer.name}", tuple(initializer.dims)
    kind, stored, field = _STORED[dtype]
    if initializer.data_type != onnx.TensorProto.DataType.Value(kind):
        raise MissingError(f"{name} is {onnx.TensorProto.DataType.Name(initializer.data_type)} in place of {kind}")
    count = math.prod(shape)
    if initializer.data_location != onnx.TensorProto.EXTERNAL:
        raw = initializer.raw_data
        values = np.frombuffer(raw, stored) if raw else np.array(getattr(initializer, field), stored)
    else:
        where = {it.key: it.value for it in initializer.external_data}
        file, offset = folder / where.get("location", ""), int(where.get("offset", 0))
        room = file.stat().st_size - stored.itemsize * count if file.parent == folder and file.is_file() else -1
        if not 0 <= offset <= room:
            raise MissingError(f"{name} lies at {where.get('location')!a:.100}, where it is not")
        values = np.memmap(file, stored, "r", offset, (count,)) if count else np.empty(0, stored)
    if values.size != count:
        raise MissingError(f"{name} holds {values.size:,} values in place of {count:,}")
    return torch.from_numpy(np.array(values, stored.newbyteorder("="))).reshape(shape)


def _check(name: str, target: str, verdict: Verdict, summary: str, wrong: int | None = None) -> Check:
    limit = None if wrong is None else 0
    return Check(name=name, target=target, verdict=verdict, summary=summary, measured=wrong, limit=limit)


def told(faults: Sequence[str]) -> str:
    """The first of some faults, and how many more there are."""
    different = list(dict.fromkeys(faults))
    more = f"; and {len(different) - _TOLD:,} more" if len(different) > _TOLD else ""
    return "; ".join(different[:_TOLD]) + more
