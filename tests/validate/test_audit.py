import json
import math
import shutil
from contextlib import contextmanager

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file

from bakeout.editor.edit import Edit, PatchActivation, PatchWeightInput, ShiftActivation
from bakeout.editor.merge import merge
from bakeout.editor.model import open_model
from bakeout.export.artifact import Artifact
from bakeout.validate.audit import (
    check_weights,
    edited_linear,
    names_of,
    parameters,
    rounding_of,
    unlike,
    weights_beside,
)
from bakeout.validate.configuration import check_configuration
from bakeout.validate.onnx_folder import OnnxFolder

UNET = "diffusers/unet/diffusion_pytorch_model.safetensors"
EDITED = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2.weight"
UNEDITED = "conv_in.weight"


@pytest.fixture(scope="module")
def base(tiny_model):
    return open_model(tiny_model)


@pytest.fixture
def artifact(exported, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(exported, tmp_path / "artifact")
    return tmp_path / "artifact"


@pytest.fixture(scope="module")
def edit(exported):
    return Artifact.open(exported).edit


def weights(folder, base, edit, target):
    names = names_of(open_model(folder / "diffusers"))
    if target == "onnx":
        graphs = OnnxFolder(folder / "onnx", base)
        beside = [*graphs.beside(), *graphs.unaccounted(names)]
        return check_weights("onnx", base, edit, names, lambda place: graphs.read(names, place), beside)
    model = open_model(folder / "diffusers")
    with parameters(model) as read:
        return check_weights("diffusers", base, edit, names, read, weights_beside(model))


def change(folder, target, name, how, network="unet"):
    """Change one tensor of a target."""
    if target == "diffusers":
        tensors = load_file(folder / UNET)
        how(tensors[name])
        save_file(tensors, folder / UNET, {"format": "pt"})
        return
    path = folder / "onnx" / network / "model.onnx"
    model = onnx.load(path)
    (initializer,) = (it for it in model.graph.initializer if it.name == name)
    values = torch.tensor(numpy_helper.to_array(initializer))
    how(values)
    initializer.CopyFrom(numpy_helper.from_array(values.numpy(), name))
    onnx.save(model, path)


def naive(x, weight, bias, operations):
    """One row through the Linear, in the words of `bakeout.editor.edit`, number by number."""
    rows, columns = weight.shape
    of = {(type(it), getattr(it, "at", getattr(it, "value", 1) is None)): it for it in operations}
    pruned, replaced = of.get((PatchWeightInput, True)), of.get((PatchWeightInput, False))
    inner, outer = of.get((PatchActivation, "input")), of.get((PatchActivation, "output"))
    y = []
    for i in range(rows):
        total = float(bias[i])
        for j in range(columns):
            seen = float(x[j])
            if inner is not None and inner.mask[j]:
                seen = float(inner.value[j])
            if replaced is not None and replaced.mask[i, j]:
                seen = float(replaced.value[j])
            if pruned is None or not pruned.mask[i, j]:
                total += float(weight[i, j]) * seen
        if outer is not None and outer.mask[i]:
            total = float(outer.value[i])
        y.append(total + sum(float(it.value[i]) for it in operations if isinstance(it, ShiftActivation)))
    return torch.tensor(y, dtype=torch.float64)


def some_operations(generator):
    def mask(*shape):
        return torch.rand(shape, generator=generator) < 0.3

    def value(size):
        return torch.randn(size, generator=generator)

    return [
        PatchWeightInput("it", mask(4, 6)),
        PatchWeightInput("it", mask(4, 6), value(6)),
        PatchActivation("it", "input", mask(6), value(6)),
        PatchActivation("it", "output", mask(4), value(4)),
        ShiftActivation("it", value(4)),
        ShiftActivation("it", value(4)),
    ]


@pytest.mark.parametrize("chosen", range(64))
def test_an_edited_linear_computes_what_the_operations_mean(chosen):
    generator = torch.Generator().manual_seed(chosen)
    weight, bias = torch.randn(4, 6, generator=generator), torch.randn(4, generator=generator)
    operations = [it for place, it in enumerate(some_operations(generator)) if chosen >> place & 1]
    x = torch.randn(6, generator=generator)
    new_weight, new_bias = edited_linear(weight, bias, operations)
    expected = naive(x, weight, bias, operations)
    assert (new_weight @ x.double() + new_bias - expected).abs().max() < 1e-12
    if chosen & 0b11111:
        assert not torch.equal(weight.double() @ x.double() + bias.double(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_unedited_values_are_compared_to_the_last_bit(dtype):
    stored = torch.tensor([1.5, -0.0, 3e-5], dtype=dtype)
    assert unlike(stored.float(), stored, stored) == 0
    other = stored.clone()
    other.view(torch.int16 if dtype.itemsize == 2 else torch.int32)[0] ^= 1
    assert unlike(other.float(), stored, stored) == 1
    assert unlike(torch.tensor([1.5, 0.0, 3e-5], dtype=dtype), stored, stored) == 1
    assert unlike(stored[:2], stored, stored) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_changed_biases_may_be_rounded_once_and_nothing_else_may(dtype):
    stored = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=dtype)
    # As in the base, zero, and two new values.
    expected = torch.tensor([float(stored[0]), 0, 1 / 3, 0.7], dtype=torch.float64)
    assert unlike(expected.to(dtype), expected, stored) == 0
    step = 1 + 3 * torch.finfo(dtype).eps
    for place in range(4):
        found = expected.clone()
        found[place] = found[place] * step or 1e-12
        assert unlike(found, expected, stored) == 1
    for place in range(4):
        found = expected.clone()
        found[place] = math.nan
        assert unlike(found, expected, stored) == 1


@pytest.mark.parametrize("target", ["diffusers", "onnx"])
def test_an_honest_artifact_passes(exported, base, edit, target):
    check = weights(exported, base, edit, target)
    assert (check.verdict, check.measured) == ("pass", 0)
    count = sum(len(component.locations) for component in base.components.values())
    assert f"All {count} tensors" in check.summary


def put(value, where):
    """Give the first element of a sort another value."""

    def how(tensor):
        flat = tensor.view(-1)
        flat[int(where(flat).nonzero()[0])] = value

    return how


@pytest.mark.parametrize("target", ["diffusers", "onnx"])
@pytest.mark.parametrize(
    ("name", "how"),
    [
        (UNEDITED, lambda tensor: tensor.view(-1).view(torch.int32)[:1].bitwise_xor_(1)),
        (UNEDITED, put(math.nan, torch.isfinite)),
        (EDITED, put(1e-30, lambda flat: flat == 0)),
        (EDITED, put(math.nan, lambda flat: flat == 0)),
        (EDITED, put(0, lambda flat: flat != 0)),
    ],
    ids=["one bit", "NaN", "one weight is back", "NaN for a zero", "one weight is gone"],
)
def test_one_weight_of_all_is_found(artifact, base, edit, target, name, how):
    change(artifact, target, name, how)
    check = weights(artifact, base, edit, target)
    assert (check.verdict, check.measured) == ("fail", 1)
    assert f"{name}: 1 of" in check.summary


def test_the_base_itself_fails(base, edit, exported):
    names = names_of(base)
    with parameters(base) as read:
        check = check_weights("diffusers", base, edit, names, read)
    assert check.verdict == "fail"
    assert check.measured > 100


def test_another_edit_fails(exported, base, edit):
    other = Edit(tuple(PatchWeightInput(it.site, it.mask.roll(1, 1)) for it in edit.operations))
    assert weights(exported, base, other, "onnx").verdict == "fail"
    fewer = Edit(edit.operations[1:])
    check = weights(exported, base, fewer, "diffusers")
    assert check.verdict == "fail"
    assert "as at" in check.summary


def test_what_weights_cannot_show_is_not_passed(base):
    site = base.sites_of("text_layer")[0]
    edit = Edit((ShiftActivation(site.name, torch.ones(site.d_out), rows="prompted"),))
    with parameters(base) as read:
        check = check_weights("diffusers", base, edit, names_of(base), read)
    assert check.verdict == "unjudged"
    assert site.name in check.summary


def test_a_shift_of_a_layer_is_in_the_bias_of_its_second_ffn(base):
    site = base.sites_of("text_layer")[0]
    edit = merge([Edit((ShiftActivation(site.name, torch.full((site.d_out,), 0.25)),))])
    bias = ("text_encoder", f"{site.module}.mlp.fc2.bias")
    with parameters(base) as read:

        def shifted(place):
            return read(place) + 0.25 if place == bias else read(place)

        assert check_weights("diffusers", base, edit, names_of(base), shifted).verdict == "pass"
        check = check_weights("diffusers", base, edit, names_of(base), read)
    assert (check.verdict, check.measured) == ("fail", site.d_out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_rounding_of_changed_biases_is_an_edit_of_its_own(base, monkeypatch, dtype):
    """With it the edit gives biases that are stored as they are; and nothing else is rounded."""
    layer, other = base.sites_of("text_layer")
    ffn2 = base.site(f"{layer.name}.ffn2")
    value = torch.linspace(-1, 1, layer.d_out, dtype=torch.float64).sin()
    pruning = PatchWeightInput(base.site(f"{other.name}.ffn2").name, torch.ones(layer.d_out, ffn2.d_in, dtype=bool))
    per_token = ShiftActivation(other.name, torch.ones(7, layer.d_out) / 3)

    @contextmanager
    def read_in(model):
        with parameters(model) as read:
            yield lambda place: read(place).to(dtype)

    monkeypatch.setattr("bakeout.validate.audit.parameters", read_in)
    rounding = rounding_of(Edit((ShiftActivation(layer.name, value), pruning, per_token)), base)
    (shift,) = rounding.operations
    assert shift.site == ffn2.name
    with read_in(base) as read:
        exact = read(("text_encoder", f"{layer.module}.mlp.fc2.bias")).double() + value
    assert torch.equal(exact + shift.value, exact.to(dtype).double())
    assert shift.value.any()


def test_a_constant_needs_a_bias_to_be_in(base):
    site = base.sites_of("attn_value")[0]
    assert site.bias is None
    ones = torch.ones(site.d_in, dtype=torch.bool)
    edit = Edit((PatchActivation(site.name, "input", ones, torch.ones(site.d_in)),))
    with parameters(base) as read:
        check = check_weights("diffusers", base, edit, names_of(base), read)
    assert check.verdict == "fail"
    assert "no bias" in check.summary


def test_tensors_of_single_files_are_read_as_they_are_in_memory(single_files, tiny_configs, modules):
    for family in ("sd1", "sd2", "sdxl"):
        model = open_model(single_files(family))
        pipeline = model.pipeline()
        with parameters(model) as read:
            for component in model.components.values():
                own = getattr(pipeline, component.name).state_dict()
                assert all(torch.equal(read((component.name, name)), own[name]) for name in component.locations)


def test_weights_beside_are_found(artifact, base, edit):
    shutil.copy(artifact / UNET, artifact / "diffusers" / "unet" / "another.safetensors")
    check = weights(artifact, base, edit, "diffusers")
    assert "unet/another.safetensors lies beside" in check.summary
    (artifact / "onnx" / "unet" / "model_optimized.onnx").touch()
    assert "unet/model_optimized.onnx lies beside" in weights(artifact, base, edit, "onnx").summary


def changed_graph(folder, network, how):
    path = folder / "onnx" / network / "model.onnx"
    model = onnx.load(path)
    how(model.graph)
    onnx.save(model, path)


def renamed(graph):
    graph.initializer[0].name = "x"


def with_a_sparse_twin(graph):
    """ONNX Runtime takes the dense one, others the sparse one."""
    own = graph.initializer[0]
    value, place = numpy_helper.from_array(np.ones(1, np.float32), own.name), np.zeros((1, len(own.dims)), np.int64)
    twin = onnx.helper.make_sparse_tensor(value, numpy_helper.from_array(place), list(own.dims))
    graph.sparse_initializer.append(twin)


def with_a_constant_twin(graph):
    own = graph.initializer[0]
    other = numpy_helper.from_array(numpy_helper.to_array(own) + 1, own.name)
    graph.node.insert(0, onnx.helper.make_node("Constant", [], [own.name], value=other))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda graph: graph.initializer.pop(0), "has no initializer"),
        (renamed, "has no initializer"),
        (lambda graph: graph.initializer.append(graph.initializer[0]), "has two values"),
        (with_a_sparse_twin, "has two values"),
        (with_a_constant_twin, "has two values"),
        (lambda graph: graph.initializer[0].CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(graph.initializer[0]).astype(np.float16),
                                    graph.initializer[0].name)), "is FLOAT16 in place of FLOAT"),
        (lambda graph: setattr(graph.initializer[0], "raw_data", b"1234"), "holds 1 values in place of"),
    ],
)  # fmt: skip
def test_broken_initializers_are_found(artifact, base, edit, how, said):
    def first_is_a_parameter(graph):
        names = set(names_of(base).values())
        ordered = sorted(graph.initializer, key=lambda it: it.name not in names)
        copies = [onnx.TensorProto.FromString(it.SerializeToString()) for it in ordered]
        del graph.initializer[:]
        graph.initializer.extend(copies)
        how(graph)

    changed_graph(artifact, "unet", first_is_a_parameter)
    check = weights(artifact, base, edit, "onnx")
    assert check.verdict == "fail"
    assert said in check.summary


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_an_operator_of_onnx_must_be_onnx_s_own(artifact, base, edit, domain):
    path = artifact / "onnx" / "unet" / "model.onnx"
    model = onnx.load(path)
    again = onnx.helper.make_node("Identity", ["x"], ["y"])
    opsets = [onnx.helper.make_opsetid("", 20)]
    model.functions.append(onnx.helper.make_function(domain, "Gelu", ["x"], ["y"], [again], opsets))
    onnx.save(model, path)
    check = weights(artifact, base, edit, "onnx")
    assert check.verdict == "fail"
    assert "has a function 'Gelu' of its own" in check.summary


