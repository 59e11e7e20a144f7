"""Write a model as a folder of ONNX graphs, in the layout that optimum's pipelines for ONNX Runtime read.

    model_index.json  scheduler/  tokenizer/  [tokenizer_2/]
    text_encoder|[text_encoder_2]|unet|vae_encoder|vae_decoder/{config.json,model.onnx[,model.onnx_data]}

The networks are traced without weights, which are then copied tensor by tensor from the model's files, widened to fp32.
An initializer has the name of the stored tensor that it holds, where it holds it as it stands, else the parameter's
name in memory; always in PyTorch's orientation. The same model gives the same bytes.

What of an Edit does not fold into the weights becomes a part of its text encoder's graph. At a site S, say
text_encoder.layer.9, its constants are initializers, fp32 and in the orientation of the Edit,

    bakeout.S.shift.all  bakeout.S.shift.prompted                        [d] or [tokens, d]: sums over the site
    bakeout.S.latents.N.encoder|encoder_bias|center|directions|strengths|neurons    of the N-th SteerLatents
    bakeout.S.blank                                                      int64: the tokens of an empty prompt

(see `bakeout.export.steer`), its nodes are named bakeout/S/..., and the one whose output takes the place of the site's
output is bakeout/S/edited.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, cast

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram, export
from torch.nn import Module, ModuleList

from bakeout.editor.architecture import build
from bakeout.editor.edit import Edit
from bakeout.editor.errors import InputError
from bakeout.editor.model import Component, Model, Part
from bakeout.editor.weights import make_position_ids
from bakeout.export.aten import graph_from_program
from bakeout.export.checkpoint import Changed, parameter_shape, read_parameter, sync_files, write_synced
from bakeout.export.steer import Gate, SiteEdit, edits_of
from bakeout.export.tokenizer import as_json, tokenizer_files

# The oldest with Gelu. ONNX Runtime 1.31 does not care on a CPU: a UNet as wide as that of SD 1.5 took 1.00 of the time
# with 18 (Gelu spelt out) and 23. Attention as the one node that 23 has took 0.96 to 0.97, no more than the noise, and
# GroupNormalization of 21 in place of InstanceNormalization 1.01 (32x32 latents) to 1.07 (64x64).
OPSET: Final = 20
_IR_VERSION = 10
_DATA = "model.onnx_data"
# What protobuf holds in one file is 2 GiB, of which the graph itself takes a few MB.
_MAX_INLINE = 2_000_000_000
_FILE_BYTES = 4
_STORED = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
# In units; far beyond what any machine draws, and without it torch.export finds no multiples.
_MAX_SIDE = 1 << 20
# Keys of a configuration that tell of somebody's machine, or of the dtype that the weights had before.
_LOCAL = ("_name_or_path", "dtype", "torch_dtype")
# Not part of the graphs, and not replaced by anything.
_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
# Place of a dynamic dimension → its name.
_Dims = Mapping[int, str]


@dataclass(frozen=True)
class Input:
    """An input.

    Attributes:
        shape: an example, with sizes of two and more where they are dynamic: of one, PyTorch would make constants.
        dims: the dynamic dimensions.
        unit: of what the sides of a picture are multiples.
        dtype: of its elements.
    """

    shape: tuple[int, ...]
    dims: _Dims
    unit: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def dynamic(self) -> dict[int, Any]:
        """The dynamic dimensions as torch.export takes them."""
        return {
            place: self.unit * Dim(name, min=1, max=_MAX_SIDE) if place >= 2 and self.unit > 1 else Dim.DYNAMIC
            for place, name in self.dims.items()
        }


@dataclass(frozen=True)
class Graph:
    """A graph of the folder.

    Attributes:
        name: of its folder.
        component: whose parameters it has.
        config: of the component, with the library's defaults filled in.
        module: of the component, without weights; takes the inputs and returns the outputs as a tuple.
        inputs: by name, in order.
        outputs: name → dynamic dimensions, in order.
        edits: what happens at sites of the graph; submodules `edits.0` … of `module`.
    """

    name: str
    component: Component
    config: Mapping[str, Any]
    module: Module
    inputs: Mapping[str, Input]
    outputs: Mapping[str, _Dims]
    edits: Sequence[SiteEdit] = ()


class _TextEncoder(Module):
    def __init__(
        self, network: Module, first: tuple[str, ...], edits: Sequence[SiteEdit], *, hidden_states: bool
    ) -> None:
        super().__init__()
        self.network = network
        self.edits = ModuleList(edits)
        self._first = first
        self._hidden_states = hidden_states

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        with ExitStack() as stack:
            for edit in cast(Sequence[SiteEdit], self.edits):
                module = self.network.get_submodule(edit.site.module)
                hook = partial(_edited_output, edit, input_ids)
                # Before the library's own, which records hidden states.
                stack.callback(module.register_forward_hook(hook, prepend=True).remove)
            output = self.network(input_ids, output_hidden_states=self._hidden_states)
        return (*(output[name] for name in self._first), *(output.hidden_states if self._hidden_states else ()))


def _edited_output(edit: SiteEdit, input_ids: Tensor, _module: Module, _args: object, output: Tensor) -> Tensor:
    return cast(Tensor, edit(output, input_ids))


class _UNet(Module):
    def __init__(self, network: Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        more = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.network(  # type: ignore[no-any-return]
            sample, timestep, encoder_hidden_states, added_cond_kwargs=more, return_dict=False
        )


class _VaeEncoder(Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor) -> tuple[Tensor, ...]:
        return (self.network.encode(sample).latent_dist.parameters,)


class _VaeDecoder(Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, latent_sample: Tensor) -> tuple[Tensor, ...]:
        return self.network.decode(latent_sample, return_dict=False)  # type: ignore[no-any-return]


def write_onnx(
    model: Model,
    folder: Path,
    progress: Callable[[float], object] | None = None,
    started: Callable[[str], object] | None = None,
    *,
    changed: Changed = MappingProxyType({}),
    remaining: Edit | None = None,
    gate: Gate | None = None,
) -> None:
    """Write the ONNX folder of `model`: networks, scheduler and tokenizers, every file flushed to the disk.

    Args:
        model: to write; its weights are read tensor by tensor.
        folder: is made; must not exist.
        progress: called with the part, of one for the whole, that was just written.
        started: called with the name of each graph, before it is traced.
        changed: component → stored tensor's name → what takes its place, as `Lowered.state`.
        remaining: the operations that go into the graphs, as `Lowered.remaining`.
        gate: how the graphs tell the k largest latents; None is whatever is faster.

    Raises:
        InputError: an operation of `remaining` has no form in a graph; a network has an operator or a parameter that
            cannot be exported; or a file of the model changed meanwhile.
        OSError: a file cannot be written.
        ValueError: a replaced tensor is none that a parameter is read from, or of another dtype or shape.
    """
    for name, tensors in changed.items():
        if strange := tensors.keys() - {location.tensor for location in model.components[name].locations.values()}:
            raise ValueError(f"no parameter of the {name} is read from {min(strange)}")
    edits = edits_of(remaining, model, gate) if remaining is not None else {}
    folder.mkdir(parents=True)
    used: dict[str, set[str]] = {name: set() for name in model.components}
    size = size_of_onnx(model)
    for graph in graphs_of(model, edits):
        if started is not None:
            started(graph.name)
        home = folder / graph.name
        home.mkdir()
        write_synced(home / "config.json", [as_json(graph.config)])
        new = changed.get(graph.component.name, {})
        used[graph.component.name] |= _write_graph(graph, home, new, lambda count: progress and progress(count / size))
    for name, component in model.components.items():
        if left := component.locations.keys() - used[name]:
            raise InputError(
                f"the {name} of this model has {min(left)}, which bakeout cannot export; ship its diffusers folder, or "
                "report the model"
            )
    for name, part in model.parts.items():
        (folder / name).mkdir()
        for file, content in _part_files(part).items():
            write_synced(folder / name / file, [content])
    write_synced(folder / "model_index.json", [as_json(_index(model))])


def size_of_onnx(model: Model, remaining: Edit | None = None) -> int:
    """How many bytes the weights and the constants of `remaining` take in an ONNX folder; the rest is a few MB."""
    operations = () if remaining is None else remaining.operations
    constants = [it for operation in operations for it in vars(operation).values() if isinstance(it, Tensor)]
    weights = sum(_bytes(component, name) for component in model.components.values() for name in component.locations)
    return weights + _FILE_BYTES * sum(it.numel() for it in constants)


def graphs_of(model: Model, edits: Mapping[str, Sequence[SiteEdit]] = MappingProxyType({})) -> Iterator[Graph]:
    """The graphs of a model's ONNX folder, in order; their modules have no weights but the constants of `edits`.

    `edits` are by component, as `edits_of` gives them.
    """
    for component in model.components.values():
        network: Any = build(component.class_name, component.config).eval()
        config = _config(network, component)
        if component.name == "vae":
            yield from _vae_graphs(component, config, network)
        elif component.name == "unet":
            yield _unet_graph(component, config, network)
        else:
            # Of several text encoders the pipelines take hidden states; of one, the last.
            states = config["num_hidden_layers"] + 1 if model.family == "sdxl" else 0
            yield _text_graph(component, config, network, states, edits.get(component.name, ()))


def _text_graph(
    component: Component, config: Mapping[str, Any], network: Any, states: int, edits: Sequence[SiteEdit]
) -> Graph:
    longest = config["max_position_embeddings"]
    # ONNX Runtime would broadcast one token to the length of a constant.
    length = next((edit.tokens for edit in edits if edit.tokens is not None), None)
    if length is not None and length > longest:
        raise InputError(
            f"the Edit of the {component.name} is for {length} tokens where the model has {longest}; use the model "
            "that it was made for"
        )
    batch: dict[int, str] = {0: "batch_size"}
    tokens = batch if length is not None else {**batch, 1: "sequence_length"}
    last = {"last_hidden_state": tokens}
    projects = component.class_name.endswith("WithProjection")
    outputs: dict[str, _Dims] = {"text_embeds": batch, **last} if projects else {**last, "pooler_output": batch}
    module = _TextEncoder(network, tuple(outputs), edits, hidden_states=states > 0)
    outputs |= {f"hidden_states.{layer}": tokens for layer in range(states)}
    ids = Input((2, length or longest), tokens, dtype=torch.int64)
    return Graph(component.name, component, config, module, {"input_ids": ids}, outputs, edits)


def _unet_graph(component: Component, config: Mapping[str, Any], network: Any) -> Graph:
    unit = 2 ** (len(config["block_out_channels"]) - 1)
    batch, picture = {0: "batch_size"}, {0: "batch_size", 2: "height", 3: "width"}
    # Any number of tokens will do.
    text = Input((2, 77, config["cross_attention_dim"]), {0: "batch_size", 1: "sequence_length"})
    inputs = {
        "sample": Input((2, config["in_channels"], 4 * unit, 6 * unit), picture, unit),
        "timestep": Input((), {}),
        "encoder_hidden_states": text,
    }
    if config["addition_embed_type"] == "text_time":
        # Six numbers tell size, crop and target size.
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        inputs |= {"text_embeds": Input((2, pooled), batch), "time_ids": Input((2, 6), batch)}
    return Graph("unet", component, config, _UNet(network), inputs, {"out_sample": picture})


def _vae_graphs(component: Component, config: Mapping[str, Any], network: Any) -> Iterator[Graph]:
    unit = 2 ** (len(config["block_out_channels"]) - 1)
    picture = {0: "batch_size", 2: "sample_height", 3: "sample_width"}
    latents = {0: "batch_size", 2: "latent_height", 3: "latent_width"}
    # Spelt as optimum spells them, which calculates with these names.
    smaller = {0: "batch_size", 2: f"sample_height / {unit}", 3: f"sample_width / {unit}"}
    larger = {0: "batch_size", 2: f"latent_height * {unit}", 3: f"latent_width * {unit}"}
    yield Graph(
        "vae_encoder", component, config, _VaeEncoder(network),
        {"sample": Input((2, config["in_channels"], 4 * unit, 6 * unit), picture, unit)},
        {"latent_parameters": smaller},
    )  # fmt: skip
    yield Graph(
        "vae_decoder", component, config, _VaeDecoder(network),
        {"latent_sample": Input((2, config["latent_channels"], 4, 6), latents)},
        {"sample": larger},
    )  # fmt: skip


def _write_graph(graph: Graph, home: Path, new: Mapping[str, Tensor], progress: Callable[[int], object]) -> set[str]:
    """Write a graph with its weights, of which `new` are replaced, and return the names of the parameters that it has.

    `progress` is called with the bytes of each weight.
    """
    component = graph.component
    names = {name: _initializer(component, name) for name in component.locations}
    parameters = {f"network.{name}": initializer for name, initializer in names.items()}
    constants: dict[str, Tensor] = {}
    for number, edit in enumerate(graph.edits):
        for name, constant in edit.named_parameters():
            parameters[f"edits.{number}.{name}"] = initializer = f"bakeout.{edit.site.name}.{name}"
            constants[initializer] = constant.data
    traced = graph_from_program(_trace(graph), parameters, OPSET)
    _name_edits(traced, graph.edits)
    model = ir.Model(traced, ir_version=_IR_VERSION, producer_name="bakeout")
    RemoveUnusedNodesPass()(model)
    _name(traced.inputs, {name: it.dims for name, it in graph.inputs.items()})
    _name(traced.outputs, graph.outputs)
    used = {name for name, initializer in names.items() if initializer in traced.initializers}
    for name in used:
        value = traced.initializers[names[name]]
        read = partial(_weights, component, name, new, progress)
        value.const_value = ir.LazyTensor(
            read, ir.DataType.FLOAT, ir.Shape(parameter_shape(component, name)), name=value.name
        )
    for initializer, tensor in constants.items():
        traced.initializers[initializer].const_value = ir.tensor(tensor.numpy(), name=initializer)
    path = home / "model.onnx"
    size = sum(_bytes(component, name) for name in used) + sum(it.nbytes for it in constants.values())
    large = size > _MAX_INLINE
    _save(model, path, _DATA if large else None)
    sync_files(home)
    onnx.checker.check_model(path, full_check=True)
    return used


def _name_edits(traced: ir.Graph, edits: Sequence[SiteEdit]) -> None:
    """Give the nodes of edits their names; the last of each makes what goes on."""
    for number, edit in enumerate(edits):
        home = f"edits.{number}"
        nodes = [(node, name) for node in traced if (name := node.name or "").startswith((f"{home}.", f"{home}/"))]
        for node, name in nodes:
            node.name = f"bakeout/{edit.site.name}/{name.removeprefix(home).lstrip('./')}"
        nodes[-1][0].name = f"bakeout/{edit.site.name}/edited"


def _save(model: ir.Model, path: Path, external_data: str | None) -> None:
    try:
        ir.save(model, path, external_data=external_data)
    except ir.serde.SerdeError as error:
        # What reading a weight raises comes wrapped, once a level.
        cause: BaseException = error
        while isinstance(cause, ir.serde.SerdeError) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise cause from None


def _name(values: Sequence[ir.Value], names: Mapping[str, _Dims]) -> None:
    """Give inputs or outputs their names and those of their dynamic dimensions."""
    for value, (name, dims) in zip(values, names.items(), strict=True):
        value.name = name
        value.shape = ir.Shape([dims.get(place, size) for place, size in enumerate(value.shape or ())])


def _trace(graph: Graph) -> ExportedProgram:
    """The program of a graph. It needs no weights, so there are none."""
    module = graph.module
    # Not fake: the program has position ids as constants.
    make_position_ids(module, "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        module.load_state_dict(
            {name: torch.empty(it.shape, dtype=torch.float32 if it.is_floating_point() else it.dtype)
             for name, it in module.state_dict().items()},
            assign=True,
        )  # fmt: skip
        example = tuple(torch.zeros(it.shape, dtype=it.dtype) for it in graph.inputs.values())
        return export(module, example, dynamic_shapes=tuple(it.dynamic for it in graph.inputs.values()))


def _initializer(component: Component, parameter: str) -> str:
    location = component.locations[parameter]
    return location.tensor if location.change == "same" else parameter


def _bytes(component: Component, parameter: str) -> int:
    return _FILE_BYTES * prod(parameter_shape(component, parameter))


def _weights(
    component: Component, parameter: str, new: Mapping[str, Tensor], progress: Callable[[int], object]
) -> ir.TensorProtocol:
    dtype = component.tensors[component.locations[parameter].tensor].dtype
    stored = torch.frombuffer(bytearray(read_parameter(component, parameter, new)), dtype=_STORED[dtype])
    values = stored.float().reshape(parameter_shape(component, parameter))
    progress(_bytes(component, parameter))
    return ir.tensor(values.numpy())


def _config(network: Any, component: Component) -> dict[str, Any]:
    """A network's configuration, with the library's defaults filled in."""
    if component.name.startswith("text_encoder"):
        said = network.config.to_json_string(use_diff=False)
    else:
        said = network.to_json_string()
    return {key: value for key, value in {**json.loads(said), **component.config}.items() if key not in _LOCAL}


def _part_files(part: Part) -> dict[str, bytes]:
    if part.name != "scheduler":
        return tokenizer_files(part)
    config = {key: value for key, value in part.config.items() if key not in _LOCAL}
    return {"scheduler_config.json": as_json({**config, "_class_name": part.class_name})}


def _index(model: Model) -> dict[str, Any]:
    """`model_index.json`, without what is not among the graphs."""
    index = {key: value for key, value in model.index.items() if key not in _LOCAL}
    index |= {name: [None, None] for name in _LEFT_OUT if name in index}
    return {**index, "requires_safety_checker": False} if "requires_safety_checker" in index else index
