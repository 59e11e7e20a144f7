"""Edits in graphs, found by reading the files: what is honest passes in every form, and what is not fails."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import helper

from bakeout.editor.edit import Edit, PatchActivation, PatchWeightInput, ShiftActivation, SteerLatents
from bakeout.editor.model import Model, open_model
from bakeout.export.lower import lower_onto
from bakeout.export.onnx import write_onnx
from bakeout.validate.audit import check_weights, kept_in_graphs, names_of, parameters
from bakeout.validate.graph_edit import check_edit_in_graphs, first_hidden_states, lengths_of
from bakeout.validate.onnx_folder import OnnxFolder
from bakeout.validate.report.schema import Check

SITE = "text_encoder.layer.1"
LATENTS = 48


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steer(site: str, width: int, rows: str = "prompted", **changes: Any) -> SteerLatents:
    neurons = changes.pop("neurons", torch.tensor([2, 17, 30]))
    given: dict[str, Any] = {
        "encoder": values(LATENTS, width, seed=1), "encoder_bias": values(LATENTS, seed=2) / 4,
        "center": values(width, seed=3) / 4, "k": 9, "neurons": neurons,
        "directions": values(width, len(neurons), seed=4), "strengths": values(len(neurons), seed=5).abs(),
    }  # fmt: skip
    return SteerLatents(site, **{**given, **changes}, rows=rows)


def at_site(site: str, width: int) -> dict[str, list[Any]]:
    """Operations at one site that only a graph can hold."""
    per_token = [ShiftActivation(site, values(77, width, seed=seed), "prompted", f"it:{seed}") for seed in range(3)]
    return {
        "latents": [steer(site, width)],
        "latents everywhere": [steer(site, width, "all", input_norm="layer_norm")],
        "latents of constant norm": [steer(site, width, input_norm="constant_norm")],
        "relu latents": [steer(site, width, k=LATENTS)],
        "the largest alone": [steer(site, width, k=1)],
        "all but one": [steer(site, width, "all", k=LATENTS - 1)],
        "shifts of tokens": per_token,
        "shifts everywhere": [replace(per_token[0], rows="all"), per_token[1]],
        "a shift": [ShiftActivation(site, values(width), "prompted")],
        "everything": [
            *per_token, steer(site, width), steer(site, width, "all", center=values(width, seed=8)),
            ShiftActivation(site, values(width, seed=9)),
        ],
    }  # fmt: skip


def write(model: Model, folder: Path, edit: Edit, gate: Any = None) -> Path:
    """The ONNX folder of a model's text encoders."""
    encoders = {name: it for name, it in model.components.items() if name.startswith("text_encoder")}
    lowered = lower_onto(edit, model)
    write_onnx(
        replace(model, components=encoders), folder, changed=lowered.state, remaining=lowered.remaining, gate=gate
    )
    return folder


def judge(model: Model, folder: Path, edit: Edit) -> Check:
    kept = kept_in_graphs(edit, model)
    return check_edit_in_graphs("onnx", model, kept, OnnxFolder(folder, model), names_of(model))


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Model:
    return open_model(tiny_model)


@pytest.mark.parametrize("name", at_site(SITE, 16))
def test_an_honest_graph_passes_in_every_form(tiny, tmp_path, name):
    edit = Edit(tuple(at_site(SITE, 16)[name]))
    assert len(kept_in_graphs(edit, tiny)) == len(edit.operations)
    for gate in ("rank", "topk") if name in ("latents", "all but one") else (None,):
        check = judge(tiny, write(tiny, tmp_path / str(gate), edit, gate), edit)
        assert (check.verdict, check.name, check.target) == ("pass", "edit-in-graph", "onnx")
        assert SITE in check.summary


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["everything", "relu latents"])
def test_an_honest_graph_in_16_bits_passes(tiny, tmp_path, narrowed, precision, name):
    edit = Edit(tuple(at_site(SITE, 16)[name]))
    folder = narrowed(write(tiny, tmp_path / "wide", edit), tmp_path / "it", precision)

    def judged(edit: Edit) -> str:
        kept = kept_in_graphs(edit, tiny)
        return check_edit_in_graphs("onnx", tiny, kept, OnnxFolder(folder, tiny, precision), names_of(tiny)).verdict

    assert judged(edit) == "pass"
    operations = list(edit.operations)
    number, steered = next((n, it) for n, it in enumerate(operations) if isinstance(it, SteerLatents))
    for other in (replace(steered, strengths=steered.strengths * 1.01), replace(steered, k=steered.k - 1)):
        assert judged(Edit((*operations[:number], other, *operations[number + 1 :]))) == "fail"


