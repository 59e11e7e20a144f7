"""Folding is hooking: by properties in fp64 on a tiny model, with controls that the same comparison must reject."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from bakeout.editor.edit import Edit, Origin, PatchActivation, PatchWeightInput, ShiftActivation, SteerLatents
from bakeout.editor.errors import InputError
from bakeout.editor.merge import merge
from bakeout.editor.model import Model, open_model
from bakeout.export.lower import Lowered, lower, lower_onto, touched_tensors
from bakeout.validate.reference import applied

LAYER = "text_encoder.layer.0"
TEXT_FFN2 = f"{LAYER}.ffn2"
# Not attn_key: what all keys share, softmax takes out again.
FFN1, FFN2, VALUE = (f"unet.down.0.attn.0.block.0.{kind}" for kind in ("ffn1", "ffn2", "attn_value"))
TOKENS = {TEXT_FFN2: 77, LAYER: 77, FFN1: 16, FFN2: 16, VALUE: 77}
properties = settings(derandomize=True, deadline=None, max_examples=150)


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm())


def agree(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """The one comparison of this file, which the negative controls go through as well. NaN agrees with nothing."""
    return all(relative_error(actual[name], expected[name]) <= 1e-12 for name in expected)


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Model:
    return open_model(tiny_model)


@pytest.fixture(scope="module")
def sites(model: Model) -> dict[str, Any]:
    return {site.name: site for site in model.sites}


@pytest.fixture(scope="module")
def pipeline(model: Model) -> Any:
    """In fp64, and with biases that are not zero: a fresh network's are."""
    made = model.pipeline(dtype=torch.float64)
    for number, parameter in enumerate([*made.unet.parameters(), *made.text_encoder.parameters()]):
        if parameter.ndim == 1:
            parameter.data += 0.1 * values(*parameter.shape, seed=number)
    return made


def stored_state(model: Model, pipeline: Any) -> dict[str, dict[str, torch.Tensor]]:
    """What lies on disk, in the pipeline's values; the pipeline's own tensors, so that a change would be seen."""
    return {
        name: {
            component.locations[key].tensor: tensor for key, tensor in getattr(pipeline, name).state_dict().items()
        }
        for name, component in model.components.items()
    }  # fmt: skip


@pytest.fixture(scope="module")
def state(model: Model, pipeline: Any) -> dict[str, dict[str, torch.Tensor]]:
    return stored_state(model, pipeline)


@contextmanager
def loaded(pipeline: Any, model: Model, changed: dict[str, dict[str, torch.Tensor]]) -> Iterator[None]:
    """The pipeline with tensors of a lowered Edit in place of its own."""
    restore = []
    for name, tensors in changed.items():
        names = {location.tensor: key for key, location in model.components[name].locations.items()}
        for stored, tensor in tensors.items():
            parameter = getattr(pipeline, name).get_parameter(names[stored])
            restore.append((parameter, parameter.data))
            parameter.data = tensor
    try:
        yield
    finally:
        for parameter, data in restore:
            parameter.data = data


