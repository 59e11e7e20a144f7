"""An ONNX graph as a file: who reads what in it, and parts of it cut out and run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bakeout.validate.audit import difference
from bakeout.validate.onnx_folder import STANDARD, OnnxFolder
from bakeout.validate.widened import edit_home


class Graph:
    """A network's graph, of which nothing is run but what `run_part` is given."""

    def __init__(self, folder: OnnxFolder, name: str, outputs: Sequence[str]) -> None:
        self.folder = folder
        self.name = name
        self.outputs = outputs
        self.model = folder.model(name)
        self.nodes: list[Any] = list(self.model.graph.node)
        self.initializers = folder.initializers(name)

    @property
    def homes(self) -> set[str]:
        """What names of nodes that are of an edit begin with, as `edit_home` tells."""
        return {home for node in self.nodes if (home := edit_home(node.name)) is not None}

    @cached_property
    def readers(self) -> dict[str, list[str]]:
        """Of each value, the names of the nodes that read it; the graph's outputs count as well."""
        found: dict[str, list[str]] = defaultdict(list)
        for node in self.nodes:
            for value in node.input:
                found[value].append(node.name)
        for output in self.model.graph.output:
            found[output.name].append(f"the output {output.name}")
        return found

    def only_reader(self, value: str) -> Any | None:
        """The node that reads a value, if it does so once and nothing else does."""
        return self._first_readers[value] if len(self.readers[value]) == 1 and value in self._first_readers else None

    @cached_property
    def _first_readers(self) -> dict[str, Any]:
        return {value: node for node in reversed(self.nodes) for value in node.input}

    def reached_by(self, edited: str) -> set[str]:
        """The values that depend on `edited`."""
        found = {edited}
        for node in self.nodes:
            if found & set(node.input):
                # One that is left out has no name.
                found |= set(node.output) - {""}
        return found

    def unreadable(self, own: Collection[str] = ()) -> str | None:
        """In words, why the list of nodes does not tell what is computed of what, if so.

        `own` are the names of the nodes of another domain that is known, whose functions another check reads.
        """
        known = {"", *self.initializers, *(it.name for it in self.model.graph.input)}
        for node in self.nodes:
            inner = any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
            if inner or (node.domain not in STANDARD and node.name not in own):
                return f"{self.name} has a node with graphs of its own, or of another domain, which may do anything"
            if not known.issuperset(node.input):
                return f"{self.name} has the node {node.name!a:.100}, which reads what no node before it gives"
            if not known.isdisjoint(set(node.output) - {""}):
                return f"{self.name} has the node {node.name!a:.100}, which gives what is there already"
            known |= set(node.output)
        if self.model.functions and not own:
            return f"{self.name} has functions of its own, which may do anything"
        return None

    def constant_faults(self, name: str, expected: Tensor, home: str) -> Iterator[str]:
        """What is wrong with an initializer that only nodes whose names begin with `home` may read.

        Args:
            name: of the initializer.
            expected: what it must be to the last bit, float32 or int64; rounded where the graph has it in 16 bits.
            home: see above.
        """
        found = self.folder.tensor(self.name, name, expected.dtype)
        expected = expected.to(found.dtype)
        if not torch.equal(found, expected):
            count = int((found != expected).sum()) if found.shape == expected.shape else expected.numel()
            yield difference(name, found, expected, count)
        strangers = [it for it in self.readers[name] if not it.startswith(home)]
        if strangers or not self.readers[name]:
            yield f"{name} is read by {strangers[0]!a:.100}" if strangers else f"nothing reads {name}"
        if name in {it.name for it in self.model.graph.input}:
            yield f"{name} is an input too, and so anything that a caller says"

    def run_part(
        self, nodes: Sequence[Any], inputs: Mapping[str, tuple[torch.dtype, Sequence[int | None]]],
        outputs: Mapping[str, torch.dtype], constants: Mapping[str, Tensor] = {},
    ) -> Any:  # fmt: skip
        """A session of ONNX Runtime, on the CPU, of some of the nodes, in fp32 where the graph is in 16 bits.

        Args:
            nodes: in the order in which they run; they may read initializers.
            inputs: of each, dtype and shape; None is any size.
            outputs: of each, its dtype.
            constants: in place of initializers of these names, which in 16 bits are roundings of them.
        """
        import onnxruntime
        from onnx import helper, numpy_helper

        names = sorted({value for node in nodes for value in node.input} & self.initializers.keys())
        graph = helper.make_graph(
            nodes,
            "part",
            [helper.make_tensor_value_info(name, _onnx_type(dtype), shape) for name, (dtype, shape) in inputs.items()],
            [helper.make_tensor_value_info(name, _onnx_type(dtype), None) for name, dtype in outputs.items()],
            [
                numpy_helper.from_array(constants[name].numpy(), name)
                if name in constants
                else self.folder.whole(self.name, name)
                for name in names
            ],
        )
        model = helper.make_model(
            graph, opset_imports=self.model.opset_import, functions=self.model.functions,
            ir_version=self.model.ir_version,
        )  # fmt: skip
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def _onnx_type(dtype: torch.dtype) -> int:
    from onnx import TensorProto

    types = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64, torch.bool: TensorProto.BOOL}
    return int(types[dtype])