def test_an_edit_that_a_conversion_undoes_fails(tiny, tmp_path, narrowed):
    """What would be taken away is made so small that fp16 has 0 for it, and then as large as it was."""
    edit = Edit(tuple(at_site(SITE, 16)["relu latents"]))
    folder = narrowed(write(tiny, tmp_path / "wide", edit), tmp_path / "it", "fp16")
    path = folder / "text_encoder" / "model.onnx"
    model = onnx.load(path)
    (taken,) = (
        node for node in model.graph.node if node.op_type == "Sub" and node.name.startswith(f"bakeout/{SITE}/sub")
    )
    place, home, moved = list(model.graph.node).index(taken), f"bakeout/{SITE}/", taken.input[1]
    model.graph.initializer.append(onnx.numpy_helper.from_array(torch.tensor(1e-12).numpy(), "tiny"))
    undone = [
        helper.make_node("Mul", [moved, "tiny"], ["small"], f"{home}small"),
        helper.make_node("Cast", ["small"], ["low"], "low/Cast", to=onnx.TensorProto.FLOAT16),
        helper.make_node("Cast", ["low"], ["wide"], "wide/Cast", to=onnx.TensorProto.FLOAT),
        helper.make_node("Div", ["wide", "tiny"], ["again"], f"{home}again"),
    ]
    taken.input[1] = "again"
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*rest[:place], *undone, *rest[place:]])
    onnx.save(model, path)
    kept = kept_in_graphs(edit, tiny)
    check = check_edit_in_graphs("onnx", tiny, kept, OnnxFolder(folder, tiny, "fp16"), names_of(tiny))
    assert check.verdict == "fail"
    assert f"'{home}again' reads what was converted inside the edit" in check.summary


@pytest.mark.parametrize("family", [pytest.param("sd2", marks=pytest.mark.slow), "sdxl"])
def test_an_honest_graph_passes_in_every_family(folders, narrowed, tmp_path, family):
    model = open_model(folders(family))
    sites = [it for it in model.sites if it.name in (SITE, "text_encoder_2.layer.1", "text_encoder.layer.0.ffn2")]
    assert len(sites) == (3 if family == "sdxl" else 2)
    operations = [it for site in sites for it in at_site(site.name, site.d_out)["latents"]]
    operations += at_site(SITE, 32)["shifts of tokens"]
    edit = Edit(tuple(operations))
    assert judge(model, write(model, tmp_path / "it", edit), edit).verdict == "pass"
    kept, names = kept_in_graphs(edit, model), names_of(model)
    narrow = OnnxFolder(narrowed(tmp_path / "it", tmp_path / "narrow", "fp16"), model, "fp16")
    assert check_edit_in_graphs("onnx", model, kept, narrow, names).verdict == "pass"
    # And what another site, row or strength would be is no part of it.
    for other in (
        [replace(it, rows="all") if it.site == sites[-1].name else it for it in operations],
        [replace(it, site="text_encoder.layer.0") if it.site == SITE else it for it in operations],
        operations[1:],
        [*operations, ShiftActivation(SITE, values(32), "prompted")],
    ):
        assert judge(model, tmp_path / "it", Edit(tuple(other))).verdict == "fail"


