"""The graphs of an ONNX folder as the files that they are: what is in them, and what goes in and comes out.

Nothing is run, and nothing of `bakeout.export` is used.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bakeout.editor.edit import Operation, PatchActivation, SteerLatents
from bakeout.editor.model import Model
from bakeout.validate.audit import BESIDE, MissingError, Parameter, told
from bakeout.validate.contract import FREE, Interface, contract
from bakeout.validate.report.schema import Check
from bakeout.validate.widened import DTYPES, strange_types, wide_products, widen

# The domains of ONNX's own operators.
STANDARD = ("", "ai.onnx")
# What text encoders and UNets take and give of which dimension 1 are a prompt's tokens.
_TOKENS = ("input_ids", "last_hidden_state", "encoder_hidden_states")
# Numbers that are no weights in a graph, at most. Shapes and frequencies of timesteps are a few hundred; the most has a
# text encoder for 77 tokens only, whose causal mask of 77 by 77 is a constant. The smallest FFN of shapes has 49,152.
_OTHERS = 8192
# Of a dtype, what ONNX calls it, how its bytes lie, and the field that may have the values in place of bytes. NumPy has
# no bf16, so numbers in 16 bits are read as their bits.
_STORED: Mapping[torch.dtype, tuple[str, np.dtype[Any], str]] = {
    torch.float32: ("FLOAT", np.dtype("<f4"), "float_data"),
    torch.int64: ("INT64", np.dtype("<i8"), "int64_data"),
    torch.int32: ("INT32", np.dtype("<i4"), "int32_data"),
    torch.float16: ("FLOAT16", np.dtype("<u2"), "int32_data"),
    torch.bfloat16: ("BFLOAT16", np.dtype("<u2"), "int32_data"),
}


class OnnxFolder:
    """The graphs of an ONNX folder as files: nothing is run, and external data are read when they are asked for.

    Args:
        folder: in the directory contract.
        base: the model that was edited.
        precision: of the graphs, of `DTYPES`. What is in 16 bits is told as `widen` makes of it: nodes are those of the
            graph in fp32, and initializers have the values that are stored.
    """

    def __init__(self, folder: Path, base: Model, precision: str = "fp32") -> None:
        self._folder = folder
        self._base = base
        self.dtype = DTYPES[precision]
        self._models: dict[str, Any] = {}
        self._faults: dict[str, str] = {}
        self._strange: list[str] = []
        self._wide: dict[str, list[str]] = {}
        self._hidden: dict[str, list[str]] = {}
        self._initializers: dict[str, dict[str, Any]] = {}
        for name in contract(base):
            try:
                model = _read_model(folder / name / "model.onnx")
                self._initializers[name] = _initializers(model, name)
                self._strange += strange_types(model, name, precision)
                # What becomes of a VAE in 16 bits, no graph can tell, so it may stay in fp32.
                if precision != "fp32" and not name.startswith("vae_"):
                    self._wide[name] = wide_products(model, name, precision)
                self._hidden[name] = widen(model, name, precision)
                self._models[name] = model
            except MissingError as missing:
                self._faults[name] = str(missing)

    def read(self, names: Mapping[Parameter, str], place: Parameter) -> Tensor:
        """A parameter, float32 or in the graphs' precision, called as `names` says.

        Raises MissingError if its graph has it not, or otherwise.
        """
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
        """An initializer of a graph, of a dtype of `_STORED`; in place of float32 also of the graphs' precision.

        Raises MissingError if it is not there, or of another dtype.
        """
        if name not in self.initializers(graph):
            raise MissingError(f"{graph} has no initializer {name}")
        initializer = self._initializers[graph][name]
        if dtype == torch.float32 and initializer.data_type == _type_of(self.dtype):
            dtype = self.dtype
        return _tensor(initializer, self._folder / graph, dtype)

    def whole(self, graph: str, name: str) -> Any:
        """An initializer of a graph with its data in it, in fp32 where it is of floating point.

        Raises MissingError if its data are not where they should be.
        """
        from onnx import TensorProto, numpy_helper

        initializer = self.initializers(graph)[name]
        narrow = initializer.data_type in map(_type_of, (torch.float16, torch.bfloat16))
        if initializer.data_location != TensorProto.EXTERNAL and not narrow:
            return initializer
        dtype = next((dtype for dtype in _STORED if _type_of(dtype) == initializer.data_type), torch.float32)
        values = self.tensor(graph, name, dtype)
        return numpy_helper.from_array((values.float() if narrow else values).numpy(), name)

    def initializers(self, graph: str) -> Mapping[str, Any]:
        """The initializers of a graph by name; external data are not in them. Raises MissingError."""
        self.model(graph)
        return self._initializers[graph]

    def beside(self) -> list[str]:
        """In words, what lies in the graphs' folders besides their configurations, graphs and data."""
        return [
            f"{name}/{path.name}{BESIDE}"
            for name in contract(self._base)
            for path in sorted((self._folder / name).glob("*"))
            if path.name not in ("config.json", "model.onnx", "model.onnx_data")
        ]

    def strange(self, kept: Sequence[Operation] = ()) -> list[str]:
        """In words, what in the graphs is of a type that graphs of this precision do not have.

        Products in fp32, too: by the limits of a coarser precision than it computes in no graph may be judged. But what
        comes before a choice of neurons is in fp32, so that it is the same choice.

        Args:
            kept: operations in the graphs.
        """
        choosing = {self._base.site(it.site).component for it in kept if isinstance(it, SteerLatents)}
        return [*self._strange, *(fault for name, own in self._wide.items() if name not in choosing for fault in own)]

    def hidden(self, graph: str) -> list[str]:
        """In words, what its nodes do not show, because conversions are left out: see `widen`."""
        return self._hidden[graph]

    def unaccounted(self, names: Mapping[Parameter, str], kept: Sequence[Operation] = ()) -> list[str]:
        """In words, which graphs hold so many numbers that are no weights that they could be a second set of these.

        Which set is taken may depend on what no validation draws with: a larger batch, another timestep, a word.

        Args:
            names: of the base's parameters, what the target calls them.
            kept: operations whose constants are in the graphs.
        """
        faults = []
        for name, model in self._models.items():
            component = "vae" if name.startswith("vae_") else name
            known = {own for (owner, _), own in names.items() if owner == component}
            allowed = _OTHERS + sum(_constants_of(it) for it in kept if it.site.startswith(f"{name}."))
            if (count := _numbers_besides(model, known)) > allowed:
                faults.append(f"{name} holds {count:,} numbers that are no weights, where {allowed:,} may be")
        return faults

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
            return Check(name="interface", target=target, verdict="fail", summary=summary)
        count = sum(len(it.inputs) + len(it.outputs) for it in interfaces.values())
        summary = f"All {count} inputs and outputs are those of the directory contract."
        return Check(name="interface", target=target, verdict="pass", summary=summary)


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


