"""What an inspector says of an engine is held against the graph, and what it does not say is no pass."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from graphs import layers_of, small_graph
from onnx import TensorProto, helper, load, save, shape_inference

from bakeout.editor.errors import InputError
from bakeout.export.precision import cast_file
from bakeout.export.tensorrt.inspection import (
    Inspected,
    UnknownLayersError,
    judge,
    types_of,
)

FP16 = TensorProto.FLOAT16


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return small_graph(tmp_path / "model.onnx", FP16, geglu=True)


def said_of(path: Path) -> dict[str, Any]:
    """As an inspector of TensorRT 11 describes an engine with a layer for each node of a graph."""
    model = shape_inference.infer_shapes(load(path))
    facts = {"faults": [], "plugins": ["bakeout::MaskedGeglu"]}
    stored = {it.name for it in model.graph.initializer}
    edges = [
        {"Name": it.name, "DataType": {1: "Float", 7: "Int64"}[it.type.tensor_type.elem_type]}
        for it in (*model.graph.input, *model.graph.output)
        if it.name not in stored
    ]
    return {"Layers": layers_of(facts, model), "I/O Tensors": edges}


def refused(said: Any, path: Path) -> str:
    with pytest.raises(InputError) as caught:
        judge(said if isinstance(said, str) else json.dumps(said), types_of(path))
    return str(caught.value)


def layer(said: dict[str, Any], name: str) -> dict[str, Any]:
    return next(it for it in said["Layers"] if it["Name"] == name)


def test_the_types_of_a_graph(graph):
    typed = types_of(graph)
    assert typed.values == {"x": "fp32", "x.low": "fp16", "p": "fp16", "h": "fp16", "y": "fp32"}
    assert typed.products == {"proj": "fp16", "ff.net.0": "fp16"}
    assert typed.nodes["y/Cast"] == {"fp16", "fp32"}
    assert (typed.plugins, typed.edges) == ({"ff.net.0"}, {"x": "fp32", "y": "fp32"})


def test_an_engine_that_is_as_the_graph_says(graph):
    assert judge(json.dumps(said_of(graph)), types_of(graph)) == Inspected(layers=4, plugins=1)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("network", ["text_encoder", "unet", "vae_decoder"])
def test_graphs_of_a_model_as_they_are_cast(onnx_folders, tmp_path, network, precision):
    path = tmp_path / "model.onnx"
    cast_file(onnx_folders("sd1") / network / "model.onnx", path, precision, network)
    said = said_of(path)
    assert judge(json.dumps(said), types_of(path)).plugins == 0
    low = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}[precision] if network != "vae_decoder" else "fp32"
    assert set(types_of(path).products.values()) == {low}
    other = "Float" if low != "fp32" else "Half"
    product = next(it for it in said["Layers"] if it["LayerType"] in ("gemm", "CaskConvolution"))
    for tensor in product["Inputs"]:
        tensor.update(Name="somewhere else", DataType=other)
    assert "built another engine" in refused(said, path)


def test_layers_of_several_nodes_and_nodes_of_several_layers(graph):
    """One kernel converts and multiplies; the product is in two steps, of which the second adds up parts in fp32."""
    said = said_of(graph)
    proj, cast = layer(said, "proj"), layer(said, "x.low/Cast")
    said["Layers"].remove(cast)
    proj["Metadata"] += "\x1f" + cast["Metadata"]
    proj["Inputs"] = cast["Inputs"]
    parts = {"Name": "parts", "DataType": "Float"}
    adds = {"Name": "adds", "Inputs": [parts], "Outputs": proj["Outputs"], "Metadata": "[ONNX Layer: proj]"}
    said["Layers"].append(adds)
    assert judge(json.dumps(said), types_of(graph)).layers == 4
    proj["Outputs"] = [parts]
    proj["Metadata"] = "[ONNX Layer: proj]"
    assert "computes 'proj' from fp32, and not in fp16" in refused(said, graph)


def faults() -> dict[str, tuple[Callable[[dict[str, Any]], object], str]]:
    """What is done to what an inspector says, and why that is refused."""

    def tensor(of: str, place: str, **fields: str) -> Callable[[dict[str, Any]], object]:
        return lambda said: layer(said, of)[place][0].update(fields)

    def both(said: dict[str, Any]) -> None:
        tensor("proj", "Inputs", Name="a", DataType="Float")(said)
        tensor("proj", "Outputs", Name="b", DataType="Float")(said)

    return {
        "a product in fp32": (both, "computes 'proj' from fp32, and not in fp16"),
        "a product in part of fp32": (
            lambda said: layer(said, "proj")["Inputs"].append({"Name": "a", "DataType": "Float"}),
            "unknown: of 2 products it does not tell in what 1 are computed, as 'proj'",
        ),
        "a value of the graph in another type": (tensor("proj", "Outputs", DataType="Float"), "'p' of layer 'proj' in"),
        "a type that the graph has not": (tensor("proj", "Outputs", Name="q", DataType="BF16"), "'q' of layer"),
        "a body": (
            lambda said: layer(said, "ff.net.0").update(Metadata="[ONNX Layer: gelu | ff.net.0 (MaskedGeglu)]"),
            "has the body of MaskedGeglu",
        ),
        "a body, as older parsers tell it": (
            lambda said: layer(said, "ff.net.0").update(Metadata="[ONNX Layer: gelu | Local Function: MaskedGeglu]"),
            "has the body of MaskedGeglu",
        ),
        "our kernel twice": (
            lambda said: said["Layers"].append(copy.deepcopy(layer(said, "ff.net.0"))), "has 2 layers for our operator"
        ),
        "no kernel of ours": (lambda said: said["Layers"].remove(layer(said, "ff.net.0")), "has 0 layers for our"),
        "an output in fp16": (lambda said: said["I/O Tensors"][1].update(DataType="Half"), "has 'y' with another type"),
        "no output": (lambda said: said["I/O Tensors"].pop(), "has 'y' .* or not at all"),
        "an output too many": (
            lambda said: said["I/O Tensors"].append({"Name": "probe", "DataType": "Float"}), "has 'probe' with another"
        ),
        "a product of which nothing is said": (
            lambda said: layer(said, "proj").update(Metadata=""),
            "unknown: of 2 products it does not tell in what 1 are computed, as 'proj'",
        ),
        "metadata cut short": (
            lambda said: layer(said, "proj").update(Metadata="[ONNX Layer: pr ... oj"), "unknown: of 2 products it does"
        ),
        "no nodes": (
            lambda said: [it.pop("Metadata", None) for it in said["Layers"]], "unknown: no layer says of what it is"
        ),
        "names alone": (lambda said: said.update(Layers=["proj"]), "unknown: AttributeError"),
        "no layers": (lambda said: said.update(Layers=[]), "unknown: .*no layers"),
        "the bindings of TensorRT 10": (
            lambda said: said.update(Bindings=said.pop("I/O Tensors")), "unknown: .*I/O Tensors"
        ),
        "the field of TensorRT 10": (
            lambda said: layer(said, "proj")["Inputs"][0].update(
                {"Format/Datatype": layer(said, "proj")["Inputs"][0].pop("DataType")}
            ),
            "unknown: .*Datatype",
        ),
        "a type that nobody knows": (tensor("proj", "Inputs", DataType="FP8E4M3"), "unknown: .*FP8E4M3"),
        "shapes that were not set": (
            tensor("proj", "Inputs", DataType="N/A due to dynamic shapes"), "unknown: .*N/A due to"
        ),
    }  # fmt: skip


@pytest.mark.claim("a layer in another precision, or our operator as its body, is found in what the inspector says")
@pytest.mark.parametrize("fault", faults())
def test_an_engine_that_is_not_as_the_graph_says_or_not_known_to_be(graph, fault):
    change, why = faults()[fault]
    said = said_of(graph)
    change(said)
    error = UnknownLayersError if why.startswith("unknown: ") else InputError
    with pytest.raises(error, match=why.removeprefix("unknown: ")):
        judge(json.dumps(said), types_of(graph))


@pytest.mark.parametrize("said", ["", "{", "[]", "null", "7", "[" * 100_000, '{"Layers": 3, "I/O Tensors": []}'])
def test_what_is_no_description(graph, said):
    with pytest.raises(UnknownLayersError):
        judge(said, types_of(graph))


def test_what_is_known_to_be_wrong_comes_before_what_is_not_known(graph):
    said = said_of(graph)
    layer(said, "proj").update(Metadata="")
    said["Layers"].remove(layer(said, "ff.net.0"))
    assert "has 0 layers for our operator" in refused(said, graph)


def test_layers_without_tensors(graph):
    said = said_of(graph)
    said["Layers"].append({"Name": "wait", "LayerType": "wait"})
    assert judge(json.dumps(said), types_of(graph)).layers == 5
    for place in ("Inputs", "Outputs"):
        del layer(said, "proj")[place]
    with pytest.raises(UnknownLayersError, match="as 'proj'"):
        judge(json.dumps(said), types_of(graph))


def test_separators_as_they_are(graph):
    said = said_of(graph)
    layer(said, "proj")["Metadata"] += "\x1e[ONNX Layer: more]"
    assert judge(json.dumps(said).replace("\\u001e", "\x1e"), types_of(graph)).layers == 4


def test_a_graph_that_does_not_tell_its_types(graph):
    model = load(graph)
    model.graph.node[0].op_type, model.graph.node[0].domain = "Unknown", "nobody"
    model.opset_import.append(helper.make_opsetid("nobody", 1))
    save(model, graph)
    with pytest.raises(InputError, match="does not tell from what type 'proj' is computed"):
        types_of(graph)


def test_both_spellings_and_all_names_of_types(graph):
    said = said_of(graph)
    for name, spelled in (("Half", "FP16"), ("Float", "FP32")):
        for tensor in (it for of in said["Layers"] for it in of["Inputs"] + of["Outputs"]):
            if tensor.get("DataType") == name:
                tensor["Datatype"] = spelled
                del tensor["DataType"]
    assert judge(json.dumps(said), types_of(graph)).layers == 4