@pytest.mark.parametrize(
    ("gate", "norm", "latents"),
    [("rank", "none", 1024), ("topk", "layer_norm", 1024), ("topk", "constant_norm", LATENTS)],
)
def test_one_more_or_fewer_of_the_largest_is_found(tiny, tmp_path, gate, norm, latents):
    """No constant of the Edit tells: k is in the nodes only."""
    more = {"encoder": values(latents, 16, seed=1), "encoder_bias": values(latents, seed=2) / 4}
    made = steer(SITE, 16, input_norm=norm, k=9, **more)
    folder = write(tiny, tmp_path / "it", Edit((made,)), gate)
    verdicts = [judge(tiny, folder, Edit((replace(made, k=k),))).verdict for k in (8, 9, 10)]
    assert verdicts == ["fail", "pass", "fail"]


@pytest.mark.parametrize(
    "changes",
    [
        {"strengths": values(3, seed=5).abs() * 1.2}, {"neurons": torch.tensor([2, 17, 31])},
        {"encoder": values(LATENTS, 16, seed=1).index_put((torch.tensor(40), torch.tensor(7)), torch.tensor(0.0))},
        {"center": values(16, seed=3) / 4 + 1e-6}, {"directions": values(16, 3, seed=4).flip(1)},
        {"encoder_bias": values(LATENTS, seed=2) / 4 * (1 + 1e-6)}, {"input_norm": "layer_norm"}, {"rows": "all"},
        {"k": LATENTS},
    ],
    ids="-".join,
)  # fmt: skip
def test_another_edit_is_found(tiny, gated, changes):
    made = steer(SITE, 16)
    assert judge(tiny, gated, Edit((made,))).verdict == "pass"
    assert judge(tiny, gated, Edit((replace(made, **changes),))).verdict == "fail"


@pytest.fixture(scope="module")
def gated(tiny, tmp_path_factory):
    """Latents at layer 1. Who changes it takes a copy."""
    return write(tiny, tmp_path_factory.mktemp("gated") / "it", Edit((steer(SITE, 16),)), "rank")


@pytest.fixture(scope="module")
def shifted(tiny, tmp_path_factory):
    """Shifts of each token at layer 1. Who changes it takes a copy."""
    return write(tiny, tmp_path_factory.mktemp("shifted") / "it", Edit(tuple(at_site(SITE, 16)["shifts of tokens"])))


@contextmanager
def opened(folder: Path, network: str = "text_encoder"):
    """A graph of the folder, to change."""
    path = folder / network / "model.onnx"
    model = onnx.load(path)
    yield model.graph
    onnx.save(model, path)


def test_a_way_around_to_one_hidden_state_is_found(folders, tmp_path):
    """SDXL's pipelines read those before the last."""
    model = open_model(folders("sdxl"))
    edit = Edit((steer("text_encoder_2.layer.1", 48),))
    folder = write(model, tmp_path / "it", edit)
    for state, verdict in ((0, "pass"), (1, "pass"), (2, "fail"), (3, "fail")):
        copy = Path(shutil.copytree(folder, tmp_path / str(state)))
        with opened(copy, "text_encoder_2") as graph:
            name = f"hidden_states.{state}"
            for it in graph.node:
                it.input[:] = ["in its place" if value == name else value for value in it.input]
                it.output[:] = ["in its place" if value == name else value for value in it.output]
            embedded = next(it for it in graph.node if it.op_type == "Gather" and "input_ids" in it.input)
            graph.node.append(helper.make_node("Identity", [embedded.output[0]], [name], name="around"))
        check = judge(model, copy, edit)
        assert (check.verdict, state) == (verdict, state)
        assert verdict == "pass" or f"has a way to {name} around" in check.summary


