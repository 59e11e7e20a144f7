"""Write a model as a folder of ONNX graphs, in the layout that optimum's pipelines for ONNX Runtime read.

    model_index.json  scheduler/  tokenizer/  [tokenizer_2/]
    text_encoder|[text_encoder_2]|unet|vae_encoder|vae_decoder/{config.json,model.onnx[,model.onnx_data]}

The networks are traced without weights, which are then copied tensor by tensor from the model's files, widened to fp32,
and rounded where a graph computes in less (see `bakeout.export.precision`). An initializer has the name of the stored
tensor that it holds, where it holds it as it stands, else the parameter's name in memory; always in PyTorch's
orientation. The same model gives the same bytes.

What of an Edit does not fold into the weights becomes a part of its component's graph. At a site S, say
text_encoder.layer.9, its constants are initializers, in the orientation of the Edit and in fp32 (of a patch, in what it
is computed in),

    bakeout.S.shift.all  bakeout.S.shift.prompted                        [d] or [tokens, d]: sums over the site
    bakeout.S.latents.N.encoder|encoder_bias|center|directions|strengths|neurons    of the N-th SteerLatents
    bakeout.S.blank                                                      int64: the tokens of an empty prompt
    bakeout.S.patch.input.indices  bakeout.S.patch.output.indices        int64 [n]: token * d + feature, rising
    bakeout.S.patch.input.values   bakeout.S.patch.output.values         [n]: of the PatchActivation, there

(see `bakeout.export.steer` and `bakeout.export.patch`). Its nodes are named bakeout/S/... and, of patches,
bakeout/S/patch.input/...; the one whose output takes the place of what is edited is bakeout/S/edited or
bakeout/S/patch.input/edited. At the input of an FFN's second Linear in the UNet that is MaskedGeglu (see
`bakeout.export.custom_ops`). A UNet with a patch that differs from token to token takes latents of one size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor

from bakeout.editor.edit import Edit, Operation, PatchActivation, SteerLatents
from bakeout.editor.errors import InputError
from bakeout.editor.model import Component, Model, Part
from bakeout.export.aten import graph_from_program
from bakeout.export.checkpoint import Changed, parameter_shape, read_parameter, write_synced
from bakeout.export.custom_ops import functions_of
from bakeout.export.graph_file import save_graph
from bakeout.export.graphs import LOCAL, Dims, Graph, graphs_of, trace
from bakeout.export.patch import SitePatch
from bakeout.export.precision import cast
from bakeout.export.shrink import Cut, cuts_of
from bakeout.export.steer import Gate, SiteEdit, edits_of
from bakeout.export.tokenizer import as_json, tokenizer_files

# The oldest with Gelu. ONNX Runtime 1.31 does not care on a CPU: a UNet as wide as that of SD 1.5 took 1.00 of the time
# with 18 (Gelu spelt out) and 23. Attention as the one node that 23 has took 0.96 to 0.97, no more than the noise, and
# GroupNormalization of 21 in place of InstanceNormalization 1.01 (32x32 latents) to 1.07 (64x64).
OPSET: Final = 20
_IR_VERSION = 10
_FILE_BYTES = 4
_INDEX_BYTES = 8
_STORED = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
# Not part of the graphs, and not replaced by anything.
_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")


def write_onnx(
    model: Model,
    folder: Path,
    progress: Callable[[float], object] | None = None,
    started: Callable[[str], object] | None = None,
    *,
    changed: Changed = MappingProxyType({}),
    remaining: Edit | None = None,
    gate: Gate | None = None,
    kept: Mapping[str, Tensor] = MappingProxyType({}),
    precision: str = "fp32",
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
        kept: the hidden units that stay where not all do, as `bakeout.export.shrink.kept_units`; of the model, or with
            what is changed of it, the others must be constant.
        precision: that the graphs compute in, as `bakeout.export.precision` says.

    Raises:
        InputError: an operation of `remaining` has no form in a graph; a network has an operator or a parameter that
            cannot be exported; the precision does not hold a weight; or a file of the model changed meanwhile.
        OSError: a file cannot be written.
        ValueError: a replaced tensor is none that a parameter is read from, or of another dtype or shape; or `kept` has
            a site that is no `ffn2`, or units that it has not.
    """
    cuts = cuts_of(kept, model)
    for name, tensors in changed.items():
        if strange := tensors.keys() - {location.tensor for location in model.components[name].locations.values()}:
            raise ValueError(f"no parameter of the {name} is read from {min(strange)}")
    edits = edits_of(remaining, model, gate) if remaining is not None else {}
    folder.mkdir(parents=True)
    used: dict[str, set[str]] = {name: set() for name in model.components}
    size = size_of_onnx(model)
    for graph in graphs_of(model, edits, cuts):
        if started is not None:
            started(graph.name)
        home = folder / graph.name
        home.mkdir()
        write_synced(home / "config.json", [as_json(graph.config)])
        new = changed.get(graph.component.name, {})
        cut = cuts.get(graph.component.name, {})
        used[graph.component.name] |= _write_graph(
            graph, home, new, cut, lambda count: progress and progress(count / size), precision
        )
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


