"""Patches in graphs, found by reading the files: what is honest passes at every place, and what is not fails."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from bakeout.editor.edit import Edit, PatchActivation, PatchWeightInput, ShiftActivation
from bakeout.editor.model import Model, open_model
from bakeout.export.lower import lower_onto
from bakeout.export.onnx import write_onnx
from bakeout.validate.audit import check_weights, kept_in_graphs, names_of, rounding_of
from bakeout.validate.graph_edit import check_edit_in_graphs, lengths_of
from bakeout.validate.onnx_folder import OnnxFolder
from bakeout.validate.report.schema import Check
from bakeout.validate.widened import DTYPES

LATENTS = (4, 4)
# Of the tiny model at these latents: site, tokens, width in, width out.
FFN2 = ("unet.down.0.attn.0.block.0.ffn2", 16, 64, 16)
LAST = ("unet.up.1.attn.1.block.0.ffn2", 16, 64, 16)
MID = ("unet.mid.attn.0.block.0.ffn2", 4, 128, 32)
MID_FFN1 = ("unet.mid.attn.0.block.0.ffn1", 4, 32, 256)
OUT = ("unet.down.0.attn.0.block.0.attn_out", 16, 16, 16)
KEY = ("unet.mid.attn.0.block.0.attn_key", 77, 16, 32)
VALUE = ("unet.mid.attn.0.block.0.attn_value", 0, 16, 32)
TEXT = ("text_encoder.layer.0.ffn2", 77, 32, 16)
# Where nothing at all is patched.
OTHER = "unet.up.1.attn.0.block.0.ffn2"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def patch(place: tuple[str, int, int, int], at: Any = "input", share: float = 0.3, seed: int = 0) -> PatchActivation:
    site, tokens, d_in, d_out = place
    width = d_in if at == "input" else d_out
    shape = (tokens, width) if tokens else (width,)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    latents = LATENTS if tokens and site.startswith("unet") and not site.endswith("attn_key") else None
    return PatchActivation(site, at, mask, random(*shape, seed=seed), latents)


def everywhere() -> list[PatchActivation]:
    """At every sort of place, and at two places of one FFN."""
    return [
        patch(FFN2), patch(FFN2, "output", seed=1), patch(LAST, seed=2), patch(MID, seed=3),
        patch(MID_FFN1, "input", seed=4), patch(MID_FFN1, "output", seed=5), patch(OUT, seed=6),
        patch(KEY, seed=7), patch(VALUE, seed=8), patch(VALUE, "output", seed=9), patch(TEXT, seed=10),
        patch(TEXT, "output", seed=11),
    ]  # fmt: skip


def beside() -> list[Any]:
    """What folds, or is no patch, at the same sites."""
    return [
        PatchWeightInput(FFN2[0], random(16, 64, seed=20) > 1),
        PatchWeightInput(MID[0], random(32, 128, seed=21) > 1, random(128, seed=22)),
        ShiftActivation(TEXT[0], random(16, seed=23), "prompted"),
        ShiftActivation(TEXT[0].removesuffix(".ffn2"), random(77, 16, seed=24)),
        # The patch of the output would overwrite it, were it in the bias.
        ShiftActivation(TEXT[0], random(16, seed=25)),
        ShiftActivation("text_encoder.layer.1.ffn2", random(16, seed=26)),
    ]


def write(model: Model, folder: Path, edit: Edit, *names: str) -> Path:
    """The ONNX folder of some networks of a model."""
    lowered = lower_onto(edit, model)
    chosen = {name: it for name, it in model.components.items() if name in names}
    state = {name: it for name, it in lowered.state.items() if name in names}
    write_onnx(replace(model, components=chosen), folder, changed=state, remaining=lowered.remaining)
    return folder


def judge(model: Model, folder: Path, edit: Edit) -> Check:
    kept = kept_in_graphs(edit, model)
    return check_edit_in_graphs("onnx", model, kept, OnnxFolder(folder, model), names_of(model))


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Model:
    return open_model(tiny_model)


WHOLE = Edit((*everywhere(), *beside()))


@pytest.fixture(scope="module")
def whole(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both networks with patches at every sort of place, and other edits beside them."""
    return write(tiny, tmp_path_factory.mktemp("whole") / "it", WHOLE, "unet", "text_encoder")


