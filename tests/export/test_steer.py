"""Operations in a text encoder's graph: as modules in fp64 and as ONNX Runtime runs them, against hooks on the base."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from bakeout.editor.edit import Edit, Operation, PatchWeightInput, ShiftActivation, SteerLatents
from bakeout.editor.errors import InputError
from bakeout.editor.merge import merge
from bakeout.editor.model import Model, open_model
from bakeout.export import graphs
from bakeout.export.lower import lower_onto
from bakeout.export.onnx import size_of_onnx, write_onnx
from bakeout.export.steer import SiteEdit, edits_of, gate_of
from bakeout.validate.reference import applied

FAMILIES = ("sd1", "sd2", "sdxl")
LAYER = 1
S = f"text_encoder.layer.{LAYER}"
LATENTS = 48
END, EXCLAMATION = 49407, 0
# What the prompts' tokens after the first are where there is no prompt: the end mark, and what each model pads with.
BLANK = {"tiny": [513], "sd1": [END], "sd2": [EXCLAMATION, END], "sdxl": [END], "sdxl 2": [EXCLAMATION, END]}
TEXTS = ("a photo of a cat", "", "a <|endoftext|> cat", "<|endoftext|> cat", "   ", "!", "word " * 90)


def values(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def steer(site: str, width: int, seed: int = 0, **changes: Any) -> SteerLatents:
    given = {
        "encoder": values(LATENTS, width, seed=seed), "encoder_bias": values(LATENTS, seed=seed + 1),
        "center": values(width, seed=seed + 2) / 9, "k": 5, "neurons": torch.tensor([0, 3, 17, 30, 47]),
        "directions": values(width, 5, seed=seed + 3), "strengths": values(5, seed=seed + 4),
    }  # fmt: skip
    return SteerLatents(site, **{**given, **changes})


def with_ties(site: str, width: int) -> SteerLatents:
    """Half of the latents are equal at every token, and only some of them are among the largest."""
    encoder, bias = values(LATENTS, width, seed=70), values(LATENTS, seed=71) - 1
    tied = torch.arange(1, LATENTS, 2)
    encoder[tied], bias[tied] = 0, 0.75
    neurons = torch.tensor([2, 3, 19, 21, 45])
    return steer(site, width, 60, encoder=encoder, encoder_bias=bias, k=14, neurons=neurons)


def every_neuron(site: str, width: int, k: int) -> SteerLatents:
    """All latents are positive and taken out, so that the smallest one is seen."""
    directions, strengths = values(width, LATENTS, seed=50), values(LATENTS, seed=51)
    return steer(
        site, width, encoder_bias=torch.full((LATENTS,), 50.0), k=k, neurons=torch.arange(LATENTS),
        directions=directions, strengths=strengths,
    )  # fmt: skip


def shift(site: str, *shape: int, seed: int, rows: Any = "all") -> ShiftActivation:
    return ShiftActivation(site, values(*shape, seed=seed), rows)


# Name → the operations at a layer S of a width d.
CASES: Mapping[str, Callable[[str, int], list[Operation]]] = {
    "[d]": lambda s, d: [shift(s, d, seed=1)],
    "[d], prompted": lambda s, d: [shift(s, d, seed=1, rows="prompted")],
    "[T, d]": lambda s, d: [shift(s, 77, d, seed=1)],
    "[T, d], prompted": lambda s, d: [shift(s, 77, d, seed=1, rows="prompted")],
    "shifts": lambda s, d: [
        *(shift(s, 77, d, seed=seed) for seed in (1, 2, 3)), shift(s, d, seed=4),
        *(shift(s, 77, d, seed=seed, rows="prompted") for seed in (5, 6)),
    ],
    "latents": lambda s, d: [steer(s, d)],
    "latents, prompted": lambda s, d: [steer(s, d, rows="prompted")],
    "one neuron": lambda s, d: [
        steer(s, d, k=20, neurons=torch.tensor([17]), directions=values(d, 1, seed=9), strengths=values(1, seed=8))
    ],
    "k 1": lambda s, d: [steer(s, d, k=1)],
    "k m - 1": lambda s, d: [every_neuron(s, d, LATENTS - 1)],
    "k m": lambda s, d: [every_neuron(s, d, LATENTS)],
    "layer_norm": lambda s, d: [steer(s, d, input_norm="layer_norm")],
    "constant_norm": lambda s, d: [steer(s, d, input_norm="constant_norm", k=20)],
    "ties": lambda s, d: [with_ties(s, d)],
    "two autoencoders": lambda s, d: [steer(s, d), steer(s, d, 10, k=9, rows="prompted"), steer(s, d, 20, k=LATENTS)],
    "everything": lambda s, d: [
        steer(s, d), steer(s, d, 10, rows="prompted", input_norm="layer_norm"), shift(s, 77, d, seed=1),
        shift(s, d, seed=2, rows="prompted"), shift(f"{s}.ffn2", d, seed=3, rows="prompted"), steer(f"{s}.ffn2", d, 30),
    ],
}  # fmt: skip
# What the same comparison must reject: the case → another Edit.
CONTROLS: Mapping[str, Callable[[str, int], list[Operation]]] = {
    "[d], prompted": CASES["[d]"],
    "[T, d]": lambda s, d: [ShiftActivation(s, values(77, d, seed=1).roll(1, 0))],
    "[T, d], prompted": CASES["[T, d]"],
    "shifts": lambda s, d: CASES["shifts"](s, d)[1:],
    "latents": lambda s, d: [steer(s, d, k=6)],
    "latents, prompted": CASES["latents"],
    "one neuron": lambda s, d: [replace(CASES["one neuron"](s, d)[0], neurons=torch.tensor([18]))],
    "k 1": lambda s, d: [steer(s, d, k=2)],
    "k m - 1": CASES["k m"],
    "k m": CASES["k m - 1"],
    "layer_norm": CASES["latents"],
    "constant_norm": lambda s, d: [steer(s, d, k=20)],
    "ties": lambda s, d: [mirrored(with_ties(s, d))],
    "two autoencoders": lambda s, d: CASES["two autoencoders"](s, d)[:2],
    "everything": lambda s, d: CASES["everything"](s, d)[:-1],
}


def mirrored(latents: SteerLatents) -> SteerLatents:
    """The same, but for ties: of equal latents those of the higher index count as the larger."""
    return replace(
        latents, encoder=latents.encoder.flip(0), encoder_bias=latents.encoder_bias.flip(0),
        neurons=LATENTS - 1 - latents.neurons.flip(0), directions=latents.directions.flip(1),
        strengths=latents.strengths.flip(0),
    )  # fmt: skip


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def encoders_of(model: Model) -> list[str]:
    return [name for name in model.components if name.startswith("text_encoder")]


def edit_of(model: Model, case: Callable[[str, int], list[Operation]]) -> Edit:
    """The case at one layer of every text encoder."""
    sites = [model.site(f"{name}.layer.{LAYER}") for name in encoders_of(model)]
    return Edit(tuple(it for site in sites for it in case(site.name, site.d_out)))


@pytest.fixture(scope="module")
def model_of(folders: Callable[[str], Path], tiny_model: Path) -> Callable[[str], Model]:
    return cache(lambda family: open_model(tiny_model if family == "tiny" else folders(family)))


@pytest.fixture(scope="module")
def pipeline_of(model_of: Callable[[str], Model]) -> Callable[[str, torch.dtype], Any]:
    return cache(lambda family, dtype: model_of(family).pipeline(dtype=dtype))


def tokens(pipeline: Any, encoder: str, texts: Iterable[str]) -> Tensor:
    tokenizer = getattr(pipeline, encoder.replace("text_encoder", "tokenizer"))
    ids: Tensor = tokenizer([*texts], padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ids.shape[1] == 77
    return ids


@torch.no_grad()
def hooked(edit: Edit, model: Model, pipeline: Any, encoder: str, texts: Iterable[str] = TEXTS) -> dict[str, Tensor]:
    """What the reference gives, under the names of the graph's outputs."""
    with applied(edit, model, pipeline):
        output = getattr(pipeline, encoder)(tokens(pipeline, encoder, texts), output_hidden_states=True)
    states = {f"hidden_states.{number}": state for number, state in enumerate(output.hidden_states)}
    named = ("text_embeds", "last_hidden_state", "pooler_output")
    return {**{name: output[name] for name in named if name in output}, **states}