def run(pipeline: Any) -> dict[str, torch.Tensor]:
    """A text encoder call, an empty prompt among its rows, and a UNet call that does not depend on it."""
    dtype = pipeline.unet.dtype
    tokens = pipeline.tokenizer(["", "a dog"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        text = pipeline.text_encoder(tokens, output_hidden_states=True)
        noise = pipeline.unet(values(2, 4, 4, 4).to(dtype), 7, values(2, 77, 16).to(dtype)).sample
    return {"text": text[0], "layer": text.hidden_states[1], "noise": noise}


def hooked(edit: Edit, model: Model, pipeline: Any) -> dict[str, torch.Tensor]:
    with applied(edit, model, pipeline):
        return run(pipeline)


def folded(lowered: Lowered, model: Model, pipeline: Any) -> dict[str, torch.Tensor]:
    with loaded(pipeline, model, lowered.state), applied(lowered.remaining, model, pipeline):
        return run(pipeline)


def steer(site: str, width: int, seed: int, rows: Any = "all") -> SteerLatents:
    return SteerLatents(
        site, values(12, width, seed=seed), values(12, seed=seed + 1), values(width, seed=seed + 2), 5,
        torch.tensor([0, 3, 7]), values(width, 3, seed=seed + 3), values(3, seed=seed + 4), rows,
    )  # fmt: skip


SHAPES = {FFN1: (128, 16), FFN2: (16, 64), VALUE: (16, 16), TEXT_FFN2: (16, 32), LAYER: (16, 16)}


@st.composite
def operations(draw: st.DrawFn, site: str, exact: bool) -> Any:
    """Any operation at a site; with `exact`, one of those that fold at a Linear with a bias."""
    d_out, d_in = SHAPES[site]
    seed = draw(st.integers(0, 10**6))
    kinds = ["shift"] if site == LAYER else ["shift", "prune", "weights", "input", "output"]
    kind = draw(st.sampled_from(kinds if exact else [*kinds, "latents"]))
    tokens = () if exact or draw(st.booleans()) else (TOKENS[site],)
    rows = "prompted" if not exact and site in (LAYER, TEXT_FFN2) and draw(st.booleans()) else "all"
    # A value of zero needs no bias, and one with zeros may commute with a patch.
    sparse = draw(st.sampled_from([0.0, 0.5, 1.0]))

    def some(*shape: int) -> torch.Tensor:
        kept = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < sparse
        return values(*shape, seed=seed + 1) * kept

    if kind == "shift":
        return ShiftActivation(site, some(*tokens, d_out), rows)
    if kind == "prune":
        return PatchWeightInput(site, mask(d_out, d_in, seed=seed))
    if kind == "weights":
        return PatchWeightInput(site, mask(d_out, d_in, seed=seed), some(d_in))
    if kind == "latents":
        return steer(site, d_out, seed, rows)
    width = d_in if kind == "input" else d_out
    return PatchActivation(site, kind, mask(*tokens, width, seed=seed), some(*tokens, width))


def merged(given: list[Any]) -> Edit | None:
    try:
        return merge(Edit((it,)) for it in given)
    except InputError:  # patches of features and of tokens at one site
        return None


@st.composite
def edits(draw: st.DrawFn, exact: bool) -> Edit:
    places = [FFN1, FFN2, TEXT_FFN2, LAYER] if exact else [FFN2, VALUE, TEXT_FFN2, LAYER]
    at_any = st.sampled_from(places).flatmap(lambda site: operations(site, exact))
    return draw(st.lists(at_any, min_size=1, max_size=8).map(merged).filter(lambda it: it is not None))


@given(edit=edits(exact=True))
@properties
def test_folding_any_weight_operations_is_hooking_them(model, sites, pipeline, state, edit):
    lowered = lower(edit, sites, state)
    assert not lowered.remaining.operations
    assert {it.how for it in lowered.realisations} == {"folded"}
    assert agree(folded(lowered, model, pipeline), hooked(edit, model, pipeline))


@given(edit=edits(exact=False))
@properties
def test_what_folds_and_what_remains_are_together_the_edit(model, sites, pipeline, state, edit):
    lowered = lower(edit, sites, state)
    assert len(lowered.realisations) == len(edit.operations)
    assert [it.how for it in lowered.realisations].count("graph") == len(lowered.remaining.operations)
    assert agree(folded(lowered, model, pipeline), hooked(edit, model, pipeline))
    again = lower(lowered.remaining, sites, state)
    assert not again.state
    assert again.remaining == lowered.remaining


@given(edit=edits(exact=False))
@properties
def test_nothing_but_what_it_says_is_read_and_no_input_changes(model, sites, state, edit):
    touched = touched_tensors(edit, sites)
    only = {component: {name: state[component][name] for name in names} for component, names in touched.items()}
    before = {component: {name: it.clone() for name, it in tensors.items()} for component, tensors in only.items()}
    digest = edit.digest
    lowered = lower(edit, sites, only)
    for component, tensors in before.items():
        for name, tensor in tensors.items():
            assert same_bits(tensor, only[component][name])
    assert Edit(tuple(replace(it) for it in edit.operations)).digest == digest
    for component, tensors in lowered.state.items():
        for name, tensor in tensors.items():
            assert not same_bits(tensor, before[component][name])
            assert (tensor.dtype, tensor.shape) == (before[component][name].dtype, before[component][name].shape)
    for component, names in touched.items():
        for name in names:
            with pytest.raises(InputError, match="has no tensor"):
                lower(edit, sites, {**only, component: {k: v for k, v in only[component].items() if k != name}})


@given(given_edits=st.lists(edits(exact=True), min_size=2, max_size=4), data=st.data())
@settings(properties, max_examples=40)
def test_the_order_of_edits_changes_no_bit(model, sites, pipeline, state, given_edits, data):
    reordered = data.draw(st.permutations(given_edits))
    one, other = merge(given_edits), merge(reordered)
    assert one == other
    first, second = lower(one, sites, state), lower(other, sites, state)
    assert first.realisations == second.realisations
    assert {c: t.keys() for c, t in first.state.items()} == {c: t.keys() for c, t in second.state.items()}
    assert all(
        same_bits(it, second.state[c][name]) for c, tensors in first.state.items() for name, it in tensors.items()
    )
    assert agree(folded(first, model, pipeline), hooked(one, model, pipeline))


# One of every sort at one place, so that each part of the comparison has something to find.
EDIT = Edit((
    PatchWeightInput(FFN2, mask(16, 64)),
    PatchWeightInput(FFN2, mask(16, 64, seed=1), values(64)),
    PatchActivation(FFN2, "input", mask(64, seed=2), values(64, seed=2)),
    PatchActivation(FFN2, "output", mask(16, seed=3), values(16, seed=3)),
    ShiftActivation(FFN2, values(16, seed=4)),
    ShiftActivation(LAYER, values(16, seed=5)),
), (Origin("conceptprune", "dog"),))  # fmt: skip


def without(kind: type, at: str | None = None) -> Edit:
    return Edit(tuple(it for it in EDIT.operations if type(it) is not kind or getattr(it, "at", None) != at))


def with_a_flipped_bit() -> Edit:
    pruning = next(it for it in EDIT.operations if isinstance(it, PatchWeightInput) and it.value is None)
    patch = next(it for it in EDIT.operations if isinstance(it, PatchActivation) and it.at == "output")
    flipped = pruning.mask.clone()
    # In a row whose output is not constant.
    flipped[int((~patch.mask).nonzero()[0]), 3] ^= True
    return Edit(tuple(replace(it, mask=flipped) if it is pruning else it for it in EDIT.operations))


CONTROLS = {
    "the edit dropped": Edit(()),
    "a bit flipped": with_a_flipped_bit(),
    "weights left out": without(PatchWeightInput),
    "the input's patch left out": without(PatchActivation, "input"),
    "the output's patch left out": without(PatchActivation, "output"),
    "shifts left out": without(ShiftActivation),
    "a shift at the next layer": Edit((
        *EDIT.operations[1:], ShiftActivation("text_encoder.layer.1", values(16, seed=5))
    )),
}  # fmt: skip


@pytest.mark.parametrize("what", CONTROLS)
def test_the_comparison_rejects_another_edit(model, sites, pipeline, state, what):
    expected = hooked(EDIT, model, pipeline)
    assert agree(folded(lower(EDIT, sites, state), model, pipeline), expected)
    assert not agree(folded(lower(CONTROLS[what], sites, state), model, pipeline), expected)


def test_the_comparison_rejects_an_fp32_fold(model, sites, pipeline, state):
    lowered = lower(EDIT, sites, state)
    name = str(sites[FFN2].bias)
    lowered.state["unet"][name] = lowered.state["unet"][name].float().double()
    assert not agree(folded(lowered, model, pipeline), hooked(EDIT, model, pipeline))


def test_the_comparison_rejects_nan(model, sites, pipeline, state):
    expected = hooked(EDIT, model, pipeline)
    lowered = lower(EDIT, sites, state)
    lowered.state["unet"][str(sites[FFN2].bias)][0] = torch.nan
    assert not agree(folded(lowered, model, pipeline), expected)
    assert not agree(expected, {name: torch.full_like(it, torch.nan) for name, it in expected.items()})


def test_the_comparison_rejects_constants_through_the_unedited_weight(model, sites, pipeline, state):
    """Patches and prunings in the other order: another function, and close enough to be taken for the same."""
    lowered = lower(EDIT, sites, state)
    weight, bias = state["unet"][str(sites[FFN2].weight)], str(sites[FFN2].bias)
    pruning, seen = (
        next(it for it in EDIT.operations if isinstance(it, PatchWeightInput) and (it.value is None) == bare)
        for bare in (True, False)
    )
    rows = ~next(it for it in EDIT.operations if isinstance(it, PatchActivation) and it.at == "output").mask
    lowered.state["unet"][bias][rows] += ((weight * pruning.mask * seen.mask) @ seen.value)[rows]
    assert not agree(folded(lowered, model, pipeline), hooked(EDIT, model, pipeline))


# The rules of combination, derived again in Python's arithmetic, element by element.


def naive_fold(weight: Any, bias: Any, given: tuple[Any, ...]) -> tuple[list[list[float]], list[float]]:
    d_out, d_in = weight.shape
    new_weight, new_bias = weight.tolist(), bias.tolist()
    of = {
        "prune": [it for it in given if isinstance(it, PatchWeightInput) and it.value is None],
        "seen": [it for it in given if isinstance(it, PatchWeightInput) and it.value is not None],
        "input": [it for it in given if isinstance(it, PatchActivation) and it.at == "input"],
        "output": [it for it in given if isinstance(it, PatchActivation) and it.at == "output"],
        "shift": [it for it in given if isinstance(it, ShiftActivation)],
    }
    for i in range(d_out):
        constant = Fraction(new_bias[i])
        for j in range(d_in):
            w = Fraction(new_weight[i][j])
            if any(it.mask[i, j] for it in of["prune"]):
                new_weight[i][j] = 0.0
            elif any(it.mask[i, j] for it in of["seen"]):
                constant += w * Fraction(float(of["seen"][0].value[j]))
                new_weight[i][j] = 0.0
            elif any(it.mask[j] for it in of["input"]):
                constant += w * Fraction(float(of["input"][0].value[j]))
                new_weight[i][j] = 0.0
        if any(it.mask[i] for it in of["output"]):
            constant = Fraction(float(of["output"][0].value[i]))
            new_weight[i] = [0.0] * d_in
        constant += sum(Fraction(float(it.value[i])) for it in of["shift"])
        new_bias[i] = float(constant)
    return new_weight, new_bias


@pytest.mark.parametrize("count", range(1, 6))
def test_every_composition_is_the_naive_one(sites, state, count):
    at_ffn2 = [it for it in EDIT.operations if it.site == FFN2]
    site = sites[FFN2]
    for chosen in itertools.combinations(at_ffn2, count):
        weight, bias = state["unet"][str(site.weight)], state["unet"][str(site.bias)]
        expected_weight, expected_bias = naive_fold(weight, bias, chosen)
        new = lower(Edit(chosen), sites, state).state["unet"]
        got = new.get(str(site.weight), weight)
        assert same_bits(got, torch.tensor(expected_weight, dtype=torch.float64))
        assert relative_error(new.get(str(site.bias), bias), torch.tensor(expected_bias, dtype=torch.float64)) <= 1e-15


def test_prunings_of_two_concepts_are_their_or(sites, state):
    site, masks = sites[FFN2], [mask(16, 64, seed=seed) for seed in (5, 6)]
    new = lower(merge(Edit((PatchWeightInput(FFN2, it),)) for it in masks), sites, state).state["unet"]
    weight = state["unet"][str(site.weight)]
    assert new.keys() == {str(site.weight)}
    assert same_bits(new[str(site.weight)], torch.where(masks[0] | masks[1], 0.0, weight))


def test_a_shift_of_a_layer_goes_into_its_second_linear(sites, state):
    edit = Edit((ShiftActivation(LAYER, values(16)), ShiftActivation(TEXT_FFN2, values(16, seed=1))))
    bias = str(sites[TEXT_FFN2].bias)
    new = lower(edit, sites, state)
    assert new.state.keys() == {"text_encoder"}
    assert new.state["text_encoder"].keys() == {bias}
    expected = state["text_encoder"][bias] + values(16) + values(16, seed=1)
    assert relative_error(new.state["text_encoder"][bias], expected) <= 1e-15
    assert touched_tensors(edit, sites) == {"text_encoder": {bias}}


def the_operation(kind: str) -> Any:
    return {
        "tokens in": PatchActivation(FFN2, "input", mask(16, 64), values(16, 64)),
        "tokens out": PatchActivation(FFN2, "output", mask(16, 16), values(16, 16)),
        "shift of tokens": ShiftActivation(LAYER, values(77, 16)),
        "prompted": ShiftActivation(LAYER, values(16), "prompted"),
        "latents": steer(LAYER, 16, 0),
        "no bias, shift": ShiftActivation(VALUE, values(16)),
        "no bias, output": PatchActivation(VALUE, "output", mask(16), values(16)),
        "no bias, input": PatchActivation(VALUE, "input", mask(16), values(16)),
        "no bias, weights": PatchWeightInput(VALUE, mask(16, 16), values(16)),
        "conditional": PatchActivation(FFN2, "input", mask(64), values(64), rows="conditional"),
        "calls": PatchActivation(FFN2, "output", mask(16), values(16), calls=(0, 3)),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("tokens in", "token to token"), ("tokens out", "token to token"), ("shift of tokens", "token to token"),
        ("prompted", "empty prompts"), ("latents", "depends on the activation"), ("no bias, shift", "no bias"),
        ("no bias, output", "no bias"), ("no bias, input", "no bias"), ("no bias, weights", "no bias"),
        ("conditional", "negative prompts"), ("calls", "some calls"),
    ],
)  # fmt: skip
def test_what_does_not_fold_stays_and_says_why(sites, state, kind, reason):
    operation = the_operation(kind)
    lowered = lower(Edit((operation,), EDIT.origins), sites, state)
    (realisation,) = lowered.realisations
    assert not lowered.state
    assert lowered.remaining == Edit((operation,), EDIT.origins)
    assert (realisation.site, realisation.operation) == (operation.site, type(operation).__name__)
    assert (realisation.how, realisation.rounding) == ("graph", None)
    assert reason in realisation.reason
    assert touched_tensors(Edit((operation,)), sites) == {}


@pytest.mark.parametrize(
    "operation",
    [
        PatchWeightInput(VALUE, mask(16, 16)),
        PatchWeightInput(VALUE, mask(16, 16), torch.zeros(16)),
        PatchActivation(VALUE, "input", mask(16), torch.zeros(16)),
        PatchActivation(VALUE, "output", mask(16), values(16) * ~mask(16)),
        ShiftActivation(VALUE, torch.zeros(16)),
    ],
)
def test_zeros_need_no_bias(model, sites, pipeline, state, operation):
    lowered = lower(Edit((operation,)), sites, state)
    assert not lowered.remaining.operations
    assert lowered.realisations[0].rounding == 0.0
    assert agree(folded(lowered, model, pipeline), hooked(Edit((operation,)), model, pipeline))


FIRST_FEATURES = torch.arange(16) < 4


def out_of_order() -> dict[str, tuple[Edit, int]]:
    """Edits of which one part stays in the graph, and how many must stay with it."""
    token_patch = PatchActivation(FFN2, "output", mask(16, 16) & FIRST_FEATURES, values(16, 16))
    return {
        "a shift after a patch of tokens": (Edit((token_patch, ShiftActivation(FFN2, values(16)))), 2),
        "a shift that commutes with it": (Edit((token_patch, ShiftActivation(FFN2, values(16) * ~FIRST_FEATURES))), 1),
        "a layer's shift after it": (Edit((
            PatchActivation(TEXT_FFN2, "output", mask(77, 16), values(77, 16)), ShiftActivation(LAYER, values(16)),
        )), 2),
        "a shift beside latents": (Edit((steer(FFN2, 16, 0), ShiftActivation(FFN2, values(16)))), 2),
        "a layer's shift beside its latents": (Edit((steer(LAYER, 16, 0), ShiftActivation(LAYER, values(16)))), 2),
        "a layer's shift after its Linear's latents": (
            Edit((steer(TEXT_FFN2, 16, 0), ShiftActivation(LAYER, values(16)))), 2,
        ),
        "a Linear's shift before its layer's latents": (
            Edit((steer(LAYER, 16, 0), ShiftActivation(TEXT_FFN2, values(16)))), 1,
        ),
        "a patch of zeros under weights": (Edit((
            PatchWeightInput(VALUE, mask(16, 16), values(16)),
            PatchActivation(VALUE, "input", mask(16), torch.zeros(16)),
        )), 2),
        "prunings under a patch of tokens": (Edit((
            PatchWeightInput(FFN2, mask(16, 64)), PatchWeightInput(FFN2, mask(16, 64, seed=1), values(64)),
            PatchActivation(FFN2, "input", mask(16, 64), values(16, 64)),
            PatchActivation(FFN2, "output", mask(16), values(16)), ShiftActivation(FFN2, values(16)),
        )), 1),
        "a shift beside one of prompts": (
            Edit((ShiftActivation(LAYER, values(16)), ShiftActivation(LAYER, values(16, seed=1), "prompted"))), 1,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("what", out_of_order())
def test_nothing_folds_out_of_order_and_what_commutes_folds(model, sites, pipeline, state, what):
    edit, staying = out_of_order()[what]
    lowered = lower(edit, sites, state)
    assert len(lowered.remaining.operations) == staying
    expected = hooked(edit, model, pipeline)
    assert agree(folded(lowered, model, pipeline), expected)
    if staying == 2:
        alone = [lower(Edit((it,)), sites, state) for it in edit.operations]
        forced = next((it for it in alone if it.state), None)
        if forced is not None:
            stays = next(it for it in alone if it.remaining.operations).remaining
            assert not agree(folded(replace(forced, remaining=stays), model, pipeline), expected)


def rounded_naively(exact: Fraction, dtype: torch.dtype) -> float:
    """The nearest number of a dtype, ties to even, by exact arithmetic on its neighbours; no subnormals here."""
    digits = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}[dtype]
    if not exact:
        return 0.0
    exponent = 0
    while abs(exact) / Fraction(2) ** exponent >= 2:
        exponent += 1
    while abs(exact) / Fraction(2) ** exponent < 1:
        exponent -= 1
    unit = Fraction(2) ** (exponent - digits + 1)
    return float(round(exact / unit) * unit)


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_is_rounded_once(sites, dtype):
    """Just above the middle of two neighbours, where rounding by way of another dtype goes the wrong way."""
    digits = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}[dtype]
    tie = 2.0**-digits
    shift = torch.zeros(16, dtype=torch.float64)
    shift[:8] = torch.tensor(
        [tie, tie + 2.0**-48, tie - 2.0**-48, 3 * tie, 3 * tie - 2.0**-23 + 2.0**-30, -1.7, 100.1, 0.0],
        dtype=torch.float64,
    )
    bias = torch.ones(16, dtype=dtype)
    bias[7] = -0.0
    state = {"unet": {str(sites[FFN2].bias): bias}}
    lowered = lower(Edit((ShiftActivation(FFN2, shift),)), sites, state)
    new = lowered.state["unet"][str(sites[FFN2].bias)]
    expected = [
        rounded_naively(Fraction(float(b + 0.0)) + Fraction(float(s)), dtype) for b, s in zip(bias, shift, strict=True)
    ]
    if dtype is torch.float64:  # the sum itself is fp64's
        expected = (bias + shift).tolist()
    assert new.dtype == dtype
    assert new[:7].tolist() == expected[:7]
    assert same_bits(new[7:], bias[7:])
    exact = bias.double() + shift
    rounding = lowered.realisations[0].rounding
    assert rounding == pytest.approx(relative_error(new[:7], exact[:7]), rel=1e-12)
    assert rounding <= 2.0**-digits
    assert (rounding == 0) == (dtype is torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_only_become_positive_zeros(sites, dtype):
    site = sites[FFN2]
    weight = values(16, 64).to(dtype)
    weight[0, 0] = -0.0
    state = {"unet": {str(site.weight): weight, str(site.bias): values(16).to(dtype)}}
    edit = Edit(tuple(it for it in EDIT.operations if it.site == FFN2))
    new = lower(edit, sites, state).state["unet"]
    zeros = mask(16, 64) | mask(16, 64, seed=1) | mask(64, seed=2) | mask(16, seed=3)[:, None]
    assert zeros.any()
    assert not zeros.all()
    got = new[str(site.weight)]
    assert same_bits(got[zeros], torch.zeros(int(zeros.sum()), dtype=dtype))
    assert same_bits(got[~zeros], weight[~zeros])
    only_pruned = lower(Edit((PatchWeightInput(FFN2, mask(16, 64)),)), sites, state)
    assert only_pruned.state["unet"].keys() == {str(site.weight)}
    assert only_pruned.realisations[0].rounding == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_stored_dtype_is_the_same_function_to_its_rounding(model, sites, dtype):
    pipeline = model.pipeline(dtype=dtype)
    lowered = lower(EDIT, sites, stored_state(model, pipeline))
    assert {it.dtype for tensors in lowered.state.values() for it in tensors.values()} == {dtype}
    expected, base, got = hooked(EDIT, model, pipeline), run(pipeline), folded(lowered, model, pipeline)
    for name in expected:
        error = relative_error(got[name], expected[name])
        assert error <= 16 * torch.finfo(dtype).eps
        assert error <= 0.05 * relative_error(base[name], expected[name])


def test_what_changes_no_bit_is_not_in_the_result(sites, state):
    nothing = Edit((
        PatchWeightInput(FFN2, torch.zeros(16, 64, dtype=torch.bool)), ShiftActivation(LAYER, torch.zeros(16)),
        PatchActivation(FFN1, "input", torch.zeros(16, dtype=torch.bool), values(16)),
    ))  # fmt: skip
    lowered = lower(nothing, sites, state)
    assert lowered.state == {}
    assert [it.how for it in lowered.realisations] == ["folded"] * 3
    assert lower(Edit(()), sites, {}) == Lowered({}, (), Edit(()))


def test_a_realisation_says_where(sites, state):
    said = {(it.site, it.operation, it.reason) for it in lower(EDIT, sites, state).realisations}
    assert said == {
        (LAYER, "ShiftActivation", f"into the bias of {TEXT_FFN2}, which adds to the layer's output"),
        (FFN2, "PatchWeightInput", "zeros in the weight"),
        (FFN2, "PatchWeightInput", "zeros in the weight, its constants in the bias"),
        (FFN2, "PatchActivation", "columns of zeros in the weight, its constants in the bias"),
        (FFN2, "PatchActivation", "rows of zeros in the weight, its constants in the bias"),
        (FFN2, "ShiftActivation", "into the bias"),
    }


COSTS = {
    "a folded shift": ([ShiftActivation(LAYER, values(16))], ["nothing at run time"]),
    "a shift": ([ShiftActivation(LAYER, values(77, 16))], ["one more Add of [77, 16]"]),
    "two shifts": (
        [ShiftActivation(LAYER, values(77, 16)), ShiftActivation(LAYER, values(77, 16, seed=1))],
        ["one more Add of [77, 16], shared with 1 other"] * 2,
    ),
    "shifts of two sorts of rows, of one and of all tokens": (
        [*(ShiftActivation(LAYER, values(77, 16, seed=seed), "prompted") for seed in (1, 2)),
         ShiftActivation(LAYER, values(16), "prompted"), ShiftActivation(LAYER, values(77, 16))],
        ["one more Add of [77, 16]",
         *["one more Add of [77, 16], shared with 2 others, the test for empty prompts"] * 3],
    ),
    # 12 latents and 3 neurons of width 16, in an encoder of two layers of width 16 and 32.
    "latents": (
        [steer(LAYER, 16, 0)], ["5.9% more multiply-adds a token, 1.0 kB of constants, TopK"],
    ),
    "one neuron": (
        [replace(steer(LAYER, 16, 0), neurons=torch.tensor([3]), directions=values(16, 1), strengths=values(1))],
        ["5.1% more multiply-adds a token, 0.8 kB of constants, the rank test"],
    ),
    "latents, not for empty prompts": (
        [steer(LAYER, 16, 0, "prompted")],
        ["5.9% more multiply-adds a token, 1.0 kB of constants, TopK, the test for empty prompts"],
    ),
    "all latents": (
        [replace(steer(LAYER, 16, 0), k=12)], ["2.3% more multiply-adds a token, 0.4 kB of constants, no gate"],
    ),
    # 16 tokens of 64 features, of which 320 are patched.
    "a patch in GEGLU": (
        [PatchActivation(FFN2, "input", torch.arange(1024).view(16, 64) < 320, values(16, 64), (4, 4))],
        ["MaskedGeglu in place of GEGLU, 3.8 kB of constants on disk, 5.1 kB in memory"],
    ),
    "a patch elsewhere": (
        [PatchActivation(FFN2, "output", mask(16, 16), values(16, 16), (4, 4))],
        ["one more Where, 1.0 kB of constants on disk, 1.3 kB in memory"],
    ),
    "what no graph can hold": (
        [PatchActivation(FFN2, "input", mask(64), values(64), rows="conditional")],
        ["not known: no graph can hold it"],
    ),
    "what no graph can hold yet": ([steer(FFN2, 16, 0)], ["not known: no graph can hold it yet"]),
}  # fmt: skip


@pytest.mark.parametrize("case", COSTS)
def test_a_realisation_says_what_it_costs(case, sites, state):
    operations, costs = COSTS[case]
    assert sorted(it.cost for it in lower(Edit(tuple(operations)), sites, state).realisations) == sorted(costs)


def test_the_cost_at_the_size_of_sd_15_is_that_of_its_tensors(sites):
    """Of 12 layers of width 768 (85 M multiply-adds a token), an autoencoder of 3,072 latents is 2.8 % and 9.4 MB."""
    layers = {
        name.replace("0", str(layer)): replace(sites[name], name=name.replace("0", str(layer)), d_in=d_in, d_out=768)
        for layer in range(12) for name, d_in in ((LAYER, 768), (TEXT_FFN2, 3072))
    }  # fmt: skip
    latents = SteerLatents(
        "text_encoder.layer.9", torch.ones(3072, 768), torch.ones(3072), torch.ones(768), 32, torch.tensor([5]),
        torch.ones(768, 1), torch.ones(1),
    )  # fmt: skip
    (found,) = lower(Edit((latents,)), layers, {}).realisations
    assert found.cost == "2.8% more multiply-adds a token, 9.4 MB of constants, the rank test"
    assert sum(4 * 768**2 + 2 * 768 * 3072 for _ in range(12)) == 84_934_656


def test_the_cost_of_a_patch_is_that_of_its_constants(sites):
    """Of the widest layer of SD 1.5 at 512 px, 4,096 tokens of 1,280 features, 1 % is 0.6 MB, and all of it 26 MB."""
    wide = {FFN2: replace(sites[FFN2], d_in=1280, d_out=320)}
    chosen = (torch.arange(4096 * 1280) % 100 == 0).view(4096, 1280)
    (found,) = lower(Edit((PatchActivation(FFN2, "input", chosen, chosen.half(), (64, 64)),)), wide, {}).realisations
    assert found.cost == "MaskedGeglu in place of GEGLU, 629.1 kB of constants on disk, 26.2 MB in memory"


@pytest.mark.parametrize("other", [{"rows": "conditional"}, {"calls": (2, 5)}])
@pytest.mark.parametrize("at", ["input", "output"])
def test_a_patch_does_not_fold_beside_one_that_acts_now_and_then(sites, state, at, other):
    """Where both hold, what they give is a mean. One of another place folds."""
    width = {"input": 64, "output": 16}
    always = PatchActivation(FFN2, at, mask(width[at]), values(width[at]))
    elsewhere = "output" if at == "input" else "input"
    apart = PatchActivation(FFN2, elsewhere, mask(width[elsewhere]), values(width[elsewhere]))
    sometimes = PatchActivation(FFN2, at, mask(width[at], seed=1), values(width[at], seed=1), **other)
    assert not lower(Edit((always, apart)), sites, state).remaining.operations
    lowered = lower(Edit((always, apart, sometimes)), sites, state)
    assert lowered.remaining == Edit((always, sometimes))
    reasons = {it.reason for it in lowered.realisations if it.how == "graph"}
    assert f"with another patch of {FFN2}'s {at}, which stays in the graph, it gives a mean" in reasons


@pytest.mark.parametrize(("rows", "prompts"), [("prompted", "empty"), ("conditional", "negative")])
def test_rows_that_are_skipped_do_not_fold(rows, prompts, sites, state):
    (found,) = lower(Edit((ShiftActivation(LAYER, values(16), rows),)), sites, state).realisations
    assert (found.how, found.reason) == ("graph", f"it skips the rows of {prompts} prompts")


def test_lowering_onto_a_model_reads_its_tensors(model, sites):
    edit = Edit(
        (PatchWeightInput(FFN2, mask(16, 64)), ShiftActivation(TEXT_FFN2, values(16)), steer(LAYER, 16, 0, "prompted"))
    )
    stored = {
        component.name: {name: tensor for path in component.files for name, tensor in load_file(path).items()}
        for component in model.components.values()
    }  # fmt: skip
    found, expected = lower_onto(edit, model), lower(edit, sites, stored)
    assert found.realisations == expected.realisations
    assert found.remaining == expected.remaining
    assert [len(tensors) for tensors in found.state.values()] == [1, 1]
    for component, tensors in expected.state.items():
        assert tensors.keys() == found.state[component].keys()
        assert all(same_bits(tensor, found.state[component][name]) for name, tensor in tensors.items())


def test_a_bias_beyond_its_dtype_is_refused(sites):
    state = {"unet": {str(sites[FFN2].bias): torch.full((16,), 6e4, dtype=torch.float16)}}
    edit = Edit((ShiftActivation(FFN2, torch.full((16,), 6e3)),))
    with pytest.raises(InputError, match=r"6\.6e\+04, beyond what torch.float16"):
        lower(edit, sites, state)
    state["unet"] = {name: it.bfloat16() for name, it in state["unet"].items()}
    assert lower(edit, sites, state).state


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("what", ["weight", "bias"])
def test_a_model_that_is_not_finite_is_not_the_fault_of_the_edit(sites, state, what, broken):
    weight, bias = str(sites[FFN2].weight), str(sites[FFN2].bias)
    tensors = {weight: state["unet"][weight].clone(), bias: state["unet"][bias].clone()}
    tensors[{"weight": weight, "bias": bias}[what]].view(-1)[0] = broken
    name = re.escape({"weight": weight, "bias": bias}[what])
    patch = PatchActivation(FFN2, "input", torch.ones(64, dtype=torch.bool), values(64))
    with pytest.raises(InputError, match=f"^{name} of the model itself has values that are not finite"):
        lower(Edit((patch,)), sites, {"unet": tensors})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_quantised_weights_are_refused(sites, state, dtype):
    quantised = {"unet": {name: it.to(dtype) for name, it in state["unet"].items()}}
    with pytest.raises(InputError, match=f"stored as {str(dtype).removeprefix('torch.')}"):
        lower(Edit((PatchWeightInput(FFN2, mask(16, 64)),)), sites, quantised)


def test_another_model_is_refused(sites, state):
    pruning = Edit((PatchWeightInput(FFN2, mask(16, 64)),))
    weight = str(sites[FFN2].weight)
    for wrong in (
        {"unet": {**state["unet"], weight: values(64, 16)}},
        {"unet": {**state["unet"], weight: values(16, 65)}},
    ):
        with pytest.raises(InputError, match="has shape"):
            lower(pruning, sites, wrong)
    for missing in ({}, {"unet": {}}, {"text_encoder": state["unet"]}):
        with pytest.raises(InputError, match="has no tensor"):
            lower(pruning, sites, missing)
    for other in (PatchWeightInput(FFN2, mask(64, 16)), ShiftActivation("unet.down.9.ffn2", values(16))):
        with pytest.raises(InputError, match="another model"):
            lower(Edit((other,)), sites, state)
        with pytest.raises(InputError, match="another model"):
            touched_tensors(Edit((other,)), sites)
    with pytest.raises(InputError, match="no prompts"):
        lower(Edit((ShiftActivation(FFN2, values(16), "prompted"),)), sites, state)


def test_a_negative_zero_that_is_pruned_is_a_change(sites):
    """Left as it is, it would publish the sign of a weight that was there."""
    name = str(sites[FFN2].weight)
    weight = torch.ones(16, 64)
    weight[3, 5] = -0.0
    new = lower(Edit((PatchWeightInput(FFN2, weight == 0),)), sites, {"unet": {name: weight}}).state["unet"][name]
    assert not new[3, 5].signbit()


def test_operations_of_one_sort_count_as_they_merge(model, sites, pipeline, state):
    edit = Edit(tuple(ShiftActivation(LAYER, s * values(16), neuron="sae:1", strength=s) for s in (0.8, 1.2)))
    stronger = Edit((ShiftActivation(LAYER, 1.2 * values(16), neuron="sae:1", strength=1.2),))
    expected = hooked(stronger, model, pipeline)
    assert agree(hooked(edit, model, pipeline), expected)
    assert agree(folded(lower(edit, sites, state), model, pipeline), expected)
    weaker = Edit((ShiftActivation(LAYER, 0.8 * values(16), neuron="sae:1", strength=0.8),))
    assert not agree(hooked(weaker, model, pipeline), expected)