def test_constants_beside_the_graph_are_read_as_well(tiny, gated, tmp_path):
    folder = Path(shutil.copytree(gated, tmp_path / "it"))
    path = folder / "text_encoder" / "model.onnx"
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    edit = Edit((steer(SITE, 16),))
    assert judge(tiny, folder, edit).verdict == "pass"
    data = bytearray((path.parent / "model.onnx_data").read_bytes())
    strengths = values(3, seed=5).abs().numpy().tobytes()
    at = data.index(strengths)
    data[at] ^= 1
    (path.parent / "model.onnx_data").write_bytes(data)
    check = judge(tiny, folder, edit)
    assert check.verdict == "fail"
    assert "latents.0.strengths: 1 of 3 values are others" in check.summary
    (path.parent / "model.onnx_data").unlink()
    assert "where it is not" in judge(tiny, folder, edit).summary


def test_a_function_around_is_found(tiny, gated, tmp_path):
    """A node of which the graph does not say what it does."""
    folder = Path(shutil.copytree(gated, tmp_path / "it"))
    path = folder / "text_encoder" / "model.onnx"
    model = onnx.load(path)
    (last,) = (node for node in model.graph.node if node.name.endswith("/edited"))
    for node in model.graph.node:
        node.input[:] = ["another" if value == last.output[0] else value for value in node.input]
    opsets = [helper.make_opsetid("", model.opset_import[0].version), helper.make_opsetid("own", 1)]
    again = helper.make_node("Identity", ["it"], ["same"])
    model.functions.append(helper.make_function("own", "Same", ["it"], ["same"], [again], opsets[:1]))
    model.opset_import.append(opsets[1])
    place = [node.name for node in model.graph.node].index(last.name) + 1
    model.graph.node.insert(place, helper.make_node("Same", [last.output[0]], ["another"], name="own", domain="own"))
    onnx.save(model, path)
    assert "which may do anything" in judge(tiny, folder, Edit((steer(SITE, 16),))).summary


def test_without_its_graph_an_edit_is_nowhere(tiny, tmp_path):
    assert "has no model.onnx" in judge(tiny, tmp_path, Edit((steer(SITE, 16),))).summary


def test_what_weights_hold_is_not_asked_of_the_graphs(tiny):
    fixed = ShiftActivation(SITE, values(16))
    inside = ShiftActivation(f"{SITE}.ffn2", values(16))
    other = ShiftActivation("text_encoder.layer.0", values(16))
    latents = steer(SITE, 16)
    pruned = PatchWeightInput(f"{SITE}.ffn2", torch.ones(16, 32, dtype=torch.bool))
    unet = ShiftActivation("unet.mid.attn.0.block.0.ffn2", values(16, 16))
    conditional = replace(latents, rows="conditional")

    def kept(*operations: Any) -> list[Any]:
        found = kept_in_graphs(Edit(operations), tiny)
        assert found == [it for it in Edit(operations).operations if it in found]
        return found

    assert kept(fixed, inside, pruned, unet, conditional) == []
    # Latents read what a shift in a bias would change, unless they come after it.
    assert kept(fixed, inside, other, latents, pruned) == list(Edit((fixed, latents)).operations)
    assert kept(fixed, replace(latents, site=f"{SITE}.ffn2")) == list(
        Edit((fixed, replace(latents, site=f"{SITE}.ffn2"))).operations
    )
    assert len(kept(replace(fixed, rows="prompted"), replace(fixed, value=values(77, 16)))) == 2


