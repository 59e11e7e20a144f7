"""Patches in a network's graph: as modules in fp64 and as ONNX Runtime runs them, against hooks on the base."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from bakeout.editor.edit import Edit, PatchActivation, PatchWeightInput, ShiftActivation
from bakeout.editor.errors import InputError
from bakeout.editor.merge import merge
from bakeout.editor.model import Model, open_model
from bakeout.export.graphs import graphs_of
from bakeout.export.lower import Lowered, lower_onto
from bakeout.export.onnx import size_of_onnx, write_onnx
from bakeout.export.patch import SitePatch, put_patches
from bakeout.export.steer import edits_of
from bakeout.validate.reference import applied

BLOCK = "unet.down.0.attn.0.block.0"
FFN1, FFN2, KEY, VALUE, OUT = (f"{BLOCK}.{kind}" for kind in ("ffn1", "ffn2", "attn_key", "attn_value", "attn_out"))
LAYER = "text_encoder.layer.0"
TEXT = f"{LAYER}.ffn2"
# Of the tiny model with latents of 2x8, which are as many tokens as 4x4: d_out, d_in and tokens.
LATENTS = (2, 8)
SHAPES = {FFN1: (128, 16, 16), FFN2: (16, 64, 16), KEY: (16, 16, 77), VALUE: (16, 16, 77), OUT: (16, 16, 16),
          TEXT: (16, 32, 77)}  # fmt: skip
# Sides of the latents at which each family is tried; multiples of its unit that are no square.
SIDES = {"sd1": (8, 16), "sd2": (16, 8), "sdxl": (4, 8)}


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chosen(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3


def patch(site: str, at: Any, seed: int = 0, *, tokens: bool = True, **more: Any) -> PatchActivation:
    """A patch of the tiny model; of the UNet's, those of tokens say for which latents."""
    d_out, d_in, count = SHAPES[site]
    shape = (*([count] if tokens else []), d_in if at == "input" else d_out)
    latents = LATENTS if tokens and site.startswith("unet") else None
    return PatchActivation(site, at, chosen(*shape, seed=seed), values(*shape, seed=seed), latents, **more)


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def farthest(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The one comparison of this file, which the negative controls go through as well."""
    return max(relative_error(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def model_of(folders: Callable[[str], Path], tiny_model: Path) -> Callable[[str], Model]:
    return cache(lambda family: open_model(tiny_model if family == "tiny" else folders(family)))


@pytest.fixture(scope="module")
def pipeline_of(model_of: Callable[[str], Model]) -> Callable[[str, torch.dtype], Any]:
    return cache(lambda family, dtype: model_of(family).pipeline(dtype=dtype))


@cache
def inputs_of(family: str, cross: int, batch: int = 2) -> dict[str, Tensor]:
    """The inputs of a UNet's graph, in fp64."""
    height, width = SIDES.get(family, LATENTS)
    given = {"sample": values(batch, 4, height, width, seed=batch), "timestep": torch.tensor(317.0).double(),
             "encoder_hidden_states": values(batch, 77, cross, seed=batch + 1)}  # fmt: skip
    if family == "sdxl":
        sizes = torch.tensor([[16.0, 32, 0, 1, 16, 48]] * batch).double()
        given |= {"text_embeds": values(batch, 40), "time_ids": sizes}
    return given


def batches(pipeline: Any, family: str) -> Iterator[dict[str, Tensor]]:
    for batch in (1, 3):
        yield inputs_of(family, pipeline.unet.config.cross_attention_dim, batch)


@torch.no_grad()
def run(pipeline: Any, family: str = "tiny", given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Calls of the networks, neither of which depends on the other: under the names of the graphs' outputs."""
    dtype = pipeline.unet.dtype
    given = given or inputs_of(family, pipeline.unet.config.cross_attention_dim)
    sample, timestep, text, *more = (it.to(dtype) for it in given.values())
    added = dict(zip(("text_embeds", "time_ids"), more, strict=True)) if more else None
    noise = pipeline.unet(sample, timestep, text, added_cond_kwargs=added).sample
    return {"last_hidden_state": pipeline.text_encoder(tokens(pipeline))[0], "out_sample": noise}


def tokens(pipeline: Any) -> Tensor:
    ids: Tensor = pipeline.tokenizer(["", "a dog"], padding="max_length", return_tensors="pt").input_ids
    return ids


def hooked(edit: Edit, model: Model, pipeline: Any, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    with applied(edit, model, pipeline):
        return run(pipeline, "sdxl" if model.family == "sdxl" else "tiny", given)


@contextmanager
def realised(lowered: Lowered, model: Model, pipeline: Any) -> Iterator[Any]:
    """A copy of the pipeline with what folds in its tensors and what does not in its networks, in its own dtype."""
    made = type("Copy", (), {**vars(pipeline), "components": pipeline.components})()
    for name in ("unet", "text_encoder"):
        network = deepcopy(getattr(pipeline, name))
        names = {location.tensor: key for key, location in model.components[name].locations.items()}
        for stored, tensor in lowered.state.get(name, {}).items():
            network.get_parameter(names[stored]).data = tensor.to(pipeline.unet.dtype)
        own = [(it, site) for it in lowered.remaining.operations if (site := model.site(it.site)).component == name]
        put_patches(network, [SitePatch(it, site, pipeline.unet.dtype) for it, site in own])
        setattr(made, name, network)
    yield made


@pytest.fixture(scope="module")
def exact(model_of: Callable[[str], Model], tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Any]:
    """The tiny model stored in fp64, with biases that are not zero: a fresh network's are."""
    folder = tmp_path_factory.mktemp("exact") / "model"
    pipeline = model_of("tiny").pipeline(dtype=torch.float64)
    for number, parameter in enumerate([*pipeline.unet.parameters(), *pipeline.text_encoder.parameters()]):
        if parameter.ndim == 1:
            parameter.data += 0.1 * values(*parameter.shape, seed=number)
    pipeline.save_pretrained(folder)
    model = open_model(folder)
    return model, model.pipeline(dtype=torch.float64)


@st.composite
def operations(draw: st.DrawFn) -> Any:
    site = draw(st.sampled_from([*SHAPES]))
    d_out, d_in, _ = SHAPES[site]
    seed = draw(st.integers(0, 10**6))
    kind = draw(st.sampled_from(["prune", "weights", "shift", "input", "input", "output", "output"]))
    if kind == "prune":
        return PatchWeightInput(site, chosen(d_out, d_in, seed=seed))
    if kind == "weights":
        return PatchWeightInput(site, chosen(d_out, d_in, seed=seed), values(d_in, seed=seed))
    if kind == "shift":
        return ShiftActivation(site, values(d_out, seed=seed))
    return patch(site, kind, seed, tokens=draw(st.booleans()))


@given(given_operations=st.lists(operations(), min_size=1, max_size=7))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_what_folds_and_the_modules_are_together_the_hooks_in_fp64(exact, given_operations):
    model, pipeline = exact
    edit = merge(Edit((it,)) for it in given_operations)
    lowered = lower_onto(edit, model)
    assume(all(isinstance(it, PatchActivation) for it in lowered.remaining.operations))
    with realised(lowered, model, pipeline) as made:
        found = run(made)
    assert farthest(found, hooked(edit, model, pipeline)) <= 1e-13
    for left_out in lowered.remaining.operations:
        rest = Edit(tuple(it for it in lowered.remaining.operations if it is not left_out))
        with realised(replace(lowered, remaining=rest), model, pipeline) as made:
            # What all keys share, and what an output's patch overwrites, is not seen.
            hidden = left_out.site == KEY or rest.operations or not left_out.mask.any()
            assert hidden or farthest(run(made), found) > 1e-6


PLACES = list(itertools.product(SHAPES, ("input", "output")))
# Name → what is done to the tiny model.
CASES: Mapping[str, Callable[[], Edit]] = {
    "one": lambda: Edit((patch(FFN2, "input"),)),
    "inputs": lambda: Edit(tuple(patch(site, "input", seed) for seed, site in enumerate(SHAPES))),
    "outputs, then shifts": lambda: Edit((
        *(patch(site, "output", seed) for seed, site in enumerate(SHAPES)),
        ShiftActivation(TEXT, values(16, seed=3), "prompted"), ShiftActivation(LAYER, values(77, 16, seed=4)),
    )),
    "features without a bias, and nothing": lambda: Edit((
        patch(VALUE, "input", tokens=False), PatchActivation(TEXT, "input", chosen(77, 32) & False, values(77, 32)),
    )),
    "everything": lambda: merge([
        Edit(tuple(patch(site, at, seed) for seed, (site, at) in enumerate(PLACES))),
        Edit((PatchWeightInput(FFN2, chosen(16, 64, seed=30)),
              PatchWeightInput(FFN2, chosen(16, 64, seed=31), values(64, seed=31)))),
        Edit((patch(FFN2, "input", 32, tokens=False),)), Edit((patch(FFN2, "input", 33),)),
    ]),
}  # fmt: skip


def moved(operation: PatchActivation) -> PatchActivation:
    """The same patch one feature on."""
    return replace(operation, mask=operation.mask.roll(1, -1), value=operation.value.roll(1, -1))


def controls(edit: Edit) -> Iterator[Edit]:
    """The same, but for one patch, which is one feature on."""
    for it in edit.operations:
        if isinstance(it, PatchActivation) and it.mask.any():
            yield Edit(tuple(moved(it) if other is it else other for other in edit.operations))


def without_parts(model: Model, *names: str) -> Model:
    return replace(model, components={name: model.components[name] for name in names}, parts=model.parts)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, model_of: Callable[[str], Model]) -> Callable[..., Path]:
    """The ONNX folder of the tiny model's UNet and text encoder with a case; written once."""
    root = tmp_path_factory.mktemp("graphs")

    def write(case: str | None) -> Path:
        folder = root / (case or "base")
        if not folder.exists():
            model = model_of("tiny")
            lowered = lower_onto(CASES[case]() if case else Edit(()), model)
            needed = without_parts(model, "text_encoder", "unet")
            write_onnx(needed, folder, changed=lowered.state, remaining=lowered.remaining)
        return folder

    return write


def session(source: Path | onnx.ModelProto) -> onnxruntime.InferenceSession:
    given = source if isinstance(source, Path) else source.SerializeToString()
    return onnxruntime.InferenceSession(given, providers=["CPUExecutionProvider"])


def feeds(given: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: (it.float() if it.is_floating_point() else it).numpy() for name, it in given.items()}


def computed(source: Path | onnx.ModelProto, given: Mapping[str, Tensor]) -> Tensor:
    """The first output."""
    return torch.from_numpy(session(source).run(None, feeds(given))[0])


def loaded(folder: Path, name: str = "unet") -> onnx.ModelProto:
    return onnx.load(folder / name / "model.onnx")


@pytest.mark.parametrize("case", CASES)
def test_onnx_runtime_computes_what_hooks_on_the_base_do(case, model_of, pipeline_of, written):
    model, pipeline, folder = model_of("tiny"), pipeline_of("tiny", torch.float32), written(case)
    edit = CASES[case]()
    for given_inputs in batches(pipeline, "tiny"):
        found = {
            "last_hidden_state": computed(folder / "text_encoder" / "model.onnx", {"input_ids": tokens(pipeline)}),
            "out_sample": computed(folder / "unet" / "model.onnx", given_inputs),
        }
        expected = hooked(edit, model, pipeline, given_inputs)
        assert farthest(found, expected) <= 1e-5
        for other in (Edit(()), *controls(edit)):
            wrong = hooked(other, model, pipeline, given_inputs)
            # What is left of a patch that a later one overwrites may be little.
            assert farthest(found, wrong) > 10 * farthest(found, expected)
            assert case == "everything" or farthest(found, wrong) > 1e-4


@torch.no_grad()
def noise(edit: Edit, model: Model, pipeline: Any, given: Mapping[str, Tensor]) -> Tensor:
    """What the UNet gives under hooks."""
    with applied(edit, model, pipeline):
        return run(pipeline, "sdxl" if model.family == "sdxl" else "tiny", given)["out_sample"]


def at_every_block(model: Model, pipeline: Any, family: str) -> Edit:
    """A patch of tokens at the input of every FFN's second Linear, each at its own number of tokens."""
    found: dict[str, int] = {}
    sites = model.sites_of("ffn2")
    handles = [
        model.module(pipeline, site).register_forward_hook(
            lambda _module, _args, output, name=site.name: found.update({name: output.shape[-2]})
        )
        for site in sites
    ]
    run(pipeline, family)
    for handle in handles:
        handle.remove()
    made = []
    for seed, site in enumerate(sites):
        shape = (found[site.name], site.d_in)
        mask, value = chosen(*shape, seed=seed), 20 * values(*shape, seed=seed)
        made.append(PatchActivation(site.name, "input", mask, value, SIDES[family]))
    return Edit(tuple(made))


@pytest.mark.slow
@pytest.mark.parametrize("family", SIDES)
def test_every_block_is_patched_at_its_own_number_of_tokens(family, model_of, pipeline_of, tmp_path):
    model, pipeline = model_of(family), pipeline_of(family, torch.float32)
    edit = at_every_block(model, pipeline, family)
    assert len({len(it.mask) for it in edit.operations}) == {"sd1": 4, "sd2": 4, "sdxl": 2}[family]
    write_onnx(without_parts(model, "unet"), tmp_path / "made", remaining=edit)
    made = loaded(tmp_path / "made")
    assert sum(node.op_type == "MaskedGeglu" for node in made.graph.node) == len(edit.operations)
    assert not [node for node in made.graph.node if node.op_type == "Gelu"]
    for given_inputs in batches(pipeline, family):
        found = computed(made, given_inputs)
        assert relative_error(found, noise(edit, model, pipeline, given_inputs)) <= 1e-6
        for other in (Edit(()), Edit(tuple(moved(it) for it in edit.operations))):
            assert relative_error(found, noise(other, model, pipeline, given_inputs)) > 1e-5


@pytest.mark.parametrize("family", SIDES)
def test_the_patch_of_every_block_is_seen_in_fp64(family, model_of, pipeline_of):
    model, pipeline = model_of(family), pipeline_of(family, torch.float64)
    edit = at_every_block(model, pipeline, family)
    given_inputs = inputs_of(family, pipeline.unet.config.cross_attention_dim)
    with realised(Lowered({}, (), edit), model, pipeline) as made:
        found = run(made, family, given_inputs)["out_sample"]
    assert relative_error(found, noise(edit, model, pipeline, given_inputs)) <= 1e-13
    for other in controls(edit):
        assert relative_error(found, noise(other, model, pipeline, given_inputs)) > 1e-9


def test_a_patched_unet_takes_latents_of_one_size_and_any_number_of_rows_and_tokens(written):
    ours = session(written("one") / "unet" / "model.onnx")
    height, width = LATENTS
    assert {it.name: it.shape for it in ours.get_inputs()} == {
        "sample": ["batch_size", 4, height, width], "timestep": [],
        "encoder_hidden_states": ["batch_size", "sequence_length", 16],
    }  # fmt: skip
    assert [it.shape for it in ours.get_outputs()] == [["batch_size", 4, height, width]]
    for sides in ((width, height), (4, 4), (4, 8)):
        other = {**inputs_of("tiny", 16), "sample": values(2, 4, *sides)}
        with pytest.raises(Exception, match="Got invalid dimensions"):
            ours.run(None, feeds(other))
    fewer = {**inputs_of("tiny", 16), "encoder_hidden_states": values(2, 9, 16)}
    assert ours.run(None, feeds(fewer))[0].shape == (2, 4, height, width)


@pytest.mark.parametrize(
    ("case", "sample", "text", "prompt"),
    [
        (None, ["height", "width"], "sequence_length", "sequence_length"),
        ("one", [*LATENTS], "sequence_length", "sequence_length"), ("inputs", [*LATENTS], 77, 77),
        ("outputs, then shifts", [*LATENTS], 77, 77),
        ("features without a bias, and nothing", ["height", "width"], "sequence_length", 77),
    ],
)  # fmt: skip
def test_only_what_a_patch_holds_is_static(case, sample, text, prompt, written):
    shapes, ids = (
        {it.name: it.shape for it in session(written(case) / name / "model.onnx").get_inputs()}
        for name in ("unet", "text_encoder")
    )
    assert shapes["sample"] == ["batch_size", 4, *sample]
    assert shapes["encoder_hidden_states"] == ["batch_size", text, 16]
    assert ids == {"input_ids": ["batch_size", prompt]}


def test_patches_of_prompts_alone_need_no_size_of_latents(model_of):
    model = model_of("tiny")
    edits = edits_of(Edit((replace(patch(VALUE, "input"), latents=None),)), model)
    (graph,) = graphs_of(without_parts(model, "unet"), edits)
    assert set(graph.inputs["sample"].dims) == {0, 2, 3}
    assert set(graph.inputs["encoder_hidden_states"].dims) == {0}


def test_the_constants_are_places_and_values(written):
    (operation,) = CASES["one"]().operations
    made = loaded(written("one"))
    found = {it.name: numpy_helper.to_array(it) for it in made.graph.initializer if it.name.startswith("bakeout.")}
    assert found.keys() == {f"bakeout.{FFN2}.patch.input.{name}" for name in ("indices", "values")}
    pairs = [
        (token * 64 + feature, np.float32(operation.value[token, feature]))
        for token in range(16) for feature in range(64) if operation.mask[token, feature]
    ]  # fmt: skip
    indices, constants = (found[f"bakeout.{FFN2}.patch.input.{name}"] for name in ("indices", "values"))
    assert (indices.dtype, constants.dtype) == (np.int64, np.float32)
    assert [*zip(indices.tolist(), constants, strict=True)] == pairs


def test_a_node_of_our_own_stands_for_geglu_and_has_a_body(written):
    made = loaded(written("one"))
    onnx.checker.check_model(made, full_check=True)
    assert {it.domain: it.version for it in made.opset_import} == {"": 20, "bakeout": 1}
    (node,) = (it for it in made.graph.node if it.domain)
    assert (node.domain, node.op_type, node.name) == ("bakeout", "MaskedGeglu", f"bakeout/{FFN2}/patch.input/edited")
    attributes = {it.name: onnx.helper.get_attribute_value(it) for it in node.attribute}
    assert attributes == {"plugin_namespace": b"bakeout", "plugin_version": b"1", "aot": 1}
    (function,) = made.functions
    assert (function.domain, function.name, list(function.input)) == (
        "bakeout",
        "MaskedGeglu",
        ["proj", "mask", "value"],
    )
    assert [it.op_type for it in function.node] == ["Split", "Gelu", "Mul", "Where"]
    # Its neighbours: FFN-1 alone gives to it, and FFN-2 alone takes from it.
    makers = {output: it for it in made.graph.node for output in it.output}
    assert makers[node.input[0]].name.startswith(
        "network.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj/"
    )
    (reader,) = (it for it in made.graph.node if node.output[0] in it.input)
    assert reader.op_type == "MatMul"
    assert reader.name.startswith("network.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2/")


def test_a_patch_elsewhere_is_a_where_and_no_node_of_our_own(written):
    features = loaded(written("features without a bias, and nothing"))
    assert not features.functions
    assert [(it.domain, it.version) for it in features.opset_import] == [("", 20)]
    made = loaded(written("inputs"))
    assert len([it for it in made.graph.node if it.domain]) == 1
    (node,) = (it for it in made.graph.node if it.name == f"bakeout/{OUT}/patch.input/edited")
    assert (node.op_type, node.domain) == ("Where", "")


def test_only_floats_are_scattered(written):
    """TensorRT scatters no truth values, and makes none of a shape."""
    for case, count in (("one", 5), ("inputs", 25)):
        inferred = onnx.shape_inference.infer_shapes(loaded(written(case))).graph
        types = {it.name: it.type.tensor_type.elem_type for it in inferred.value_info}
        nodes = [it for it in inferred.node if it.op_type in ("ScatterND", "ConstantOfShape")]
        assert len(nodes) == count
        assert {types[it.output[0]] for it in nodes} == {onnx.TensorProto.FLOAT}


def test_onnx_runtime_expands_the_constants_when_it_loads_them(written, tmp_path):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    path = written("everything") / "unet" / "model.onnx"
    expansion = {"ScatterND", "ConstantOfShape"}
    assert expansion < {node.op_type for node in onnx.load(path).graph.node}
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx").graph
    assert not expansion & {node.op_type for node in optimized.node}
    assert sum(node.op_type == "Where" for node in optimized.node) == 10


BROKEN: Mapping[str, Callable[[onnx.FunctionProto], None]] = {
    "no Where": lambda body: body.output.__setitem__(0, body.node[2].output[0]) or body.node.pop(),
    "the Where's sides swapped": lambda body: body.node[3].input.__setitem__(
        slice(1, 3), [body.node[3].input[2], body.node[3].input[1]]
    ),
    "the gate's sides swapped": lambda body: (
        body.node[1].input.__setitem__(0, body.node[0].output[0]),
        body.node[2].input.__setitem__(0, body.node[0].output[1]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_another_body_is_another_function(what, model_of, pipeline_of, written):
    given_inputs = inputs_of("tiny", 16)
    expected = noise(CASES["one"](), model_of("tiny"), pipeline_of("tiny", torch.float32), given_inputs)
    made = loaded(written("one"))
    assert relative_error(computed(made, given_inputs), expected) <= 1e-5
    BROKEN[what](made.functions[0])
    assert relative_error(computed(made, given_inputs), expected) > 1e-4


def test_the_reference_evaluator_computes_the_same(model_of, pipeline_of, written):
    """Inlined, as its own Gelu needs the types of the graph around it."""
    model, pipeline, given_inputs = model_of("tiny"), pipeline_of("tiny", torch.float32), inputs_of("tiny", 16)
    inlined = onnx.inliner.inline_local_functions(loaded(written("one")))
    assert not {node.domain for node in inlined.graph.node} - {""}
    found = torch.from_numpy(ReferenceEvaluator(inlined).run(None, feeds(given_inputs))[0])
    assert relative_error(found, noise(CASES["one"](), model, pipeline, given_inputs)) <= 1e-5
    (other,) = controls(CASES["one"]())
    assert relative_error(found, noise(other, model, pipeline, given_inputs)) > 1e-4


def test_what_has_no_patch_is_the_same_to_the_byte(written):
    for file in ("text_encoder/model.onnx", "text_encoder/config.json", "unet/config.json"):
        assert (written("one") / file).read_bytes() == (written(None) / file).read_bytes()
    assert (written("one") / "unet" / "model.onnx").read_bytes() != (written(None) / "unet" / "model.onnx").read_bytes()


def test_the_same_edit_gives_the_same_bytes(model_of, written, tmp_path):
    model, edit = model_of("tiny"), CASES["everything"]()
    lowered = lower_onto(Edit(edit.operations[::-1]), model)
    write_onnx(without_parts(model, "unet"), tmp_path / "made", changed=lowered.state, remaining=lowered.remaining)
    made, before = (folder / "unet" / "model.onnx" for folder in (tmp_path / "made", written("everything")))
    assert made.read_bytes() == before.read_bytes()


@pytest.mark.parametrize(("latents", "size"), [((2, 8), 4), ((8, 8), 8)])
def test_pipelines_draw_at_the_size_of_the_configuration_where_it_is_square(latents, size, model_of):
    model = model_of("tiny")
    (base,) = graphs_of(without_parts(model, "unet"))
    edits = edits_of(Edit((replace(patch(FFN2, "input"), latents=latents),)), model)
    (made,) = graphs_of(without_parts(model, "unet"), edits)
    assert base.config["sample_size"] == 4
    assert made.config == {**base.config, "sample_size": size}


def test_the_size_counts_what_is_patched(model_of, written):
    model = without_parts(model_of("tiny"), "text_encoder", "unet")
    edit = CASES["one"]()
    more = size_of_onnx(model, edit) - size_of_onnx(model)
    assert more == 12 * int(edit.operations[0].mask.sum())
    after, before = ((written(it) / "unet" / "model.onnx").stat().st_size for it in ("one", None))
    assert 0 < after - before < more + 10_000


def test_parameters_keep_their_names(model_of):
    model = model_of("tiny")
    edits = edits_of(lower_onto(CASES["everything"](), model).remaining, model)
    for graph in graphs_of(without_parts(model, "unet", "text_encoder"), edits):
        names = {name.removeprefix("network.") for name, _ in graph.module.named_parameters()}
        own = {name for name in names if not re.search(r"\.patch(_input|_output)?\.(indices|values)$", name)}
        assert own == model.components[graph.name].locations.keys()
        assert len(names - own) == 2 * len(edits[graph.name]) == 2 * len(graph.edits)


TALL = replace(patch(FFN2, "input"), latents=None)
REFUSED: Mapping[str, tuple[list[Any], str]] = {
    "no size": ([TALL], r"for 16 tokens and does not say of which height and width; say its latents"),
    "two sizes": (
        [patch(FFN2, "input"), replace(patch(OUT, "input"), latents=(4, 4))],
        r"the Edit of the unet is for latents of 8x2 and for 4x4; calibrate all of it at one picture size",
    ),
    "another number of tokens": (
        [replace(TALL, latents=(4, 8))], r"ffn2 is for 16 tokens where the model has 32; calibrate it on this model",
    ),
    "a side that the model halves unevenly": (
        [replace(TALL, latents=(1, 16))], r"for latents of 16x1 where this model takes multiples of 2; calibrate it",
    ),
    "two lengths": (
        [replace(patch(KEY, "input"), mask=chosen(76, 16), value=values(76, 16)), patch(VALUE, "input")],
        r"the Edit of the unet is for 76 and for 77 tokens; calibrate all of it at one prompt length",
    ),
    "two lengths of a text encoder": (
        [patch(TEXT, "input"), ShiftActivation(LAYER, values(76, 16))], r"text_encoder is for 76 and for 77 tokens",
    ),
    "conditional": ([patch(FFN2, "input", rows="conditional")], r"leaves negative prompts .* off-switch; take rows"),
    "calls": ([patch(FFN2, "input", calls=(0, 9))], r"acts in some calls of the UNet only.*; leave out calls"),
    "latents of a text encoder": (
        [replace(patch(TEXT, "input"), latents=LATENTS)], r"one size of latents, which only the UNet has; leave it out",
    ),
    "a shift after it": (
        [patch(FFN2, "output"), ShiftActivation(FFN2, values(16))],
        r"ShiftActivation at unet.* no graph can hold it yet; leave",
    ),
    "a value beyond fp32": (
        [replace(patch(FFN2, "input"), value=torch.full((16, 64), 1e300, dtype=torch.float64))], "beyond what torch",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_graph_can_hold_is_refused_in_a_sentence(case, model_of, tmp_path):
    refused, message = REFUSED[case]
    model = without_parts(model_of("tiny"), "unet" if refused[0].site.startswith("unet") else "text_encoder")
    with pytest.raises(InputError, match=message) as caught:
        write_onnx(model, tmp_path / "made", remaining=lower_onto(Edit(tuple(refused)), model_of("tiny")).remaining)
    assert "\n" not in str(caught.value)