def constant_of(count, name="x"):
    return numpy_helper.from_array(np.zeros(count, np.float32), name)


def in_an_initializer(model, count):
    model.graph.initializer.append(constant_of(count))


def in_many_initializers(model, count):
    model.graph.initializer.extend(constant_of(1, f"x.{number}") for number in range(count))


def in_whole_numbers(model, count):
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(count, np.int64), "x"))


def in_a_sparse_initializer(model, count):
    places = numpy_helper.from_array(np.arange(count, dtype=np.int64))
    model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(constant_of(count), places, [count]))


def in_a_node(model, count):
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["x"], value=constant_of(count)))


def in_a_list(model, count):
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["x"], value_floats=[0.0] * count))


def in_a_function(model, count):
    node = onnx.helper.make_node("Constant", [], ["y"], value=constant_of(count))
    opsets = [onnx.helper.make_opsetid("", 20)]
    model.functions.append(onnx.helper.make_function("ours", "Weights", [], ["y"], [node], opsets))


def in_a_branch(model, count):
    branch = onnx.helper.make_graph([], "branch", [], [], [constant_of(count)])
    other = onnx.helper.make_graph([], "other", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["x"], [], then_branch=branch, else_branch=other))


@pytest.mark.parametrize(
    "hide",
    [in_an_initializer, in_many_initializers, in_whole_numbers, in_a_sparse_initializer, in_a_node, in_a_list,
     in_a_function, in_a_branch],
    ids=lambda it: it.__name__,
)  # fmt: skip
def test_a_second_set_of_weights_is_found_wherever_it_is(artifact, base, edit, hide):
    """A graph may use it where no validation looks."""
    path = artifact / "onnx" / "unet" / "model.onnx"
    honest = path.read_bytes()
    for count, verdict in ((100, "pass"), (10_000, "fail")):
        model = onnx.load_from_string(honest)
        hide(model, count)
        onnx.save(model, path)
        check = weights(artifact, base, edit, "onnx")
        assert check.verdict == verdict
        assert ("unet holds 10," in check.summary) == (verdict == "fail")


