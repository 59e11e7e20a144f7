"""The pre-flight: our graphs pass, and graphs with one fault each do not, with a sentence about that fault."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper, parser
from torch import Tensor

from bakeout.editor.edit import Edit, PatchActivation, PatchWeightInput, ShiftActivation, SteerLatents
from bakeout.editor.errors import InputError
from bakeout.editor.merge import merge
from bakeout.editor.model import Model, open_model
from bakeout.editor.recipe import Range
from bakeout.export.custom_ops import DOMAIN, PLUGIN
from bakeout.export.lower import lower_onto
from bakeout.export.manifest import Shapes
from bakeout.export.onnx import write_onnx
from bakeout.export.precision import cast_file
from bakeout.export.tensorrt.preflight import Finding, check, preflight
from bakeout.export.tensorrt.shapes import profile_of

LAYER = "text_encoder.layer.0"
BLOCK = "unet.down.0.attn.0.block.0"
WIDTH = 16
LATENTS = 48


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def steer(*neurons: int, **changes: Any) -> SteerLatents:
    count = len(neurons)
    return SteerLatents(
        LAYER, encoder=values(LATENTS, WIDTH), encoder_bias=values(LATENTS), center=values(WIDTH), k=5,
        neurons=torch.tensor(neurons), directions=values(WIDTH, count), strengths=values(count), **changes,
    )  # fmt: skip


def patch(site: str, at: Any, *shape: int, latents: tuple[int, int] | None = None) -> PatchActivation:
    return PatchActivation(f"{BLOCK}.{site}", at, values(*shape) > 0.5, values(*shape), latents)


def pruned(model: Model) -> Edit:
    sites = model.sites_of("ffn2")
    return Edit(tuple(PatchWeightInput(it.name, values(it.d_out, it.d_in) > 1) for it in sites))


def of_one_size(model: Model) -> Edit:
    """Pruned weights, patches that differ from token to token, and one neuron and one vector for each token."""
    tokens = (
        patch("ffn2", "input", 16, 64, latents=(2, 8)), patch("ffn1", "output", 16, 128, latents=(2, 8)),
        patch("attn_key", "input", 77, WIDTH),
    )  # fmt: skip
    text = (steer(17, rows="prompted"), ShiftActivation(LAYER, values(77, WIDTH), "prompted"))
    return merge([pruned(model), Edit(tokens), Edit(text)])


def of_any_size(_: Model) -> Edit:
    """Patches of features and neurons among the largest."""
    features = (patch("ffn2", "input", 64), patch("ffn2", "output", WIDTH), patch("attn_value", "input", WIDTH))
    text = (steer(3, 17, rows="prompted", input_norm="layer_norm"), steer(5, 6, input_norm="constant_norm"))
    return merge([Edit(features), Edit(text)])


# Of the tiny model: name → its Edit, and which gate its latents go through.
EDITS: Mapping[str, tuple[Callable[[Model], Edit], Any]] = {
    "one size": (of_one_size, "rank"), "any size": (of_any_size, "topk"),
}  # fmt: skip
FAMILIES = ("sd1", "sd2", "sdxl")
OURS = [*EDITS, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)]


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory, folders: Callable[[str], Path], tiny_model: Path
) -> Callable[[str], Path]:
    """The ONNX folder of a family, or of the tiny model with an Edit; written once."""
    root = tmp_path_factory.mktemp("graphs")

    def write(name: str) -> Path:
        if not (root / name).exists():
            model = open_model(folders(name) if name in FAMILIES else tiny_model)
            edit, gate = EDITS.get(name, (lambda _: Edit(()), None))
            lowered = lower_onto(edit(model), model)
            write_onnx(model, root / name, changed=lowered.state, remaining=lowered.remaining, gate=gate)
        return root / name

    return write


def serving(name: str) -> Shapes:
    """Pictures of several sizes, but where only one can be drawn."""
    if name == "one size":
        width, height = Range(min=32, opt=32, max=32), Range(min=8, opt=8, max=8)
    else:
        width, height = Range(min=32, opt=32, max=64), Range(min=64, opt=64, max=96)
    return Shapes(batch=Range(min=1, opt=2, max=3), width=width, height=height)


@pytest.mark.claim("the graphs of every method pass the check against TensorRT's published operators")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", OURS)
def test_what_we_export_passes(name, precision, written, tmp_path):
    folder = written(name)
    for path in folder.glob("*/model.onnx"):
        graph = path.parent.name
        profile = profile_of(folder, graph, serving(name))
        given = path
        if precision != "fp32":
            given = tmp_path / graph / "model.onnx"
            given.parent.mkdir()
            cast_file(path, given, precision, graph)
        assert preflight(given, profile) == ()
        assert preflight(given, None) == ()
        check(given, profile)


def test_our_graphs_are_looked_at(written, tmp_path):
    """The same graphs with one operator that is not read, and with a range that does not fit."""
    folder = written("any size")
    profile = profile_of(folder, "unet", serving("any size"))
    model = onnx.load(folder / "unet" / "model.onnx")
    next(it for it in model.graph.node if it.op_type == "Cos").op_type = "Det"
    (found,) = preflight(save(model, tmp_path), profile)
    assert found.op_type == "Det"
    least, usual, largest = profile["sample"]
    odd = {**profile, "sample": (least, usual, (*largest[:3], largest[3] + 1))}
    (found,) = preflight(folder / "unet" / "model.onnx", odd)
    assert "the largest shapes" in found.problem


def save(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def parsed(text: str, opsets: str = '"" : 20', functions: str = "") -> onnx.ModelProto:
    """A model of ONNX's own text form, from the graph's inputs on."""
    return parser.parse_model(f"<ir_version: 10, opset_import: [{opsets}]> g {text} {functions}")


PROFILE = {"x": ((1, 4), (2, 4), (4, 4))}
SOUND = "(float[N,4] x) => (float[M,K] y) { y = Relu(x) }"


def test_a_sound_graph_passes(tmp_path):
    path = save(parsed(SOUND), tmp_path)
    assert preflight(path, PROFILE) == preflight(path, None) == ()
    check(path, PROFILE)


def function(name: str, body: str, domain: str = "d") -> str:
    return f'<domain: "{domain}", opset_import: ["" : 20, "d" : 1]> {name} (a) => (b) {{ {body} }}'


def called(*functions: str) -> onnx.ModelProto:
    return parsed("(float[N,4] x) => (float[M,K] y) { y = d.F(x) }", '"" : 20, "d" : 1', " ".join(functions))


def grown() -> onnx.ModelProto:
    """64 functions, each of which calls the next ten times."""
    chain = " ".join(f"b{number} = d.F{{next}}(a)" for number in range(9)) + " b = d.F{next}(a)"
    bodies = [function("F" if level == 0 else f"F{level}", chain.format(next=level + 1)) for level in range(64)]
    return called(*bodies, function("F64", "b = Relu(a)"))


def steps(text: str) -> onnx.ModelProto:
    return parsed(f"(float[N,4] x) => (float[M,K] y) {{ {text} }}")


def with_versions(ir: int = 10, opset: int = 20) -> onnx.ModelProto:
    model = parsed(SOUND)
    model.ir_version, model.opset_import[0].version = ir, opset
    return model


def geglu(**changes: Any) -> onnx.ModelProto:
    """A node of ours whose attributes are others; None leaves one out."""
    given = {name: value for name, value in {**PLUGIN, **changes}.items() if value is not None}
    node = helper.make_node("MaskedGeglu", ["x"], ["y"], "the node", domain=DOMAIN, **given)
    body = helper.make_function(
        DOMAIN, "MaskedGeglu", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], [helper.make_opsetid("", 20)]
    )
    edges = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in ("x", "y")]
    graph = helper.make_graph([node], "g", edges[:1], edges[1:])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, functions=[body], opset_imports=opsets, ir_version=10)


def later() -> onnx.ModelProto:
    model = geglu()
    model.opset_import[1].version = 2
    return model


# A graph with one fault → its kind or operator, and what is said of it.
FAULTS: Mapping[str, tuple[Callable[[], onnx.ModelProto], str, str]] = {
    "an operator that is not read": (lambda: steps("y = Bernoulli(x)"), "Bernoulli", "no operator that"),
    "an element type": (
        lambda: steps("t = Cast<to=9>(x) u = Equal(t, t) y = Cast<to=1>(u)"), "Equal", "is of BOOL, and TensorRT takes",
    ),
    "doubles": (lambda: steps("t = Cast<to=11>(x) y = Cast<to=1>(t)"), "Cast", "is of DOUBLE"),
    "a double that is stored": (
        lambda: parsed("(float[N,4] x) => (float[M,K] y) <double[1] w = {1}> { t = Cast<to=1>(w) y = Add(x, t) }"),
        "initializer", "is of DOUBLE",
    ),
    "text": (lambda: steps("t = Cast<to=8>(x) y = Cast<to=1>(t)"), "Cast", "is of STRING"),
    "a wide unsigned integer": (lambda: steps("t = Cast<to=12>(x) y = Cast<to=1>(t)"), "Cast", "is of UINT32"),
    "bytes inside": (lambda: steps("t = Cast<to=2>(x) y = Cast<to=1>(t)"), "Cast", "is of UINT8"),
    "an old opset": (lambda: with_versions(opset=8), "graph", "is of opset 8"),
    "a new opset": (lambda: with_versions(opset=25), "graph", "is of opset 25"),
    "a new format": (lambda: with_versions(ir=14), "graph", "version 14 of ONNX's format"),
    "another domain": (
        lambda: parsed("(float[N,4] x) => (float[M,K] y) { y = d.Strange(x) }", '"" : 20, "d" : 1'),
        "Strange", "of the domain 'd'",
    ),
    "a function with a built-in's name": (
        lambda: parsed("(float[N,4] x) => (float[M,K] y) { y = d.Gelu(x) }", '"" : 20, "d" : 1',
                       function("Gelu", "b = Relu(a)")),
        "function", "has the name of an operator of TensorRT's own",
    ),
    "two functions of one name": (
        lambda: parsed("(float[N,4] x) => (float[M,K] y) { t = d.F(x) y = e.F(t) }", '"" : 20, "d" : 1, "e" : 1',
                       function("F", "b = Relu(a)") + function("F", "b = Sin(a)", "e")),
        "function", "is there twice",
    ),
    "a function that calls itself": (lambda: called(function("F", "b = d.F(a)")), "function", "calls itself"),
    "functions that call each other": (
        lambda: called(function("F", "b = d.G(a)"), function("G", "b = d.F(a)")), "function", "calls itself",
    ),
    "a call without an input": (
        lambda: called(function("F", "b = d.G(a)"), function("G", "b = Relu(a)").replace("(a)", "(a, c)", 1)),
        "G", "leaves out inputs",
    ),
    "functions that grow": (grown, "graph", "has more than 100000 nodes"),
    "a function whose body is not read": (lambda: called(function("F", "b = d.G(a)"), function("G", "b = Det(a)")),
                                          "Det", "no operator that"),
    "a function whose body has doubles": (lambda: called(function("F", "t = Cast<to=11>(a) b = Cast<to=1>(t)")),
                                          "Cast", "is of DOUBLE"),
    "no namespace": (lambda: geglu(plugin_namespace=None), "MaskedGeglu", "lacks the attribute plugin_namespace"),
    "no version": (lambda: geglu(plugin_version=None), "MaskedGeglu", "lacks the attribute plugin_version"),
    "not ahead of time": (lambda: geglu(aot=None), "MaskedGeglu", "lacks the attribute aot"),
    "another namespace": (lambda: geglu(plugin_namespace="other"), "MaskedGeglu", "plugin_namespace other than"),
    "a version of another type": (lambda: geglu(plugin_version=1), "MaskedGeglu", "plugin_version other than '1'"),
    "just in time": (lambda: geglu(aot=0), "MaskedGeglu", "aot other than 1"),
    "later operators of ours": (later, "graph", "version 2 of the operators of bakeout"),
    "a cycle": (lambda: steps("t = Relu(u) u = Relu(t) y = Add(x, u)"), "graph", "is not valid ONNX"),
    "as many as there are": (
        lambda: steps("t = NonZero(x) u = Cast<to=1>(t) y = Transpose(u)"), "NonZero", "depends on values",
    ),
    "a shape from values": (
        lambda: steps("t = Cast<to=7>(x) i = Constant<value = int64[1] {0}>() "
                      "s = Gather(t, i) u = Squeeze(s, i) v = Reshape(x, u) y = Flatten(v)"),
        "Reshape", "depends on values",
    ),
    "a count from values": (
        lambda: parsed("(float[N,4] x, int64 n) => (float[M,K] y) <int64 a = {0}, int64 b = {1}> "
                       "{ r = Range(a, n, b) t = Cast<to=1>(r) u = ReduceSum(t) y = Add(x, u) }"),
        "Range", "depends on values",
    ),
    "nine dimensions": (
        lambda: steps("s = Constant<value = int64[9] {0,1,1,1,1,1,1,1,4}>() t = Reshape(x, s) y = Flatten(t)"),
        "Reshape", "gives 9 dimensions",
    ),
    "nothing": (
        lambda: parsed("(float[N,4] x) => (float[M,K] y) <int64[1] a = {0}> "
                       "{ t = Slice(x, a, a) y = Concat<axis=0>(t, x) }"),
        "Slice", "without elements",
    ),
    "what does not fit": (
        lambda: steps("s = Constant<value = int64[2] {3,-1}>() y = Reshape(x, s)"), "graph", "does not fit the",
    ),
}  # fmt: skip
EXTRA = {"a count from values": {"n": ((), (), ())}}


@pytest.mark.claim("what TensorRT's parser would refuse is named without TensorRT")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault, tmp_path):
    build, op_type, said = FAULTS[fault]
    path = save(build(), tmp_path)
    found = preflight(path, PROFILE | EXTRA.get(fault, {}))
    assert {(it.op_type, said in it.problem) for it in found} == {(op_type, True)}
    with pytest.raises(InputError) as caught:
        check(path, PROFILE | EXTRA.get(fault, {}))
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_our_own_node_passes(tmp_path):
    assert preflight(save(geglu(), tmp_path), PROFILE) == ()


def test_functions_of_other_names_pass(tmp_path):
    model = called(function("F", "t = d.G(a) b = d.G(t)"), function("G", "b = Relu(a)"))
    assert preflight(save(model, tmp_path), PROFILE) == ()


def test_bytes_may_go_in_and_out(tmp_path):
    model = parsed("(uint8[N,4] x) => (uint8[M,K] y) { t = Cast<to=1>(x) u = Relu(t) y = Cast<to=2>(u) }")
    assert preflight(save(model, tmp_path), PROFILE) == ()


def test_sizes_of_sizes_are_computed(tmp_path):
    """What the parser needs no values for: sums, products and quotients of sizes, counted and repeated."""
    model = parsed(
        "(float[N,4] x) => (float[A,B] y) <int64[1] two = {2}, int64 none = {0}, int64 one = {1},"
        " int64[1] first = {0}> {"
        " n = Shape<start=0, end=1>(x) m = Mul(n, two) h = Div(m, two) s = Concat<axis=0>(h, two, two)"
        " t = Reshape(x, s) c = Squeeze(m, first) r = Range(none, c, one) f = Cast<to=1>(r) u = ReduceSum(f)"
        " v = Flatten(t) y = Add(v, u) }"
    )
    assert preflight(save(model, tmp_path), PROFILE) == ()


def test_all_faults_are_found_at_once(tmp_path):
    model = steps("t = Cast<to=11>(x) u = Cast<to=1>(t) y = Bernoulli(u) z = Bernoulli<seed=1.0>(y)")
    profile = {"x": ((2, 4), (1, 4), (4, 4)), "z": ((), (), ())}
    path = save(model, tmp_path)
    assert [it.op_type for it in preflight(path, profile)] == ["Bernoulli", "Bernoulli", "Cast", "input", "input"]
    with pytest.raises(InputError, match="and 4 more of its parts have a fault"):
        check(path, profile)


# Profiles that the sound graph does not take → what is said.
PROFILES: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "none": ({}, "has a dynamic size and no range"),
    "of another input": ({**PROFILE, "z": ((1,), (1,), (1,))}, "is in the profile and not in the graph"),
    "of another rank": ({"x": ((1,), (2,), (4,))}, "has 2 dimensions in the graph"),
    "with two ends": ({"x": ((1, 4), (4, 4))}, "has 2 dimensions in the graph"),
    "falling": ({"x": ((4, 4), (2, 4), (4, 4))}, "has no rising sizes"),
    "with the usual above the largest": ({"x": ((1, 4), (8, 4), (4, 4))}, "has no rising sizes"),
    "from nothing": ({"x": ((0, 4), (2, 4), (4, 4))}, "has no rising sizes"),
    "beyond integers": ({"x": ((1, 4), (2, 4), (2**31, 4))}, "has no rising sizes"),
    "of another static size": ({"x": ((1, 4), (2, 4), (4, 5))}, "has 4 alone"),
}


@pytest.mark.parametrize("case", PROFILES)
def test_a_profile_that_does_not_fit_is_named(case, tmp_path):
    profile, said = PROFILES[case]
    (found,) = preflight(save(parsed(SOUND), tmp_path), profile)
    assert found.op_type == "input"
    assert said in found.problem


def test_one_name_is_one_range(tmp_path):
    path = save(parsed("(float[N,4] x, float[N,4] z) => (float[M,K] y) { y = Add(x, z) }"), tmp_path)
    assert preflight(path, {**PROFILE, "z": PROFILE["x"]}) == ()
    (found,) = preflight(path, {**PROFILE, "z": ((1, 4), (1, 4), (4, 4))})
    assert "another range in dimension 0 than 'x'" in found.problem


def test_only_convolutions_and_our_own_are_limited_to_int32(tmp_path):
    side = 1 << 15
    profile = {"x": ((1, 1, 1, 1), (1, 1, 1, 1), (2, 1, side, side))}
    conv = "(float[N,1,H,W] x) => (float[A,B,C,D] y) <float[1,1,1,1] w = {1}> { y = Conv(x, w) }"
    (found,) = preflight(save(parsed(conv), tmp_path), profile)
    assert f"{2 * side * side} elements at the largest shapes" in found.problem
    relu = "(float[N,1,H,W] x) => (float[A,B,C,D] y) { y = Relu(x) }"
    assert preflight(save(parsed(relu), tmp_path), profile) == ()
    own = {"x": ((1, 4), (1, 4), (1 << 30, 4))}
    (found,) = preflight(save(geglu(), tmp_path), own)
    assert f"{1 << 32} elements" in found.problem
    assert preflight(save(parsed(SOUND), tmp_path), own) == ()


@pytest.mark.parametrize("size", [2**62, 2**31, 0, -3])
def test_a_static_size_that_no_tensor_has_is_named(size, tmp_path):
    model = parsed(SOUND)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = size
    (found,) = preflight(save(model, tmp_path), None)
    assert found.op_type == "input"


def test_names_are_printed_in_ascii_and_cut(tmp_path):
    model = steps("y = Relu(x) z = Det(y)")
    model.graph.node[1].name = "\x1b[31m\n" + "ж" * 10_000
    model.graph.name = "\x07" * 10_000
    with pytest.raises(InputError) as caught:
        check(save(model, tmp_path), PROFILE)
    said = str(caught.value).removeprefix(f"TensorRT does not take {tmp_path}")
    assert said.isascii()
    assert said.isprintable()
    assert len(said) < 1000


def outcome(path: Path) -> str:
    """What is said of a file, whichever way; nothing if all is well."""
    try:
        return "".join(map(str, preflight(path, PROFILE)))
    except InputError as error:
        return str(error)


def test_of_what_is_cut_short_something_is_said(tmp_path):
    path = save(parsed(SOUND), tmp_path)
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert "; " in outcome(path), cut
    with pytest.raises(InputError, match="cannot be read"):
        preflight(tmp_path / "none.onnx", PROFILE)


def test_no_change_of_a_byte_raises_anything_else(tmp_path):
    path = save(grown_by(geglu()), tmp_path)
    whole = path.read_bytes()
    random = Random(0)
    said = set()
    for _ in range(300):
        changed = bytearray(whole)
        changed[random.randrange(len(whole))] = random.randrange(256)
        path.write_bytes(changed)
        said.add(outcome(path).partition("(")[0])
    assert len(said) > 20


def grown_by(model: onnx.ModelProto) -> onnx.ModelProto:
    """With an initializer, a graph in a node and sizes that are computed."""
    other = parsed(
        "(float[N,4] x, bool c) => (float[M,K] y) <int64[1] two = {2}> { n = Shape<start=0, end=1>(x)"
        " s = Concat<axis=0>(n, two, two) z = Reshape(x, s)"
        " w = If(c) <then_branch = t () => (float[A,B] p) { p = Cos(x) },"
        " else_branch = e () => (float[C,D] q) { q = Sin(x) }> }"
    )
    model.graph.node.extend(other.graph.node)
    model.graph.initializer.extend(other.graph.initializer)
    model.graph.input.extend(other.graph.input[1:])
    return model


def test_graphs_in_nodes_are_looked_at(tmp_path):
    text = (
        "(float[N,4] x, bool c) => (float[M,K] y) { y = If(c) <"
        " then_branch = t () => (float[A,B] p) { p = %s(x) },"
        " else_branch = e () => (float[C,D] q) { q = Sin(x) }> }"
    )
    profile = {**PROFILE, "c": ((), (), ())}
    assert preflight(save(parsed(text % "Cos"), tmp_path), profile) == ()
    found = preflight(save(parsed(text % "Bernoulli"), tmp_path), profile)
    assert [it.op_type for it in found] == ["Bernoulli"]


def test_a_finding_is_one_sentence():
    found = Finding("'n'", "Det", "is no operator", "spell it out")
    assert str(found) == "Det 'n' is no operator; spell it out"