def test_honest_graphs_pass_at_every_sort_of_place(tiny, whole):
    kept = kept_in_graphs(WHOLE, tiny)
    assert {it.digest for it in kept} == {it.digest for it in WHOLE.operations} - {
        it.digest for it in beside() if isinstance(it, PatchWeightInput) or it.site.endswith("1.ffn2")
    }
    check = judge(tiny, whole, WHOLE)
    assert (check.verdict, check.name, check.summary.count("other sites")) == ("pass", "edit-in-graph", 1)
    graphs, names = OnnxFolder(whole, tiny), {k: v for k, v in names_of(tiny).items() if k[0] != "vae"}
    weights = check_weights("onnx", tiny, WHOLE, names, lambda place: graphs.read(names, place), (), kept)
    assert weights.verdict == "pass"
    assert graphs.unaccounted(names, kept) == []
    # Of what folds nothing may be missing, either.
    less = Edit(tuple(it for it in WHOLE.operations if it.site != MID[0] or isinstance(it, PatchActivation)))
    weights = check_weights("onnx", tiny, less, names, lambda place: graphs.read(names, place), (), kept)
    assert weights.verdict == "fail"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_honest_graphs_in_16_bits_pass(tiny, whole, narrowed, tmp_path, precision):
    folder = narrowed(whole, tmp_path / "it", precision)
    names = {k: v for k, v in names_of(tiny).items() if k[0] != "vae"}

    def judged(edit: Edit, precision: str) -> tuple[str, str]:
        graphs, kept = OnnxFolder(folder, tiny, precision), kept_in_graphs(edit, tiny)
        assert graphs.unaccounted(names, kept) == []
        beside = [it for it in graphs.strange() if it.startswith("unet")]
        weights = check_weights(
            "onnx", tiny, edit, names, lambda place: graphs.read(names, place), beside, kept, {}, graphs.dtype
        )
        return check_edit_in_graphs("onnx", tiny, kept, graphs, names).verdict, weights.verdict

    assert judged(WHOLE, precision) == ("pass", "pass")
    # They are in no other precision than the manifest says.
    assert judged(WHOLE, "bf16" if precision == "fp16" else "fp16")[1] == "fail"
    assert judged(WHOLE, "fp32")[1] == "fail"
    # A constant of a patch is off by what 16 bits can just tell.
    off = replace(patch(MID, seed=3), value=patch(MID, seed=3).value * (1 + 2 * torch.finfo(DTYPES[precision]).eps))
    other = Edit(tuple(off if it.digest == patch(MID, seed=3).digest else it for it in WHOLE.operations))
    assert judged(other, precision) == ("fail", "pass")


@pytest.mark.parametrize("family", [pytest.param("sd2", marks=pytest.mark.slow), "sdxl"])
def test_honest_graphs_pass_in_every_family(folders, tmp_path, family):
    """All FFNs of the UNet, each at its own number of tokens."""
    model = open_model(folders(family))
    pipeline = model.pipeline(dtype=torch.float32)
    tokens: dict[str, int] = {}
    for site in model.sites_of("ffn2"):
        hook = lambda _, args, __, name=site.name: tokens.update({name: args[0].shape[1]})  # noqa: E731
        model.module(pipeline, site).register_forward_hook(hook)
    pipeline("a dog", num_inference_steps=1, output_type="latent", height=64, width=32)
    height, width = 64 // pipeline.vae_scale_factor, 32 // pipeline.vae_scale_factor
    patches = [
        replace(patch((it.name, tokens[it.name], it.d_in, it.d_out), share=0.1, seed=seed), latents=(height, width))
        for seed, it in enumerate(model.sites_of("ffn2"))
    ]
    assert len({len(it.mask) for it in patches}) > 1
    folder = write(model, tmp_path / "it", Edit(tuple(patches)), "unet")
    assert judge(model, folder, Edit(tuple(patches))).verdict == "pass"
    interface = OnnxFolder(folder, model).check_interface("onnx", {}, (height, width))
    assert "unet" not in interface.summary
    moved = [replace(patches[0], mask=patches[0].mask.roll(1, 0)), *patches[1:]]
    for other in (patches[1:], moved):
        assert judge(model, folder, Edit(tuple(other))).verdict == "fail"