def size_of_onnx(model: Model, remaining: Edit | None = None, precision: str = "fp32") -> int:
    """How many bytes the weights and the constants of `remaining` take in an ONNX folder; the rest is a few MB.

    In a `precision` below fp32 a text encoder with a SteerLatents may take less: what follows it is rounded.
    """
    operations = () if remaining is None else remaining.operations
    exact = {model.site(it.site).component for it in operations if isinstance(it, SteerLatents)} | {"vae"}
    weights = sum(
        _bytes(component, name) // (1 if precision == "fp32" or component.name in exact else 2)
        for component in model.components.values() for name in component.locations
    )  # fmt: skip
    return weights + sum(map(_constant_bytes, operations))


def _constant_bytes(operation: Operation) -> int:
    if isinstance(operation, PatchActivation):
        return (_INDEX_BYTES + _FILE_BYTES) * int(operation.mask.sum())
    return _FILE_BYTES * sum(it.numel() for it in vars(operation).values() if isinstance(it, Tensor))


def _write_graph(
    graph: Graph, home: Path, new: Mapping[str, Tensor], cuts: Mapping[str, Cut], progress: Callable[[int], object],
    precision: str,
) -> set[str]:  # fmt: skip
    """Write a graph with its weights, of which `new` are replaced, and return the names of the parameters that it has.

    Of those in `cuts` it has a part only. `progress` is called with the bytes of each weight, whole.
    """
    component = graph.component
    names = {name: _initializer(component, name) for name in component.locations}
    parameters = {f"network.{name}": initializer for name, initializer in names.items()}
    constants: dict[str, Tensor] = {}
    edits = graph.edits
    for place, edit in edits.items():
        for name, constant in edit.named_parameters():
            parameters[f"{place}.{name}"] = initializer = ".".join(("bakeout", *edit.name, name))
            constants[initializer] = constant.data
    traced = graph_from_program(trace(graph), parameters, OPSET)
    _name_edits(traced, edits)
    model = ir.Model(traced, ir_version=_IR_VERSION, producer_name="bakeout", functions=functions_of(traced))
    RemoveUnusedNodesPass()(model)
    _name(traced.inputs, {name: it.dims for name, it in graph.inputs.items()})
    _name(traced.outputs, graph.outputs)
    used = {name for name, initializer in names.items() if initializer in traced.initializers}
    for name in used:
        value = traced.initializers[names[name]]
        read = partial(_weights, component, name, new, cuts.get(name), progress)
        value.const_value = ir.LazyTensor(read, ir.DataType.FLOAT, ir.Shape(value.shape or ()), name=value.name)
    for initializer, tensor in constants.items():
        traced.initializers[initializer].const_value = ir.tensor(tensor.numpy(), name=initializer)
    cast(model, precision, graph.name)
    save_graph(model, home / "model.onnx")
    return used


def _name_edits(traced: ir.Graph, edits: Mapping[str, SiteEdit | SitePatch]) -> None:
    """Give the nodes of edits their names; the last of each makes what goes on."""
    for path, edit in edits.items():
        home = "/".join(("bakeout", *edit.name))
        nodes = [(node, name) for node in traced if (name := node.name or "").startswith((f"{path}.", f"{path}/"))]
        for node, name in nodes:
            node.name = f"{home}/{name.removeprefix(path).lstrip('./')}"
        nodes[-1][0].name = f"{home}/edited"


def _name(values: Sequence[ir.Value], names: Mapping[str, Dims]) -> None:
    """Give inputs or outputs their names and those of their dynamic dimensions."""
    for value, (name, dims) in zip(values, names.items(), strict=True):
        value.name = name
        value.shape = ir.Shape([dims.get(place, size) for place, size in enumerate(value.shape or ())])


def _initializer(component: Component, parameter: str) -> str:
    location = component.locations[parameter]
    return location.tensor if location.change == "same" else parameter


def _bytes(component: Component, parameter: str) -> int:
    return _FILE_BYTES * prod(parameter_shape(component, parameter))


def _weights(
    component: Component,
    parameter: str,
    new: Mapping[str, Tensor],
    cut: Cut | None,
    progress: Callable[[int], object],
) -> ir.TensorProtocol:
    dtype = component.tensors[component.locations[parameter].tensor].dtype
    stored = torch.frombuffer(bytearray(read_parameter(component, parameter, new)), dtype=_STORED[dtype])
    values = stored.float().reshape(parameter_shape(component, parameter))
    progress(_bytes(component, parameter))
    return ir.tensor((values if cut is None else cut.of(values)).numpy())


def _part_files(part: Part) -> dict[str, bytes]:
    if part.name != "scheduler":
        return tokenizer_files(part)
    config = {key: value for key, value in part.config.items() if key not in LOCAL}
    return {"scheduler_config.json": as_json({**config, "_class_name": part.class_name})}


def _index(model: Model) -> dict[str, Any]:
    """`model_index.json`, without what is not among the graphs."""
    index = {key: value for key, value in model.index.items() if key not in LOCAL}
    index |= {name: [None, None] for name in _LEFT_OUT if name in index}
    return {**index, "requires_safety_checker": False} if "requires_safety_checker" in index else index
