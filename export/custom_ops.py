"""Operators of our own in ONNX: nodes of the domain `bakeout`, each with a function body of standard operators.

A runtime without a kernel for one runs its body. TensorRT takes a plugin of the node's name where the node says of
which namespace and version, and ahead of time where `aot` is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import onnx_ir as ir

DOMAIN: Final = "bakeout"
VERSION: Final = 1
PLUGIN: Final[Mapping[str, str | int]] = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION), "aot": 1}
MASKED_GEGLU: Final = "MaskedGeglu"


def functions_of(graph: ir.Graph) -> list[ir.Function]:
    """The bodies of those of our operators that `graph` uses, in the opset that it imports."""
    used = {node.op_type for node in graph if node.domain == DOMAIN}
    return [masked_geglu(graph.opset_imports[""])] if MASKED_GEGLU in used else []


def masked_geglu(opset: int) -> ir.Function:
    """`bakeout.kernels.reference.masked_geglu`; `opset` is at least 20, the first with Gelu."""
    tape = ir.tape.Tape()
    proj, mask, value = inputs = [ir.Value(name=name) for name in ("proj", "mask", "value")]
    a, g = tape.op_multi_out("Split", [proj], {"axis": -1, "num_outputs": 2}, num_outputs=2)
    hidden = tape.op("Mul", [a, tape.op("Gelu", [g], {"approximate": "none"})])
    patched = tape.op("Where", [mask, value, hidden])
    for node, name in zip(tape.nodes, ("split", "gelu", "hidden", "patched"), strict=True):
        node.name = name
        for place, output in enumerate(node.outputs):
            output.name = f"{name}.{place}"
    graph = ir.Graph(inputs, [patched], nodes=tape.nodes, opset_imports={"": opset}, name=MASKED_GEGLU)
    return ir.Function(DOMAIN, MASKED_GEGLU, graph=graph, attributes=[])