def changed(place: int, **changes: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    own = everywhere()
    own[place] = replace(own[place], **{name: how(getattr(own[place], name)) for name, how in changes.items()})
    return Edit((*own, *beside()))


def flip_first(mask: torch.Tensor) -> torch.Tensor:
    other = mask.clone()
    other.view(-1)[0] ^= True
    return other


@pytest.mark.parametrize("place", range(len(everywhere())))
def test_another_edit_is_found_at_every_place(tiny, whole, place):
    own = everywhere()
    assert judge(tiny, whole, changed(place, mask=flip_first)).verdict == "fail"
    assert judge(tiny, whole, changed(place, value=lambda value: value * (1 + 1e-6))).verdict == "fail"
    assert judge(tiny, whole, Edit((*own[:place], *own[place + 1 :], *beside()))).verdict == "fail"


@contextmanager
def opened(folder: Path, network: str = "unet") -> Iterator[Any]:
    """An ONNX model of the folder, to change."""
    path = folder / network / "model.onnx"
    model = onnx.load(path)
    yield model
    onnx.save(model, path)


def named(model: Any, name: str) -> Any:
    (found,) = (it for it in (*model.graph.node, *model.graph.initializer) if it.name == name)
    return found


def home(place: tuple[str, int, int, int], at: str = "input") -> str:
    return f"bakeout/{place[0]}/patch.{at}/"


def constant(model: Any, place: tuple[str, int, int, int], what: str, at: str = "input") -> Any:
    return named(model, f"bakeout.{place[0]}.patch.{at}.{what}")


def own_nodes(model: Any, start: str) -> list[Any]:
    return [node for node in model.graph.node if node.name.startswith(start)]


def test_a_mask_that_a_conversion_empties_is_found(tiny, whole, narrowed, tmp_path):
    """Its truth is that of a number so small that fp16 has 0 for it."""
    folder = narrowed(whole, tmp_path / "it", "fp16")

    def judged() -> Check:
        kept = kept_in_graphs(WHOLE, tiny)
        return check_edit_in_graphs("onnx", tiny, kept, OnnxFolder(folder, tiny, "fp16"), names_of(tiny))

    assert judged().verdict == "pass"
    with opened(folder) as model:
        own = own_nodes(model, home(FFN2))
        (truth,) = (node for node in own if node.op_type == "Cast" and node.attribute[0].i == TensorProto.BOOL)
        ones = next(node for node in own if node.op_type == "ConstantOfShape" and node.attribute[0].t.data_type == 1)
        ones.attribute[0].t.CopyFrom(helper.make_tensor("", TensorProto.FLOAT, [1], [1e-12]))
        low = helper.make_node("Cast", [truth.input[0]], ["low"], "low", to=TensorProto.FLOAT16)
        truth.input[0] = "low"
        place, rest = list(model.graph.node).index(truth), list(model.graph.node)
        del model.graph.node[:]
        model.graph.node.extend([*rest[:place], low, *rest[place:]])
    check = judged()
    assert check.verdict == "fail"
    assert f"'{truth.name}' reads what was converted inside the edit" in check.summary


def set_values(initializer: Any, how: Callable[[Any], Any]) -> None:
    values = how(numpy_helper.to_array(initializer).copy())
    initializer.CopyFrom(numpy_helper.from_array(values, initializer.name))


def put_after(model: Any, name: str, *nodes: Any) -> None:
    place = [node.name for node in model.graph.node].index(name) + 1
    for node in reversed(nodes):
        model.graph.node.insert(place, node)


def read_instead(model: Any, old: str, new: str, start: str = "") -> None:
    for node in model.graph.node:
        if node.name.startswith(start):
            node.input[:] = [new if value == old else value for value in node.input]


def number(array: Any, at: int, value: Any) -> Any:
    array.reshape(-1)[at] = value
    return array


def drop_the_mask(model: Any) -> None:
    """The constants stay, and nothing is patched."""
    last = named(model, f"{home(FFN2)}edited")
    none = numpy_helper.from_array(np.zeros((16, 64), bool), "no mask")
    model.graph.initializer.append(none)
    last.input[1] = none.name


def move_one_index(model: Any) -> None:
    set_values(constant(model, FFN2, "indices"), lambda it: number(it, 0, 1 - it[0]))


def change_one_value(model: Any) -> None:
    set_values(constant(model, FFN2, "values"), lambda it: number(it, 3, np.nextafter(it[3], 9)))


def put_nan(model: Any) -> None:
    set_values(constant(model, FFN2, "values"), lambda it: number(it, 3, np.nan))


def transpose_the_mask(model: Any) -> None:
    """As if it were of latents that lie: 16 tokens of 2 x 8 read in another order."""
    mask = torch.zeros(16, 64, dtype=torch.bool).view(-1)
    mask[torch.from_numpy(numpy_helper.to_array(constant(model, FFN2, "indices")).copy())] = True
    turned = mask.view(2, 8, 64).transpose(0, 1).reshape(-1).nonzero()[:, 0]
    set_values(constant(model, FFN2, "indices"), lambda _: turned.numpy())


def swap_branches(model: Any) -> None:
    last = named(model, f"{home(FFN2, 'output')}edited")
    last.input[1], last.input[2] = last.input[2], last.input[1]


def where_without_its_mask(model: Any) -> None:
    last = named(model, f"{home(OUT)}edited")
    last.input[:] = [last.input[0], last.input[2], last.input[2]]


def exchange_constants_of_sites(model: Any) -> None:
    """Each is there, and of the right shape, and read elsewhere."""
    for what in ("indices", "values"):
        one, other = (f"bakeout.{place[0]}.patch.input.{what}" for place in (FFN2, LAST))
        read_instead(model, one, "for a moment", home(FFN2))
        read_instead(model, other, one, home(LAST))
        read_instead(model, "for a moment", other, home(FFN2))


def exchange_results_of_sites(model: Any) -> None:
    one, other = (named(model, f"{home(place)}edited") for place in (FFN2, LAST))
    one.input[1:], other.input[1:] = list(other.input[1:]), list(one.input[1:])


def scatter_elsewhere(model: Any) -> None:
    """The constants are the Edit's, and lie elsewhere in the mask."""
    mask = named(model, f"{home(FFN2)}edited").input[1]
    (reshape,) = (it for it in own_nodes(model, home(FFN2)) if mask in it.output)
    reshape.input[1] = add(model, "another shape", np.array([64, 16], np.int64))


def add(model: Any, name: str, values: Any) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
    return name


def take_another_number(model: Any) -> None:
    """What is scattered into the mask is 0 in place of 1."""
    makers = [it for it in own_nodes(model, home(FFN2)) if it.op_type == "ConstantOfShape"]
    (ones,) = (it for it in makers if numpy_helper.to_array(it.attribute[0].t)[0] == 1)
    ones.attribute[0].t.CopyFrom(numpy_helper.from_array(np.zeros(1, np.float32)))


def second_with_an_empty_mask(model: Any) -> None:
    """The first is all there, and what the Linear reads is another."""
    last = named(model, f"{home(LAST)}edited")
    mask, value = add(model, "none", np.zeros((16, 64), bool)), add(model, "zeros", np.zeros((16, 64), np.float32))
    second = helper.make_node("MaskedGeglu", [last.input[0], mask, value], ["second"], name="second", domain="bakeout")
    second.attribute.extend(last.attribute)
    read_instead(model, last.output[0], "second")
    put_after(model, last.name, second)


def second_named_like_ours(model: Any) -> None:
    second_with_an_empty_mask(model)
    named(model, "second").name = f"{home(LAST)}second"


def two_of_one_name(model: Any) -> None:
    second_with_an_empty_mask(model)
    named(model, "second").name = f"{home(LAST)}edited"


def plain_geglu_around(model: Any) -> None:
    last = named(model, f"{home(FFN2)}edited")
    nodes = [
        helper.make_node("Split", [last.input[0]], ["a", "g"], name="split", axis=-1, num_outputs=2),
        helper.make_node("Gelu", ["g"], ["gate"], name="gate"),
        helper.make_node("Mul", ["a", "gate"], ["plain"], name="plain"),
    ]
    read_instead(model, last.output[0], "plain")
    put_after(model, last.name, *nodes)


def project_again(model: Any) -> None:
    """Of the first Linear there is a second one, which reads the same weight."""
    last = named(model, f"{home(FFN2)}edited")
    (added,) = (it for it in model.graph.node if it.output[0] == last.input[0])
    again = helper.make_node("Identity", [added.input[0]], ["again"], name="again")
    put_after(model, added.name, again)


def add_what_was_replaced(model: Any) -> None:
    """Behind the patch, half of what it took away comes back."""
    last = named(model, f"{home(FFN2, 'output')}edited")
    nodes = [helper.make_node("Mean", [last.output[0], last.input[2]], ["both"], name="both")]
    read_instead(model, last.output[0], "both")
    put_after(model, last.name, *nodes)


def read_before_the_patch(model: Any) -> None:
    """The key is of what was not patched."""
    last = named(model, f"{home(KEY)}edited")
    read_instead(model, last.output[0], last.input[2])


def change_what_is_read(model: Any) -> None:
    """Between the patch and the Linear."""
    last = named(model, f"{home(OUT)}edited")
    read_instead(model, last.output[0], "smaller")
    half = add(model, "half", np.float32(0.5))
    put_after(model, last.name, helper.make_node("Mul", [last.output[0], half], ["smaller"], name="smaller"))


def take_another_weight(model: Any) -> None:
    """The Linear that reads the patch is another, and that of the site reads what was not patched."""
    last = named(model, f"{home(OUT)}edited")
    (product,) = (it for it in model.graph.node if it.op_type == "MatMul" and last.output[0] in it.input)
    other = helper.make_node("MatMul", [last.input[2], product.input[1]], ["unpatched"], name="unpatched")
    read_instead(model, product.output[0], "unpatched")
    put_after(model, product.name, other)


def trigger_in_the_constants(model: Any) -> None:
    """The mask depends on what is drawn."""
    last = named(model, f"{home(FFN2)}edited")
    nodes = [
        helper.make_node("Cast", ["timestep"], ["now"], name=f"{home(FFN2)}now", to=TensorProto.BOOL),
        helper.make_node("And", [last.input[1], "now"], ["at times"], name=f"{home(FFN2)}times"),
    ]
    before = [node.name for node in model.graph.node][[*model.graph.node].index(last) - 1]
    last.input[1] = "at times"
    put_after(model, before, *nodes)


def endless_constant(model: Any) -> None:
    """It would take all of the memory to be looked at."""
    node = next(it for it in own_nodes(model, home(FFN2)) if it.op_type == "ConstantOfShape")
    node.input[0] = add(model, "endless", np.array([1 << 40], np.int64))


def another_domain(model: Any) -> None:
    named(model, f"{home(FFN2)}edited").domain = "ours"
    model.opset_import.append(helper.make_opsetid("ours", 1))
    model.functions[0].domain = "ours"


def another_version(model: Any) -> None:
    (own,) = (it for it in model.opset_import if it.domain == "bakeout")
    own.version = 2


def without_attribute(name: str, model: Any) -> None:
    last = named(model, f"{home(FFN2)}edited")
    kept = [it for it in last.attribute if it.name != name]
    del last.attribute[:]
    last.attribute.extend(kept)


def another_plugin(model: Any) -> None:
    for it in named(model, f"{home(FFN2)}edited").attribute:
        if it.name == "plugin_namespace":
            it.s = b"theirs"


def node_of_another_domain(model: Any) -> None:
    last = named(model, f"{home(FFN2)}edited")
    read_instead(model, last.output[0], "fast")
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    put_after(model, last.name, helper.make_node("Gelu", [last.output[0]], ["fast"], name="x", domain="com.microsoft"))


def edit_elsewhere(model: Any) -> None:
    """At a site of which the Edit says nothing."""
    node = helper.make_node("Neg", ["sample"], ["negative"], name=f"bakeout/{OTHER}/patch.input/edited")
    model.graph.node.append(node)


def shadow_a_constant(model: Any) -> None:
    """Another value has the name of what was audited."""
    name = constant(model, FFN2, "values").name
    model.graph.node.append(helper.make_node("Neg", ["sample"], [name], name="shadow"))


def skip_the_patch_before(model: Any) -> None:
    """What the first Linear gives is patched, and GEGLU reads what it was."""
    last = named(model, f"{home(MID)}edited")
    last.input[0] = named(model, f"{home(MID_FFN1, 'output')}edited").input[2]


def second_function(model: Any) -> None:
    again = helper.make_node("Identity", ["x"], ["y"])
    opset = helper.make_opsetid("", 20)
    model.functions.append(helper.make_function("bakeout", "Same", ["x"], ["y"], [again], [opset]))


def body(model: Any, *nodes: Any) -> None:
    del model.functions[0].node[:]
    model.functions[0].node.extend(nodes)


def parts(gelu: Any = None, axis: int = -1) -> list[Any]:
    return [
        helper.make_node("Split", ["proj"], ["a", "g"], axis=axis, num_outputs=2),
        gelu or helper.make_node("Gelu", ["g"], ["gate"]),
        helper.make_node("Mul", ["a", "gate"], ["hidden"]),
    ]


def output_of(model: Any) -> str:
    return str(model.functions[0].output[0])


def body_without_where(model: Any) -> None:
    body(model, *parts(), helper.make_node("Identity", ["hidden"], [output_of(model)]))


def body_with_another_gelu(model: Any) -> None:
    gelu = helper.make_node("Gelu", ["g"], ["gate"], approximate="tanh")
    body(model, *parts(gelu), helper.make_node("Where", ["mask", "value", "hidden"], [output_of(model)]))


def body_with_halves_exchanged(model: Any) -> None:
    gelu = helper.make_node("Gelu", ["a"], ["gate"])
    product = helper.make_node("Mul", ["g", "gate"], ["hidden"])
    body(model, parts()[0], gelu, product, helper.make_node("Where", ["mask", "value", "hidden"], [output_of(model)]))


def body_with_branches_exchanged(model: Any) -> None:
    body(model, *parts(), helper.make_node("Where", ["mask", "hidden", "value"], [output_of(model)]))


def body_with_a_trigger(model: Any) -> None:
    """One number in a constant, and nothing is patched."""
    limit = helper.make_node("Constant", [], ["limit"], value_float=1e4)
    body(
        model, *parts(), limit, helper.make_node("ReduceMax", ["proj"], ["most"], keepdims=0),
        helper.make_node("Less", ["most", "limit"], ["usual"]), helper.make_node("And", ["mask", "usual"], ["now"]),
        helper.make_node("Where", ["now", "value", "hidden"], [output_of(model)]),
    )  # fmt: skip


def body_with_a_constant_mask(model: Any) -> None:
    never = helper.make_node("Constant", [], ["never"], value=numpy_helper.from_array(np.zeros((1,), bool)))
    body(model, *parts(), never, helper.make_node("Where", ["never", "value", "hidden"], [output_of(model)]))


IN_UNET = [
    drop_the_mask, move_one_index, change_one_value, put_nan, transpose_the_mask, swap_branches,
    where_without_its_mask, exchange_constants_of_sites, exchange_results_of_sites, scatter_elsewhere,
    take_another_number, second_with_an_empty_mask, second_named_like_ours, two_of_one_name, plain_geglu_around,
    project_again, add_what_was_replaced, read_before_the_patch, change_what_is_read, take_another_weight,
    trigger_in_the_constants, endless_constant, another_domain, another_version, another_plugin,
    node_of_another_domain, edit_elsewhere, shadow_a_constant, skip_the_patch_before, second_function,
    body_without_where, body_with_another_gelu, body_with_halves_exchanged, body_with_branches_exchanged,
    body_with_a_trigger, body_with_a_constant_mask,
]  # fmt: skip


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of `whole` to break."""
    return Path(shutil.copytree(whole, tmp_path / "it"))


def test_a_graph_that_was_only_written_again_passes(tiny, copy):
    for network in ("unet", "text_encoder"):
        with opened(copy, network):
            pass
    assert judge(tiny, copy, WHOLE).verdict == "pass"


@pytest.mark.parametrize("how", IN_UNET, ids=lambda it: it.__name__)
def test_a_patch_that_is_broken_in_the_graph_is_found(tiny, copy, how):
    with opened(copy) as model:
        how(model)
    assert judge(tiny, copy, WHOLE).verdict == "fail"


@pytest.mark.parametrize("name", ["plugin_namespace", "plugin_version", "aot"])
def test_a_plugin_of_which_something_is_not_said_is_found(tiny, copy, name):
    with opened(copy) as model:
        without_attribute(name, model)
    assert "has other attributes" in judge(tiny, copy, WHOLE).summary


@pytest.mark.parametrize("at", ["input", "output"])
def test_a_patch_of_a_text_encoder_is_found_broken(tiny, copy, at):
    """What comes after it, the Linear or a shift, reads what was not patched."""
    with opened(copy, "text_encoder") as model:
        last = named(model, f"{home(TEXT, at)}edited")
        read_instead(model, last.output[0], last.input[2])
    assert f"a way around {home(TEXT, at)}edited" in judge(tiny, copy, WHOLE).summary


def test_an_edit_for_latents_of_one_size_needs_a_graph_that_takes_no_other(tiny, whole, copy):
    def faults(folder: Path, latents: tuple[int, int] | None, lengths: dict[str, int] | None = None) -> list[str]:
        lengths = lengths_of(kept_in_graphs(WHOLE, tiny)) if lengths is None else lengths
        summary = OnnxFolder(folder, tiny).check_interface("onnx", lengths, latents).summary
        told = summary.partition(": ")[2].removesuffix(".").split("; ")
        return [it for it in told if it.startswith("unet: ")]

    assert lengths_of(kept_in_graphs(WHOLE, tiny)) == {"text_encoder": 77, "unet": 77}
    assert faults(whole, LATENTS) == []
    assert faults(whole, None)[0] == "unet: sample takes one size only in dimension 2, 4"
    assert faults(whole, (2, 8))[0] == "unet: sample has 4 in dimension 2, where the edit is for 2 alone"
    assert faults(whole, LATENTS, {"text_encoder": 77}) == [
        "unet: encoder_hidden_states takes one size only in dimension 1, 77"
    ]
    for name, place in (("sample", 3), ("out_sample", 2), ("encoder_hidden_states", 1)):
        with opened(copy) as model:
            (value,) = (it for it in (*model.graph.input, *model.graph.output) if it.name == name)
            before = value.type.tensor_type.shape.dim[place].dim_value
            value.type.tensor_type.shape.dim[place].dim_param = "any"
        assert faults(copy, LATENTS)[0].startswith(f"unet: {name} has any size in dimension {place}, where the edit is")
        with opened(copy) as model:
            (value,) = (it for it in (*model.graph.input, *model.graph.output) if it.name == name)
            value.type.tensor_type.shape.dim[place].dim_value = before
    with opened(copy) as model:
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    assert faults(copy, LATENTS) == ["unet: sample takes one size only in dimension 0, 2"]


def test_what_no_graph_can_tell_apart_is_not_looked_for_there(tiny):
    """So that nobody says that it is there."""
    one = patch(FFN2)
    assert kept_in_graphs(Edit((one,)), tiny) == [one]
    for other in (replace(one, rows="conditional"), replace(one, calls=(0, 1)), replace(one, latents=None)):
        assert kept_in_graphs(Edit((other,)), tiny) == []
        weights = check_weights("onnx", tiny, Edit((other,)), {}, lambda _: torch.zeros(()))
        assert weights.verdict == "unjudged"
    features = patch((FFN2[0], 0, *FFN2[2:]))
    assert kept_in_graphs(Edit((features,)), tiny) == []
    weights = check_weights("onnx", tiny, Edit((replace(features, calls=(0, 1)),)), {}, lambda _: torch.zeros(()))
    assert weights.verdict == "unjudged"
    # Without a bias there is no place for a constant, but a zero needs none.
    without = patch(VALUE)
    assert kept_in_graphs(Edit((without,)), tiny) == [without]
    assert kept_in_graphs(Edit((replace(without, value=torch.zeros(16)),)), tiny) == []
    # What a patch does not overwrite is in the bias.
    shift, over = ShiftActivation(TEXT[0], random(16)), patch(TEXT, "output")
    beside = replace(shift, value=shift.value.where(~over.mask.any(0), 0))
    assert kept_in_graphs(Edit((shift, over)), tiny) == list(Edit((shift, over)).operations)
    assert kept_in_graphs(Edit((beside, over)), tiny) == [over]


def test_what_a_patch_overwrites_has_no_rounding_error(folders):
    """A bias in 16 bits, changed by what folds, under a patch of some tokens of the same Linear's output."""
    model = open_model(folders("sd1"))
    site = model.sites_of("ffn2")[0]
    place = (site.name, 64, site.d_in, site.d_out)
    folds = patch((site.name, 0, *place[2:]))
    (everywhere,) = rounding_of(Edit((folds,)), model).operations
    assert everywhere.value.shape == (site.d_out,)
    over = patch(place, "output")
    (found,) = rounding_of(Edit((folds, over)), model).operations
    assert torch.equal(found.value, everywhere.value.expand(64, -1).where(~over.mask, 0))
    assert found.value.any()