def test_weights_beside_an_edit_in_the_graph_are_judged(tiny, tmp_path):
    """An edit that folds in part: weights must have that part, and only that."""
    ffn2 = next(it for it in tiny.sites_of("text_ffn2") if it.name == f"{SITE}.ffn2")
    pruning = PatchWeightInput(ffn2.name, values(ffn2.d_out, ffn2.d_in) > 1)
    latents = steer(SITE, 16)
    edit = Edit((pruning, latents, ShiftActivation(f"{SITE}.ffn2", values(16))))
    folder, names = write(tiny, tmp_path / "it", edit), names_of(tiny)
    names = {place: name for place, name in names.items() if place[0] == "text_encoder"}
    assert judge(tiny, folder, edit).verdict == "pass"

    def weights(edit: Edit, target: str = "onnx") -> Check:
        graphs = OnnxFolder(folder, tiny)
        elsewhere: Sequence[Any] = kept_in_graphs(edit, tiny) if target == "onnx" else ()
        return check_weights(target, tiny, edit, names, lambda place: graphs.read(names, place), (), elsewhere)

    check = weights(edit)
    assert check.verdict == "pass"
    assert "the rest of the edit is in the graphs" in check.summary
    assert weights(Edit((latents,))).verdict == "fail"
    with parameters(tiny) as read:
        unfolded = check_weights("onnx", tiny, edit, names, read, (), kept_in_graphs(edit, tiny))
    assert unfolded.verdict == "fail"
    # A diffusers folder cannot have latents, and nothing else judges them there.
    check = weights(edit, "diffusers")
    assert check.verdict == "unjudged"
    assert f"SteerLatents {SITE}" in check.summary
    conditional = steer(SITE, 16, "conditional", neurons=torch.tensor([5]))
    unjudged = weights(Edit((*edit.operations, conditional)))
    assert unjudged.verdict == "unjudged"


def test_an_edit_for_one_number_of_tokens_needs_a_graph_that_takes_no_other(tiny, gated, shifted, tmp_path):
    def faults(folder: Path, lengths: dict[str, int]) -> str:
        summary = OnnxFolder(folder, tiny).check_interface("onnx", lengths).summary
        return "; ".join(it for it in summary.removesuffix(".").split("; ") if "has no model.onnx" not in it)

    wanted = lengths_of(at_site(SITE, 16)["shifts of tokens"])
    assert wanted == {"text_encoder": 77}
    assert lengths_of([steer(SITE, 16), ShiftActivation(SITE, values(16), "prompted")]) == {}
    assert "the edit is for" not in faults(shifted, wanted)
    assert "takes one size only in dimension 1, 77" in faults(shifted, {})
    assert "input_ids has any size in dimension 1, where the edit is for 77 alone" in faults(gated, wanted)
    assert "has 77 in dimension 1, where the edit is for 76 alone" in faults(shifted, {"text_encoder": 76})
    for what, name in (("input", "input_ids"), ("output", "last_hidden_state")):
        copy = Path(shutil.copytree(shifted, tmp_path / what))
        with opened(copy) as graph:
            value = next(it for it in (*graph.input, *graph.output) if it.name == name)
            value.type.tensor_type.shape.dim[1].dim_param = "sequence_length"
        assert f"{name} has any size in dimension 1" in faults(copy, wanted)
    with opened(copy) as graph:
        graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    assert "takes one size only in dimension 0, 2" in faults(copy, wanted)


def test_the_first_hidden_state_that_all_of_an_edit_reaches():
    def pruning(layer: int) -> PatchWeightInput:
        return PatchWeightInput(f"text_encoder.layer.{layer}.ffn2", torch.ones(2, 3, dtype=torch.bool))

    def patch(layer: int) -> PatchActivation:
        return PatchActivation(f"text_encoder.layer.{layer}.ffn2", "input", torch.ones(3, dtype=torch.bool), values(3))

    def first(*operations: Any) -> dict[str, int]:
        return first_hidden_states(Edit(operations))

    assert first(steer(SITE, 16)) == {"text_encoder": 2}
    assert first(steer("text_encoder.layer.9", 16), steer("text_encoder_2.layer.26", 16)) == {
        "text_encoder": 10, "text_encoder_2": 27,
    }  # fmt: skip
    assert first(ShiftActivation("text_encoder.layer.3", values(2)), steer("text_encoder.layer.5", 16)) == {
        "text_encoder": 6
    }
    assert first(*(pruning(layer) for layer in (2, 0, 7))) == {"text_encoder": 1}
    assert first(pruning(2), pruning(7), patch(4), patch(3)) == {"text_encoder": 5}
    assert first(PatchWeightInput("unet.mid.attn.0.block.0.ffn2", torch.ones(2, 3, dtype=torch.bool))) == {}