@torch.no_grad()
def modules_of(edit: Edit, model: Model, pipeline: Any, encoder: str, gate: Any) -> dict[str, Tensor]:
    """What the modules to be traced give, in fp64."""
    by_site: dict[str, list[Any]] = defaultdict(list)
    for it in merge([edit]).operations:
        by_site[it.site].append(it)
    blank = torch.tensor(BLANK[f"{model.family}{' 2' * encoder.endswith('2')}"])
    edits = [
        SiteEdit(model.site(site), operations, blank, torch.float64, gate)
        for site, operations in by_site.items() if model.site(site).component == encoder
    ]  # fmt: skip
    module = graphs._TextEncoder(getattr(pipeline, encoder), ("last_hidden_state",), edits, hidden_states=True)
    last, *states = module(tokens(pipeline, encoder, TEXTS))
    return {"last_hidden_state": last, **{f"hidden_states.{number}": state for number, state in enumerate(states)}}


def farthest(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The one comparison of this file, which the negative controls go through as well."""
    return max(relative_error(tensor, expected[name]) for name, tensor in found.items())


# But for ties by TopK: PyTorch's takes any of equal values. ONNX's, which is what runs, is tried below.
@pytest.mark.parametrize(("case", "gate"), sorted({*product(CASES, ("rank", "topk"))} - {("ties", "topk")}))
def test_the_modules_are_the_hooks_in_fp64(case, gate, model_of, pipeline_of):
    model, pipeline = model_of("sd2"), pipeline_of("sd2", torch.float64)
    edit = edit_of(model, CASES[case])
    expected = hooked(edit, model, pipeline, "text_encoder")
    assert farthest(modules_of(edit, model, pipeline, "text_encoder", gate), expected) <= 1e-13
    for control in (Edit(()), *([edit_of(model, CONTROLS[case])] if case in CONTROLS else [])):
        assert farthest(modules_of(control, model, pipeline, "text_encoder", gate), expected) > 1e-4


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, model_of: Callable[[str], Model]) -> Callable[..., Path]:
    """The ONNX folder of a family's text encoders with a case at a layer of each; written once."""
    root = tmp_path_factory.mktemp("graphs")

    def write(family: str, case: str | None, gate: Any = None) -> Path:
        model = model_of(family)
        folder = root / f"{family}-{list(CASES).index(case) if case else 'base'}-{gate}"
        if not folder.exists():
            edit = edit_of(model, CASES[case]) if case else None
            write_onnx(only_text(model), folder, remaining=edit, gate=gate)
        return folder

    return write


def only_text(model: Model) -> Model:
    """The model without its large networks, which no operation of these tests is on."""
    return replace(model, components={name: model.components[name] for name in encoders_of(model)})


@cache
def session(folder: Path, encoder: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(folder / encoder / "model.onnx", providers=["CPUExecutionProvider"])


def run(folder: Path, encoder: str, ids: Tensor) -> dict[str, Tensor]:
    names = [it.name for it in session(folder, encoder).get_outputs()]
    found = session(folder, encoder).run(None, {"input_ids": ids.numpy()})
    return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}


def graph_of(folder: Path, encoder: str = "text_encoder") -> Any:
    return onnx.load(folder / encoder / "model.onnx").graph


RUNS = [
    *(("tiny", case, None) for case in ("[T, d], prompted", "[d], prompted", "shifts")),
    *(("tiny", case, None) for case in ("one neuron", "two autoencoders", "k m")),
    *(("tiny", case, gate) for case in ("ties", "constant_norm") for gate in ("rank", "topk")),
    ("sd2", "everything", "topk"), ("sd2", "latents, prompted", "rank"),
    ("sdxl", "everything", None),
]  # fmt: skip


@pytest.mark.parametrize(("family", "case", "gate"), RUNS)
def test_onnx_runtime_computes_what_hooks_on_the_base_do(family, case, gate, model_of, pipeline_of, written):
    model, pipeline, folder = model_of(family), pipeline_of(family, torch.float32), written(family, case, gate)
    edit = edit_of(model, CASES[case])
    for encoder in encoders_of(model):
        whole = hooked(edit, model, pipeline, encoder)
        found = run(folder, encoder, tokens(pipeline, encoder, TEXTS))
        assert farthest(found, whole) <= 1e-5
        for control in (Edit(()), *([edit_of(model, CONTROLS[case])] if case in CONTROLS else [])):
            assert farthest(found, hooked(control, model, pipeline, encoder)) > 1e-4
        for number, text in enumerate(TEXTS):
            alone = run(folder, encoder, tokens(pipeline, encoder, [text]))
            assert farthest(alone, {name: tensor[number : number + 1] for name, tensor in whole.items()}) <= 1e-5


@pytest.mark.parametrize(("family", "case"), [("tiny", "[T, d], prompted"), ("sd2", "latents, prompted")])
def test_empty_prompts_stay_what_they_were_to_the_last_bit(family, case, model_of, pipeline_of, written):
    ids = tokens(pipeline_of(family, torch.float32), "text_encoder", TEXTS)
    base, edited = (
        run(written(family, it, gate), "text_encoder", ids)
        for it, gate in ((None, None), (case, "rank" if family == "sd2" else None))
    )
    # In SD 2.x an exclamation mark is also what pads.
    empty = [text == "" or text.isspace() or (text == "!" and family == "sd2") for text in TEXTS]
    for name, tensor in base.items():
        same = [torch.equal(before, after) for before, after in zip(tensor, edited[name], strict=True)]
        assert same == empty, name


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_the_layers_up_to_the_edit_reaches_an_output_past_it(family, model_of, written):
    for encoder in encoders_of(model_of(family)):
        graph = graph_of(written(family, "everything", "topk" if family == "sd2" else None), encoder)
        site = f"{encoder}.layer.{LAYER}"
        later = re.compile(
            rf"encoder\.layers\.(?!(?:{'|'.join(map(str, range(LAYER + 1)))})\.)|final_layer_norm|projection"
        )
        weights = [it.name for it in graph.initializer if "." in it.name and not it.name.startswith("bakeout.")]
        below = {name for name in weights if not later.search(name)}
        assert len(below) == 2 + (LAYER + 1) * 16
        outputs = {it.name for it in graph.output}
        bypasses = {f"hidden_states.{state}" for state in range(LAYER + 1)} & outputs
        assert bool(bypasses) == (family == "sdxl")
        assert reached(graph, below, without=f"bakeout/{site}/edited") & outputs == bypasses
        # With the edit's last node they are all reached, and without an earlier node of the edit still.
        assert reached(graph, below, without="none") & outputs == outputs
        (first, *_) = (node.name for node in graph.node if node.name.startswith(f"bakeout/{site}/"))
        assert reached(graph, below, without=first) & outputs == outputs


def reached(graph: Any, sources: Iterable[str], without: str) -> set[str]:
    """The values that depend on some others when a node is not there."""
    found = set(sources)
    for node in graph.node:
        if node.name != without and found & set(node.input):
            found |= set(node.output)
    return found


def test_constants_have_their_names_and_are_those_of_the_edit(model_of, written):
    model = model_of("sd2")
    edit = merge([edit_of(model, CASES["everything"])])
    graph = graph_of(written("sd2", "everything", "topk"))
    found = {it.name: numpy_helper.to_array(it) for it in graph.initializer if it.name.startswith("bakeout.")}
    expected: dict[str, Tensor] = {}
    for site in ("text_encoder.layer.1.ffn2", "text_encoder.layer.1"):
        own = [it for it in edit.operations if it.site == site]
        expected[f"bakeout.{site}.blank"] = torch.tensor(BLANK["sd2"])
        for it in own:
            if isinstance(it, ShiftActivation):
                expected[f"bakeout.{site}.shift.{it.rows}"] = it.value.float()
        for number, it in enumerate(it for it in own if isinstance(it, SteerLatents)):
            for name in ("encoder", "encoder_bias", "center", "directions", "strengths", "neurons"):
                value = getattr(it, name)
                expected[f"bakeout.{site}.latents.{number}.{name}"] = value.float() if name != "neurons" else value
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.numpy().dtype
        assert np.array_equal(found[name], tensor.numpy()), name
    uses = [name for node in graph.node for name in node.input]
    assert {name: uses.count(name) for name in found} == {name: 1 + name.endswith("neurons") for name in found}
    # An input of the same name would override it.
    assert not {it.name for it in graph.input} & found.keys()


def test_shifts_of_one_site_and_rows_are_one_constant_rounded_once(written):
    graph = graph_of(written("tiny", "shifts"))
    shifts = [it for it in CASES["shifts"](S, 16) if isinstance(it, ShiftActivation)]
    found = {it.name: numpy_helper.to_array(it) for it in graph.initializer if it.name.startswith("bakeout.")}
    for rows in ("all", "prompted"):
        own = [it.value.expand(77, -1).numpy() for it in shifts if it.rows == rows]
        # In extended precision, so that no order of the sum matters.
        exact = sum(it.astype(np.longdouble) for it in own).astype(np.float32)
        assert np.array_equal(found[f"bakeout.{S}.shift.{rows}"], exact)
        # The control: rounded each, the sum is another.
        assert not np.array_equal(sum(it.astype(np.float32) for it in own), exact)
    adds = [node for node in graph.node if node.name.startswith(f"bakeout/{S}/") and node.op_type == "Add"]
    assert len(adds) == 2


def test_a_constant_is_one_node_more(written):
    plain, vector, matrix = (graph_of(written("tiny", case)).node for case in (None, "[d]", "[T, d]"))
    assert len(vector) == len(plain) + 1
    for nodes in (vector, matrix):
        (added,) = (node for node in nodes if node.name.startswith("bakeout/"))
        assert (added.op_type, added.name) == ("Add", f"bakeout/{S}/edited")


@pytest.mark.parametrize("case", ["[T, d]", "[d]", "latents"])
def test_a_constant_for_each_token_makes_the_length_static_and_no_other_does(case, written):
    folder = written("tiny", case)
    ours = session(folder, "text_encoder")
    tokens = 77 if case == "[T, d]" else "sequence_length"
    assert [it.shape for it in ours.get_inputs()] == [["batch_size", tokens]]
    assert [it.shape for it in ours.get_outputs()] == [["batch_size", tokens, 16], ["batch_size", 16]]
    shorter = np.full((3, 9), 7)
    if tokens == 77:
        with pytest.raises(Exception, match="Got invalid dimensions"):
            ours.run(None, {"input_ids": shorter})
    else:
        assert ours.run(None, {"input_ids": shorter})[0].shape == (3, 9, 16)


def test_an_encoder_without_an_edit_is_the_same_to_the_byte(model_of, written, tmp_path):
    model = only_text(model_of("sdxl"))
    first = replace(model, components={"text_encoder": model.components["text_encoder"]})
    second = [it for it in edit_of(model, CASES["everything"]).operations if it.site.startswith("text_encoder_2")]
    write_onnx(first, tmp_path / "made", remaining=Edit(()))
    write_onnx(model, tmp_path / "edited", remaining=Edit(tuple(second)))
    name = "text_encoder/model.onnx"
    assert (tmp_path / "made" / name).read_bytes() == (tmp_path / "edited" / name).read_bytes()
    assert (tmp_path / "made" / name).read_bytes() != (written("sdxl", "everything") / name).read_bytes()


def test_the_same_edit_gives_the_same_bytes(model_of, written, tmp_path):
    model = only_text(model_of("tiny"))
    write_onnx(model, tmp_path / "again", remaining=edit_of(model, CASES["two autoencoders"]))
    write_onnx(model, tmp_path / "none", remaining=Edit(()))
    for made, before in (("again", "two autoencoders"), ("none", None)):
        name = "text_encoder/model.onnx"
        assert (tmp_path / made / name).read_bytes() == (written("tiny", before) / name).read_bytes()


def test_what_folds_and_what_stays_in_the_graph_are_together_the_edit(model_of, pipeline_of, tmp_path):
    model, pipeline = model_of("tiny"), pipeline_of("tiny", torch.float32)
    pruned = torch.rand(16, 32, generator=torch.Generator().manual_seed(0)) < 0.5
    edit = Edit((
        PatchWeightInput(f"{S}.ffn2", pruned), shift("text_encoder.layer.0", 16, seed=5), steer(S, 16),
        shift(S, 77, 16, seed=1, rows="prompted"),
    ))  # fmt: skip
    lowered = lower_onto(edit, model)
    assert [it.how for it in lowered.realisations].count("folded") == 2
    write_onnx(only_text(model), tmp_path / "both", changed=lowered.state, remaining=lowered.remaining)
    write_onnx(only_text(model), tmp_path / "dropped", remaining=lowered.remaining)
    expected = hooked(edit, model, pipeline, "text_encoder")
    ids = tokens(pipeline, "text_encoder", TEXTS)
    assert farthest(run(tmp_path / "both", "text_encoder", ids), expected) <= 1e-5
    assert farthest(run(tmp_path / "dropped", "text_encoder", ids), expected) > 1e-2


def test_one_vector_that_folds_leaves_the_graph_as_it_was(model_of, pipeline_of, written, tmp_path):
    """The same nodes and shapes, and a bias of other values: it costs nothing."""
    model, pipeline = model_of("tiny"), pipeline_of("tiny", torch.float32)
    edit = edit_of(model, CASES["[d]"])
    lowered = lower_onto(edit, model)
    assert not lowered.remaining.operations
    write_onnx(only_text(model), tmp_path / "folded", changed=lowered.state, remaining=lowered.remaining)
    plain, folded = graph_of(written("tiny", None)), graph_of(tmp_path / "folded")
    assert plain.node == folded.node
    assert [(it.name, it.dims) for it in plain.initializer] == [(it.name, it.dims) for it in folded.initializer]
    changed = [one.name for one, other in zip(plain.initializer, folded.initializer, strict=True) if one != other]
    assert changed == [model.site(f"{S}.ffn2").bias]
    ids = tokens(pipeline, "text_encoder", TEXTS)
    assert (
        farthest(run(tmp_path / "folded", "text_encoder", ids), hooked(edit, model, pipeline, "text_encoder")) <= 1e-5
    )


def test_the_size_counts_the_constants(model_of, written):
    model = only_text(model_of("tiny"))
    more = size_of_onnx(model, edit_of(model, CASES["[T, d]"])) - size_of_onnx(model)
    assert more == 77 * 16 * 4
    after, before = ((written("tiny", it) / "text_encoder" / "model.onnx").stat().st_size for it in ("[T, d]", None))
    assert more < after - before < more + 10_000


@pytest.mark.parametrize(("count", "gate"), [(1, "rank"), (2, "topk"), (5, "topk")])
def test_the_rank_test_is_for_one_neuron(count, gate):
    latents = steer("text_encoder.layer.1", 32, neurons=torch.arange(count), directions=values(32, count, seed=0),
                    strengths=values(count, seed=1))  # fmt: skip
    assert gate_of(latents) == gate


def test_a_gate_can_be_asked_for(written):
    for gate, sign in (("rank", "Greater"), ("topk", "TopK")):
        nodes = graph_of(written("tiny", "ties", gate)).node
        assert [it for it in ("Greater", "TopK") if it in {node.op_type for node in nodes}] == [sign]


FFN2 = "unet.down.0.attn.0.block.0.ffn2"
REFUSED = {
    "conditional": ([steer(S, 16, rows="conditional")], r"1 leaves negative prompts untouched.*off-switch; take"),
    "a weight": (
        [PatchWeightInput(f"{S}.ffn2", torch.ones(16, 32, dtype=torch.bool))],
        r"PatchWeightInput at text_encoder\.layer\.1\.ffn2 does not fold .* no graph can hold it yet; leave",
    ),
    "the UNet's latents": ([steer(FFN2, 16)], r"SteerLatents at unet.* no graph can hold it yet"),
    "two lengths": (
        [shift(S, 77, 16, seed=0), shift(f"{S}.ffn2", 76, 16, seed=0)], r"is for 76 and for 77 tokens; calibrate all",
    ),
    "two lengths at one site": ([shift(S, 77, 16, seed=0), shift(S, 76, 16, seed=0)], r"is for 76 and for 77 tokens"),
    "a length that the model lacks": ([shift(S, 78, 16, seed=0)], r"for 78 tokens where the model has 77; use"),
    "another width": ([shift(S, 77, 17, seed=0)], r"width 17 where the model has 16; use"),
    "another site": ([shift("text_encoder.layer.9", 16, seed=0)], r"has no site 'text_encoder.layer.9'"),
    "a value beyond fp32": ([ShiftActivation(S, torch.tensor([1e300] * 16, dtype=torch.float64))], "beyond what torch"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_graph_can_hold_is_refused_in_a_sentence(case, model_of, tmp_path):
    operations, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as caught:
        write_onnx(model_of("tiny"), tmp_path / "made", remaining=Edit(tuple(operations)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_of_an_empty_prompt_are_those_of_the_tokenizer(family, model_of):
    made = edits_of(edit_of(model_of(family), CASES["[d], prompted"]), model_of(family))
    found = {encoder: [it.blank.tolist() for it in edits] for encoder, edits in made.items()}
    expected = {"text_encoder": [BLANK[family]], **({"text_encoder_2": [BLANK["sdxl 2"]]} if family == "sdxl" else {})}
    assert found == expected