def _type_of(dtype: torch.dtype) -> int:
    """ONNX's number of it."""
    from onnx import TensorProto

    return int(TensorProto.DataType.Value(_STORED[dtype][0]))


def _interface_faults(
    name: str, graph: Any, interface: Interface, sizes: Mapping[str, Mapping[int, int]]
) -> Iterator[str]:
    for what, given, wanted in (("input", graph.input, interface.inputs), ("output", graph.output, interface.outputs)):
        dims = {it.name: it.type.tensor_type.shape.dim for it in given}
        types = {it.name: it.type.tensor_type.elem_type for it in given}
        if list(dims) != list(wanted):
            odd = sorted(dims.keys() ^ wanted.keys())
            said = f"{'lacks' if odd[0] in wanted else 'also has'} {odd[0]!a:.100}" if odd else "has another order"
            yield f"{name}: the list of its {what}s {said}"
            continue
        for own, found in dims.items():
            # Hidden states have their tokens where the last one has them.
            only = sizes.get("last_hidden_state" if own.startswith("hidden_states.") else own, {})
            if types[own] != _type_of(torch.int64 if own == "input_ids" else torch.float32):
                yield f"{name}: {own} is neither a token nor in fp32"
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


def _constants_of(operation: Operation) -> int:
    """How many numbers an operation has in a graph at most."""
    if isinstance(operation, PatchActivation):
        return 2 * int(operation.mask.sum())
    return sum(it.numel() for it in vars(operation).values() if isinstance(it, Tensor))


def _numbers_besides(model: Any, known: Collection[str]) -> int:
    """How many numbers an ONNX model holds, also in functions and branches, but for the initializers `known`."""
    count = 0
    holders = [model.graph, *model.functions]
    while holders:
        holder = holders.pop()
        if holder.DESCRIPTOR.name == "GraphProto":
            count += sum(math.prod(it.dims) for it in holder.initializer if it.name not in known)
            count += sum(math.prod(it.values.dims) for it in holder.sparse_initializer)
        for attribute in (it for node in holder.node for it in node.attribute):
            holders += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
            tensors = [attribute.t, *attribute.tensors, attribute.sparse_tensor.values]
            tensors += [it.values for it in attribute.sparse_tensors]
            count += len(attribute.floats) + sum(math.prod(it.dims) for it in tensors if it.data_type)
    return count


def _initializers(model: Any, name: str) -> dict[str, Any]:
    """By name. Raises MissingError where a runtime may compute with others than those, or with other operators."""
    graph = model.graph
    given = Counter([
        *(it.name for it in graph.initializer),
        *(it.values.name for it in graph.sparse_initializer),
        *(value for node in graph.node for value in node.output if value),
    ])  # fmt: skip
    if twice := [value for value, count in given.items() if count > 1]:
        raise MissingError(f"{name} has two values {twice[0]!a:.200}, and which is taken depends on the runtime")
    if own := [it.name for it in model.functions if it.domain in STANDARD]:
        raise MissingError(
            f"{name} has a function {own[0]!a:.100} of its own, which some runtimes take for ONNX's operator"
        )
    return {it.name: it for it in graph.initializer}


def _tensor(initializer: Any, folder: Path, dtype: torch.dtype) -> Tensor:
    """Its values, copied. External data must lie in a file of the folder itself."""
    import onnx

    name, shape = f"{folder.name} {initializer.name}", tuple(initializer.dims)
    kind, stored, field = _STORED[dtype]
    if initializer.data_type != _type_of(dtype):
        raise MissingError(f"{name} is {onnx.TensorProto.DataType.Name(initializer.data_type)} in place of {kind}")
    count = math.prod(shape)
    if initializer.data_location != onnx.TensorProto.EXTERNAL:
        raw = initializer.raw_data
        values = np.frombuffer(raw, stored) if raw else np.array(getattr(initializer, field)).astype(stored)
    else:
        where = {it.key: it.value for it in initializer.external_data}
        file, offset = folder / where.get("location", ""), int(where.get("offset", 0))
        room = file.stat().st_size - stored.itemsize * count if file.parent == folder and file.is_file() else -1
        if not 0 <= offset <= room:
            raise MissingError(f"{name} lies at {where.get('location')!a:.100}, where it is not")
        values = np.memmap(file, stored, "r", offset, (count,)) if count else np.empty(0, stored)
    if values.size != count:
        raise MissingError(f"{name} holds {values.size:,} values in place of {count:,}")
    found = torch.from_numpy(np.array(values, stored.newbyteorder("="))).reshape(shape)
    return found.view(dtype) if stored.itemsize == dtype.itemsize and stored.kind == "u" else found