def with_external_data(folder, network="unet"):
    path = folder / "onnx" / network / "model.onnx"
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    return path.with_name("model.onnx_data")


def test_external_data_are_read(artifact, base, edit):
    data = with_external_data(artifact)
    assert weights(artifact, base, edit, "onnx").verdict == "pass"
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 1
    data.write_bytes(raw)
    assert weights(artifact, base, edit, "onnx").measured == 1
    data.write_bytes(raw[: len(raw) // 2])
    assert "where it is not" in weights(artifact, base, edit, "onnx").summary
    data.unlink()
    assert weights(artifact, base, edit, "onnx").verdict == "fail"


@pytest.mark.parametrize("location", ["../../../secret", "/etc/hostname", "sub/x", ".", ""])
def test_external_data_elsewhere_are_not_read(artifact, base, edit, location):
    with_external_data(artifact)
    (artifact.parent / "secret").write_bytes(bytes(10_000_000))

    def elsewhere(graph):
        for it in graph.initializer:
            for entry in it.external_data:
                if entry.key == "location":
                    entry.value = location

    path = artifact / "onnx" / "unet" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    elsewhere(model.graph)
    path.write_bytes(model.SerializeToString())
    check = weights(artifact, base, edit, "onnx")
    assert check.verdict == "fail"
    assert "where it is not" in check.summary


def interface(folder, base):
    return OnnxFolder(folder / "onnx", base).check_interface("onnx")


def test_the_interface_of_an_honest_export_passes(exported, base):
    check = interface(exported, base)
    assert check.verdict == "pass"
    assert "11 inputs and outputs" in check.summary


def fix(place):
    def how(graph):
        graph.input[0].type.tensor_type.shape.dim[place].dim_value = 4

    return how


@pytest.mark.parametrize(
    ("network", "how", "said"),
    [
        ("text_encoder", lambda graph: graph.output.pop(), "outputs lacks 'pooler_output'"),
        ("text_encoder", lambda graph: graph.output.reverse(), "outputs has another order"),
        ("unet", lambda graph: graph.input.pop(), "inputs lacks 'encoder_hidden_states'"),
        ("unet", lambda graph: graph.input.append(
            helper.make_tensor_value_info(EDITED, onnx.TensorProto.FLOAT, [1])), "inputs also has"),
        ("unet", lambda graph: graph.input[1].type.tensor_type.shape.dim.add(), "timestep has 1 dimensions"),
        ("unet", fix(0), "sample takes one size only in dimension 0, 4"),
        ("unet", fix(3), "sample takes one size only in dimension 3, 4"),
        ("vae_decoder", fix(2), "latent_sample takes one size only in dimension 2, 4"),
    ],
)  # fmt: skip
def test_another_interface_fails(artifact, base, network, how, said):
    changed_graph(artifact, network, how)
    check = interface(artifact, base)
    assert check.verdict == "fail"
    assert said in check.summary


@pytest.mark.parametrize("content", [b"", b"junk" * 100, None])
def test_what_is_no_graph_fails(artifact, base, edit, content):
    path = artifact / "onnx" / "vae_decoder" / "model.onnx"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert interface(artifact, base).verdict == "fail"
    assert weights(artifact, base, edit, "onnx").verdict == "fail"


def configured(folder, base, target):
    return check_configuration(target, base, folder / target, ["a star"])


@pytest.mark.parametrize("target", ["diffusers", "onnx"])
def test_the_configuration_of_an_honest_artifact_passes(exported, base, target):
    assert configured(exported, base, target).verdict == "pass"


def test_the_size_for_which_an_edit_is_is_that_of_the_configuration(artifact, base):
    """The tiny model has a sample_size of 4; pipelines take it for both sides of what they draw."""
    unet = artifact / "onnx" / "unet" / "config.json"

    def fault(latents):
        check = check_configuration("onnx", base, artifact / "onnx", ["a star"], latents)
        return check.summary.partition("unet: ")[2]

    assert [fault(latents) for latents in (None, (4, 4), (2, 8))] == ["", "", ""]
    assert fault((2, 2)) == "'sample_size' is 4 in place of 2."
    changed_json(unet, "sample_size", 2)
    assert [fault(latents) for latents in (None, (4, 4), (2, 8))] == ["'sample_size' is 2 in place of 4."] * 3
    assert fault((2, 2)) == ""


def changed_json(path, key, value):
    said = json.loads(path.read_text())
    said[key] = value
    path.write_text(json.dumps(said))


@pytest.mark.parametrize("target", ["diffusers", "onnx"])
@pytest.mark.parametrize(
    ("file", "key", "value", "said"),
    [
        ("model_index.json", "_class_name", "StableDiffusionXLPipeline", "model_index.json is of a"),
        ("model_index.json", "scheduler", ["diffusers", "PNDMScheduler"], "scheduler is 'PNDMScheduler'"),
        ("model_index.json", "unet", ["evil", "Code"], "code that is never run"),
        ("model_index.json", "text_encoder", [None, None], "no text_encoder"),
        ("scheduler/scheduler_config.json", "beta_end", 0.02, "'beta_end' is 0.02 in place of 0.012"),
        ("scheduler/scheduler_config.json", "prediction_type", "v_prediction", "'prediction_type'"),
        ("scheduler/scheduler_config.json", "_class_name", "PNDMScheduler", "'PNDMScheduler' in place"),
        ("scheduler/scheduler_config.json", "beta_schedule", "none such", "no working scheduler"),
        ("unet/config.json", "norm_eps", 0.1, "unet: 'norm_eps' is 0.1"),
        ("unet/config.json", "sample_size", 8, "unet: 'sample_size' is 8 in place of 4"),
        ("text_encoder/config.json", "hidden_act", "gelu", "text_encoder: 'hidden_act'"),
        ("tokenizer/tokenizer_config.json", "model_max_length", 20, "tokenizer reads"),
    ],
)  # fmt: skip
def test_another_configuration_fails(artifact, base, target, file, key, value, said):
    changed_json(artifact / target / file, key, value)
    check = configured(artifact, base, target)
    assert check.verdict == "fail"
    assert said in check.summary


@pytest.mark.parametrize("network", ["vae_encoder", "vae_decoder"])
def test_each_half_of_the_vae_has_its_configuration(artifact, base, network):
    changed_json(artifact / "onnx" / network / "config.json", "scaling_factor", 0.13025)
    assert f"{network}: 'scaling_factor' is 0.13025" in configured(artifact, base, "onnx").summary
    (artifact / "onnx" / network / "config.json").unlink()
    assert configured(artifact, base, "onnx").verdict == "fail"


def test_what_only_says_who_wrote_a_configuration_is_not_compared(artifact, base):
    changed_json(artifact / "onnx" / "unet" / "config.json", "_diffusers_version", "0.1.0")
    changed_json(artifact / "onnx" / "text_encoder" / "config.json", "transformers_version", "4.0.0")
    changed_json(artifact / "onnx" / "scheduler" / "scheduler_config.json", "_diffusers_version", "0.1.0")
    assert configured(artifact, base, "onnx").verdict == "pass"


@pytest.mark.parametrize("files", [["tokenizer.json"], ["vocab.json"], ["tokenizer.json", "vocab.json"]])
def test_another_vocabulary_is_found_in_either_file(artifact, base, files):
    home = artifact / "onnx" / "tokenizer"
    for name in files:
        said = json.loads((home / name).read_text())
        vocabulary = said["model"]["vocab"] if name == "tokenizer.json" else said
        vocabulary["a</w>"], vocabulary["r</w>"] = vocabulary["r</w>"], vocabulary["a</w>"]
        (home / name).write_text(json.dumps(said))
    check = configured(artifact, base, "onnx")
    assert check.verdict == "fail"
    assert "reads 'a star' otherwise" in check.summary


@pytest.mark.parametrize(("key", "value"), [("model_max_length", 20), ("pad_token", "!")])
def test_what_pads_and_cuts_prompts_is_compared(artifact, base, key, value):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        changed_json(artifact / "onnx" / "tokenizer" / name, key, value)
    assert "tokenizer reads '' otherwise" in configured(artifact, base, "onnx").summary


def test_words_that_are_in_no_prompt_are_compared(artifact, base):
    for name in ("tokenizer.json", "vocab.json"):
        said = json.loads((artifact / "onnx" / "tokenizer" / name).read_text())
        vocabulary = said["model"]["vocab"] if name == "tokenizer.json" else said
        vocabulary["#"], vocabulary["#</w>"] = vocabulary["#</w>"], vocabulary["#"]
        (artifact / "onnx" / "tokenizer" / name).write_text(json.dumps(said))
    check = configured(artifact, base, "onnx")
    assert check.verdict == "fail"
    assert "reads '#' otherwise" in check.summary


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"])
def test_every_file_of_the_tokenizer_must_be_there(artifact, base, name):
    (artifact / "onnx" / "tokenizer" / name).unlink()
    assert configured(artifact, base, "onnx").verdict == "fail"
    (artifact / "diffusers" / "tokenizer" / "tokenizer_config.json").unlink()
    assert configured(artifact, base, "diffusers").verdict == "fail"


def test_a_tokenizer_that_does_not_load_is_said(artifact, base):
    (artifact / "onnx" / "tokenizer" / "tokenizer.json").write_text("[]")
    assert "tokenizer" in configured(artifact, base, "onnx").summary
