"""The hooks, against the formulas computed a second time, naively; and that they come off again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bakeout.editor.edit import Edit, PatchActivation, PatchWeightInput, ShiftActivation, SteerLatents
from bakeout.editor.errors import InputError
from bakeout.editor.merge import merge
from bakeout.editor.model import Model, open_model
from bakeout.validate.reference import applied

TEXT = "text_encoder.layer.0"
FFN2 = "unet.down.0.attn.0.block.0.ffn2"  # 64 → 16, 16 tokens at the pipeline's own size
KEY = "unet.mid.attn.0.block.0.attn_key"  # 16 → 32, without a bias, 77 tokens
EXACT = 1e-13
EPSILON = {torch.float32: 1e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4


def steer(site: str, width: int = 16, rows: str = "all", **changes: Any) -> SteerLatents:
    neurons = torch.tensor([0, 5, 6, 20])
    given = {
        "encoder": values(24, width, seed=1), "encoder_bias": values(24, seed=2), "center": values(width, seed=3),
        "k": 9, "neurons": neurons, "directions": values(width, 4, seed=4), "strengths": values(4, seed=5).abs(),
        **changes,
    }  # fmt: skip
    return SteerLatents(site, **given, rows=rows)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.detach().double()
    return float((actual.detach().double() - expected).norm() / expected.norm())


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Model:
    return open_model(tiny_model)


@pytest.fixture(scope="module")
def pipeline(model: Model) -> Any:
    return model.pipeline(dtype=torch.float64)


@contextmanager
def recorded(module: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """What the module is given and gives, as the rest of the network sees it."""
    seen: dict[str, torch.Tensor] = {}
    handle = module.register_forward_hook(lambda _, args, output: seen.update(x=args[0], y=output))
    yield seen
    handle.remove()


def run(pipeline: Any, batch: int = 3) -> dict[str, torch.Tensor]:
    """One text encoder call and one UNet call; the first row is an empty prompt."""
    prompts = ["", "a dog", "<|endoftext|> a dog"][:batch]
    tokens = pipeline.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    dtype = pipeline.unet.dtype
    latents = values(batch, 4, 4, 4, seed=9).to(dtype)
    with torch.no_grad():
        text = pipeline.text_encoder(tokens)[0]
        return {"text": text, "noise": pipeline.unet(latents, 7, values(batch, 77, 16).to(dtype)).sample}


def outputs_at(model: Model, pipeline: Any, operations: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The input of a site and its edited output, when it alone is edited."""
    with applied(Edit(tuple(operations)), model, pipeline), recorded(model.module(pipeline, model.site(name))) as seen:
        run(pipeline)
    return seen["x"], seen["y"]


def naive(linear: Any, x: torch.Tensor, operations: Any) -> torch.Tensor:
    """The formulas of the Edit's documentation, with masks as numbers, on dense matrices."""
    d_out, d_in = linear.weight.shape
    pruned, seen, seen_value = torch.zeros(d_out, d_in), torch.zeros(d_out, d_in), torch.zeros(d_in)
    fixed: dict[str, Any] = {"input": None, "output": None}
    for it in operations:
        if isinstance(it, PatchWeightInput) and it.value is None:
            pruned = it.mask.double()
        elif isinstance(it, PatchWeightInput):
            seen, seen_value = it.mask.double(), it.value
        elif isinstance(it, PatchActivation):
            fixed[it.at] = it
    if fixed["input"] is not None:
        m = fixed["input"].mask.double()
        x = m * fixed["input"].value + (1 - m) * x
    what_each_weight_sees = seen * seen_value + (1 - seen) * x[..., None, :]
    y = (linear.weight * (1 - pruned) * what_each_weight_sees).sum(-1)
    y = y if linear.bias is None else y + linear.bias
    if fixed["output"] is not None:
        m = fixed["output"].mask.double()
        y = m * fixed["output"].value + (1 - m) * y
    added = torch.zeros_like(y)
    for it in operations:
        if isinstance(it, ShiftActivation):
            added = added + it.value
        elif isinstance(it, SteerLatents):
            added = added - naive_latents(it, y)
    return y + added


def naive_latents(operation: SteerLatents, y: torch.Tensor) -> torch.Tensor:
    taken = torch.zeros_like(y).reshape(-1, y.shape[-1])
    for row, token in enumerate(y.reshape(-1, y.shape[-1])):
        mean, size = naive_norm(operation.input_norm, token.tolist())
        before = (operation.encoder @ ((token - mean) / size - operation.center) + operation.encoder_bias).tolist()
        largest = sorted(range(len(before)), key=lambda index: (-before[index], index))[: operation.k]
        for column, neuron in enumerate(operation.neurons.tolist()):
            z = max(before[neuron], 0.0) if neuron in largest else 0.0
            taken[row] += size * operation.strengths[column] * z * operation.directions[:, column]
    return taken.reshape(y.shape)


def naive_norm(name: str, token: list[float]) -> tuple[float, float]:
    """What is subtracted from a token and what it is then divided by."""
    if name == "none":
        return 0.0, 1.0
    if name == "constant_norm":
        return 0.0, math.hypot(*token) / math.sqrt(len(token))
    mean = math.fsum(token) / len(token)
    return mean, math.sqrt(math.fsum((it - mean) ** 2 for it in token) / (len(token) - 1)) + 1e-5


def at_site(site: str, d_out: int, d_in: int, tokens: int) -> dict[str, Any]:
    return {
        "pruning": PatchWeightInput(site, mask(d_out, d_in)),
        "weights' value": PatchWeightInput(site, mask(d_out, d_in, seed=1), values(d_in)),
        "features in": PatchActivation(site, "input", mask(d_in), values(d_in, seed=1)),
        "tokens in": PatchActivation(site, "input", mask(tokens, d_in), values(tokens, d_in)),
        "features out": PatchActivation(site, "output", mask(d_out), values(d_out)),
        "tokens out": PatchActivation(site, "output", mask(tokens, d_out), values(tokens, d_out)),
        "shift": ShiftActivation(site, values(d_out)),
        "shift of tokens": ShiftActivation(site, values(tokens, d_out, seed=1)),
        "latents": steer(site, d_out),
    }


COMPOSITIONS = [
    *[(name,) for name in at_site("a", 2, 2, 2)],
    ("pruning", "weights' value"),
    ("pruning", "features in", "shift"),
    ("weights' value", "tokens in", "tokens out", "latents"),
    ("features out", "shift", "shift of tokens", "latents"),
    ("pruning", "weights' value", "features in", "features out", "shift", "latents"),
]


@pytest.mark.parametrize("names", COMPOSITIONS, ids=" + ".join)
@pytest.mark.parametrize("site", [(FFN2, 16, 64, 16), (KEY, 32, 16, 77)], ids=["ffn2", "attn_key"])
def test_a_linear_gives_what_the_formulas_say(model, pipeline, site, names):
    operations = [at_site(*site)[name] for name in names]
    x, y = outputs_at(model, pipeline, operations, site[0])
    linear = model.module(pipeline, model.site(site[0]))
    assert relative_error(y, naive(linear, x, operations)) <= EXACT
    for left_out in range(len(operations)):
        fewer = operations[:left_out] + operations[left_out + 1 :]
        assert not relative_error(y, naive(linear, x, fewer)) <= 1e-4


@pytest.mark.parametrize(
    "names", [("shift",), ("shift of tokens",), ("latents",), ("shift", "shift of tokens", "latents")]
)
def test_an_encoder_layer_gives_what_the_formulas_say(model, pipeline, names):
    operations = [at_site(TEXT, 16, 16, 77)[name] for name in names]
    with recorded(model.module(pipeline, model.site(TEXT))) as base:
        run(pipeline)
    _, y = outputs_at(model, pipeline, operations, TEXT)
    identity = SimpleNamespace(weight=torch.eye(16, dtype=torch.float64), bias=None)
    assert y.shape == (3, 77, 16)
    assert relative_error(y, naive(identity, base["y"], operations)) <= EXACT


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm"])
@pytest.mark.parametrize("site", [TEXT, FFN2])
def test_an_autoencoder_reads_what_its_norm_makes_of_each_token(model, pipeline, site, norm):
    with recorded(model.module(pipeline, model.site(site))) as base:
        run(pipeline)
    operation = steer(site, input_norm=norm)
    _, y = outputs_at(model, pipeline, [operation], site)
    taken = base["y"] - y
    assert relative_error(taken, naive_latents(operation, base["y"])) <= 10 * EXACT
    for other in {"none", "layer_norm", "constant_norm"} - {norm}:
        assert relative_error(taken, naive_latents(replace(operation, input_norm=other), base["y"])) > 1e-2


def test_of_equal_activations_the_lower_index_wins(model, pipeline):
    """Of 24 latents 9 count; latents 8, 9 and 10 are equal and the ninth largest of every token."""
    bias = torch.arange(24, 0, -1, dtype=torch.float64)
    bias[8:11] = 15.5
    given = {"encoder": torch.zeros(24, 16, dtype=torch.float64), "encoder_bias": bias}
    chosen = steer(
        TEXT, **given, neurons=torch.tensor([8, 9, 10]), directions=torch.eye(16, dtype=torch.float64)[:, :3],
        strengths=torch.ones(3, dtype=torch.float64),
    )  # fmt: skip
    with recorded(model.module(pipeline, model.site(TEXT))) as base:
        run(pipeline)
    _, y = outputs_at(model, pipeline, [chosen], TEXT)
    taken = base["y"] - y
    assert relative_error(taken[..., 0], torch.full_like(taken[..., 0], 15.5)) <= EXACT
    assert not taken[..., 1:].any()


@pytest.mark.parametrize("kind", ["shift", "shift of tokens", "latents"])
def test_rows_of_an_empty_prompt_keep_every_bit(model, pipeline, kind):
    operation = at_site(TEXT, 16, 16, 77)[kind]
    base = run(pipeline)["text"]
    with applied(Edit((operation,)), model, pipeline):
        every_row = run(pipeline)["text"]
    with applied(Edit((replace(operation, rows="prompted"),)), model, pipeline):
        prompted = run(pipeline)["text"]
    assert same_bits(prompted[0], base[0])
    assert same_bits(prompted[1:], every_row[1:])
    assert all(relative_error(every_row[row], base[row]) > 1e-2 for row in range(3))


@pytest.mark.parametrize("by_name", [False, True])
def test_tokens_are_found_however_they_are_given(model, pipeline, by_name):
    tokens = pipeline.tokenizer(["a dog", ""], padding="max_length", return_tensors="pt").input_ids
    base = pipeline.text_encoder(tokens)[0]
    with applied(Edit((ShiftActivation(TEXT, values(16), "prompted"),)), model, pipeline):
        edited = pipeline.text_encoder(input_ids=tokens) if by_name else pipeline.text_encoder(tokens)
        short = pipeline.text_encoder(pipeline.tokenizer("", return_tensors="pt").input_ids)[0]
    assert not same_bits(edited[0][0], base[0])
    assert same_bits(edited[0][1], base[1])
    assert same_bits(short, pipeline.text_encoder(pipeline.tokenizer("", return_tensors="pt").input_ids)[0])


def test_without_tokens_no_row_is_taken_for_prompted(model, pipeline):
    layer = model.module(pipeline, model.site(TEXT))
    with applied(Edit((ShiftActivation(TEXT, values(16), "prompted"),)), model, pipeline):
        run(pipeline)
        with pytest.raises(InputError, match="run the whole text encoder"):
            layer(values(2, 77, 16), None)
        with pytest.raises(InputError, match="pass input_ids"):
            pipeline.text_encoder(attention_mask=None)


def test_the_second_text_encoder_is_edited_by_its_own_tokens(model, pipeline):
    """One with a projection, whose pad token is another than its end token, as in SDXL."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=514, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=8, bos_token_id=512, eos_token_id=513, pad_token_id=0,
    )  # fmt: skip
    second = SimpleNamespace(
        text_encoder_2=CLIPTextModelWithProjection(config).eval(),
        tokenizer_2=SimpleNamespace(eos_token_id=513, pad_token_id=0),
    )
    sites = tuple(
        replace(site, component="text_encoder_2", name=site.name.replace("text_encoder", "text_encoder_2"))
        for site in model.sites_of("text_layer")
    )
    tokens = torch.tensor([[512, 513, 0, 0], [512, 40, 513, 0], [512, 513, 513, 513]])
    edit = Edit((ShiftActivation("text_encoder_2.layer.1", values(16), "prompted"),))
    base = second.text_encoder_2(tokens, output_hidden_states=True)
    with applied(edit, replace(model, sites=sites), second):
        edited = second.text_encoder_2(tokens, output_hidden_states=True)
    for before, after in ((base[0], edited[0]), (base.hidden_states[2], edited.hidden_states[2])):
        assert [same_bits(before[row], after[row]) for row in range(3)] == [True, False, True]


def test_recorded_hidden_states_are_those_that_were_edited(model, pipeline):
    """SDXL's prompt embeddings are recorded hidden states; the recorder may have been installed before the edit."""
    tokens = pipeline.tokenizer(["a dog"], padding="max_length", return_tensors="pt").input_ids
    base = pipeline.text_encoder(tokens, output_hidden_states=True).hidden_states
    with applied(Edit((ShiftActivation(TEXT, values(16)),)), model, pipeline):
        edited = pipeline.text_encoder(tokens, output_hidden_states=True).hidden_states
    assert same_bits(edited[0], base[0])
    assert relative_error(edited[1], base[1] + values(16)) <= EXACT


class OldLayer(nn.Linear):
    """An encoder layer of transformers 4: it gives a tuple."""

    def forward(self, x: torch.Tensor, *_: object) -> Any:
        return super().forward(x), "attentions"


def test_a_layer_that_gives_a_tuple_is_edited_in_its_first(model):
    encoder = nn.Module()
    encoder.encoder = nn.Module()
    encoder.encoder.layers = nn.ModuleList([OldLayer(16, 16).double()])
    old = SimpleNamespace(text_encoder=encoder)
    x = values(2, 77, 16)
    base, _ = encoder.encoder.layers[0](x)
    with applied(Edit((ShiftActivation(TEXT, values(16)),)), model, old):
        output, rest = encoder.encoder.layers[0](x)
    assert rest == "attentions"
    assert relative_error(output, base + values(16)) <= EXACT


def all_hooks(pipeline: Any) -> list[int]:
    modules = [*pipeline.text_encoder.modules(), *pipeline.unet.modules()]
    return [len(it._forward_hooks) + len(it._forward_pre_hooks) for it in modules]


WHOLE = Edit((
    PatchWeightInput(FFN2, mask(16, 64)),
    PatchActivation(FFN2, "input", mask(16, 64), values(16, 64)),
    PatchActivation(KEY, "output", mask(32), values(32)),
    ShiftActivation(TEXT, values(16), "prompted"),
    ShiftActivation("text_encoder.layer.1.ffn2", values(16)),
    steer("text_encoder.layer.1", rows="prompted"),
))  # fmt: skip


def test_everything_comes_off_at_the_end(model, pipeline):
    base = run(pipeline)
    before = all_hooks(pipeline)
    with applied(WHOLE, model, pipeline):
        edited = run(pipeline)
    assert all_hooks(pipeline) == before
    for name, expected in run(pipeline).items():
        assert same_bits(expected, base[name])
        assert relative_error(edited[name], base[name]) > 1e-3


def test_everything_comes_off_after_a_fault(model, pipeline):
    before = all_hooks(pipeline)
    with pytest.raises(ZeroDivisionError), applied(WHOLE, model, pipeline):
        raise ZeroDivisionError
    assert all_hooks(pipeline) == before
    bad = Edit((*WHOLE.operations, ShiftActivation("unet.up.1.attn.1.block.0.ffn2", values(99))))
    with pytest.raises(InputError, match="another model"), applied(bad, model, pipeline):
        pass
    assert all_hooks(pipeline) == before
    with pytest.raises(InputError), applied(WHOLE, model, pipeline):
        pipeline.unet(values(1, 4, 8, 8), 7, values(1, 77, 16))
    assert all_hooks(pipeline) == before
    with applied(WHOLE, model, pipeline):
        run(pipeline)


def test_weights_and_edit_are_never_touched(model, pipeline):
    def state() -> dict[str, torch.Tensor]:
        return {
            f"{name}.{key}": value.clone()
            for name in ("text_encoder", "unet")
            for key, value in getattr(pipeline, name).state_dict().items()
        }

    before, digest = state(), Edit(WHOLE.operations).digest
    with applied(WHOLE, model, pipeline):
        run(pipeline)
        during = state()
    assert all(same_bits(value, during[name]) for name, value in before.items())
    assert Edit(tuple(replace(it) for it in WHOLE.operations)).digest == digest


@pytest.mark.parametrize("dtype", EPSILON)
def test_half_precision_is_the_same_function(model, pipeline, dtype):
    """Of one UNet and one text encoder call; latents are left out, whose order may turn on a rounding error."""
    edit = Edit(tuple(it for it in WHOLE.operations if not isinstance(it, SteerLatents)))
    half = model.pipeline(dtype=dtype)
    with applied(edit, model, pipeline):
        expected = run(pipeline)
    with applied(edit, model, half):
        actual = run(half)
    base = run(half)
    for name, tensor in actual.items():
        assert tensor.dtype == dtype
        error = relative_error(tensor, expected[name])
        assert error <= EPSILON[dtype]
        assert relative_error(base[name], expected[name]) > 5 * error


@pytest.mark.parametrize("dtype", EPSILON)
def test_latents_are_computed_in_the_wider_dtype(model, dtype):
    half = model.pipeline(dtype=dtype)
    operation = steer(TEXT)
    with recorded(model.module(half, model.site(TEXT))) as base:
        run(half)
    _, y = outputs_at(model, half, [operation], TEXT)
    expected = base["y"] - naive_latents(operation, base["y"].double()).to(dtype)
    assert y.dtype == dtype
    assert relative_error(y, expected) <= torch.finfo(dtype).eps / 8


@pytest.mark.parametrize("dtype", EPSILON)
def test_pruning_is_the_pruned_weight_bit_for_bit(model, dtype):
    half = model.pipeline(dtype=dtype)
    with applied(Edit((PatchWeightInput(FFN2, mask(16, 64)),)), model, half):
        hooked = run(half)["noise"]
    weight = model.module(half, model.site(FFN2)).weight
    weight.data[mask(16, 64)] = 0
    assert same_bits(run(half)["noise"], hooked)
    weight.data[0, ~mask(16, 64)[0]] = 0
    assert not same_bits(run(half)["noise"], hooked)


def test_a_value_beyond_the_dtype_is_refused(model):
    edit = Edit((ShiftActivation(TEXT, torch.full((16,), 1e5)),))
    with (
        pytest.raises(InputError, match="load the pipeline in float32"),
        applied(edit, model, model.pipeline(dtype=torch.float16)),
    ):
        pass
    with applied(edit, model, model.pipeline(dtype=torch.bfloat16)):
        pass


@pytest.mark.parametrize(
    "operation",
    [
        PatchActivation(FFN2, "input", mask(16, 64), values(16, 64)),
        PatchActivation(FFN2, "output", mask(1, 16), values(1, 16)),
        ShiftActivation(FFN2, values(16, 16)),
    ],
)
def test_another_number_of_tokens_is_refused(model, pipeline, operation):
    tokens = len(operation.value)
    with (
        applied(Edit((operation,)), model, pipeline),
        pytest.raises(InputError, match=f"valid for {tokens} tokens and not"),
    ):
        pipeline.unet(values(1, 4, 8, 8), 7, values(1, 77, 16))


def test_the_same_site_twice_is_refused(model, pipeline):
    base = run(pipeline)["text"]
    outer, inner = Edit((ShiftActivation(TEXT, values(16)),)), Edit((ShiftActivation(TEXT, values(16, seed=1)),))
    with applied(outer, model, pipeline):
        once = run(pipeline)["text"]
        with pytest.raises(InputError, match="edited already; merge"), applied(inner, model, pipeline):
            pass
        assert same_bits(run(pipeline)["text"], once)
        with pytest.raises(InputError, match="edited already"), applied(inner, model, pipeline):
            pass
    assert same_bits(run(pipeline)["text"], base)


def test_other_sites_may_be_nested(model, pipeline):
    outer, inner = Edit((ShiftActivation(TEXT, values(16)),)), Edit(WHOLE.operations[-2:])
    with applied(outer, model, pipeline), applied(inner, model, pipeline):
        nested = run(pipeline)
    with applied(merge([outer, inner]), model, pipeline):
        merged = run(pipeline)
    assert all(same_bits(nested[name], merged[name]) for name in merged)


def test_a_batch_is_its_rows(model, pipeline):
    tokens = pipeline.tokenizer(["", "a dog", "b"], padding="max_length", return_tensors="pt").input_ids
    latents, text = values(3, 4, 4, 4), values(3, 77, 16)
    with applied(WHOLE, model, pipeline), torch.no_grad():
        together = pipeline.text_encoder(tokens)[0], pipeline.unet(latents, 7, text).sample
        for row in range(3):
            one = slice(row, row + 1)
            alone = pipeline.text_encoder(tokens[one])[0], pipeline.unet(latents[one], 7, text[one]).sample
            assert all(relative_error(a, b[one]) <= 1e-12 for a, b in zip(alone, together, strict=True))


def draw(pipeline: Any, guidance: float, **given: Any) -> torch.Tensor:
    return pipeline(
        **given, num_inference_steps=2, guidance_scale=guidance, output_type="latent", height=16, width=16,
        latents=values(1, 4, 4, 4, seed=9),
    ).images  # fmt: skip


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_a_whole_pipeline_runs_edited(model, pipeline, guidance):
    base = draw(pipeline, guidance, prompt="a dog")
    with applied(WHOLE, model, pipeline):
        edited = draw(pipeline, guidance, prompt="a dog")
    assert edited.isfinite().all()
    assert relative_error(edited, base) > 1e-4
    assert same_bits(draw(pipeline, guidance, prompt="a dog"), base)


def test_with_guidance_only_a_negative_prompt_that_is_not_empty_is_edited(model, pipeline):
    def encode(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return pipeline.encode_prompt("a dog", "cpu", 1, True, **given)

    base, base_negative = encode()
    other_base = encode(negative_prompt="a cat")[1]
    with applied(Edit((ShiftActivation(TEXT, values(16), "prompted"),)), model, pipeline):
        positive, negative = encode()
        other = encode(negative_prompt="a cat")[1]
    assert same_bits(negative, base_negative)
    assert not same_bits(positive, base)
    assert not same_bits(other, other_base)


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def either(request, folders):
    """A model with one text encoder, or with two, its pipeline, and the last layer of each that prompts depend on."""
    model = open_model(folders(request.param))
    names = ["text_encoder", "text_encoder_2"][: 1 + (request.param == "sdxl")]
    return model, model.pipeline(dtype=torch.float64), [model.site(f"{name}.layer.1") for name in names]


def encoded(pipeline: Any, prompt: str | None = "a dog", **given: Any) -> list[torch.Tensor | None]:
    """The embeddings of prompts and of negative prompts, and for two text encoders the pooled ones of both."""
    return list(pipeline.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, **given))


@pytest.mark.parametrize("kind", ["shift", "shift of tokens", "latents"])
@pytest.mark.parametrize("negative", [{}, {"negative_prompt": ""}, {"negative_prompt": "a cat"}], ids=str)
def test_the_rows_of_prompts_are_edited_and_those_of_negative_prompts_keep_every_bit(either, kind, negative):
    model, pipeline, sites = either
    every_row = Edit(tuple(at_site(it.name, it.d_out, it.d_out, 77)[kind] for it in sites))
    conditional = Edit(tuple(replace(it, rows="conditional") for it in every_row.operations))
    for prompt in ("a dog", ""):
        given = {"prompt": prompt, "do_classifier_free_guidance": True, **negative}
        base = encoded(pipeline, **given)
        with applied(every_row, model, pipeline):
            edited = encoded(pipeline, **given)
        with applied(conditional, model, pipeline):
            found = encoded(pipeline, **given)
            # And so again: no call is taken for another that came before.
            again = encoded(pipeline, **given)
        for place, (own, other) in enumerate(zip(found, again, strict=True)):
            expected = (edited, base)[place % 2][place]
            assert same_bits(own, expected)
            assert same_bits(other, expected)
        assert relative_error(edited[0], base[0]) > 1e-2
        # SDXL has no text of an empty negative prompt, but zeros.
        assert not (base[1].any() and same_bits(edited[1], base[1]))


def test_without_guidance_all_rows_are_of_prompts(either):
    model, pipeline, sites = either
    shifts = [ShiftActivation(it.name, values(it.d_out)) for it in sites]
    given = {"prompt": ["a dog", "", "a cat"], "do_classifier_free_guidance": False}
    with applied(Edit(tuple(shifts)), model, pipeline):
        edited = encoded(pipeline, **given)
    with applied(Edit(tuple(replace(it, rows="conditional") for it in shifts)), model, pipeline):
        assert same_bits(encoded(pipeline, **given)[0], edited[0])


def test_where_the_prompts_embeddings_are_given_the_first_call_is_for_negative_prompts(either):
    model, pipeline, sites = either
    given = {"do_classifier_free_guidance": True, "negative_prompt": "a cat"}
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    base = dict(zip(names, encoded(pipeline, **given), strict=False))
    prompts = {name: value for name, value in base.items() if not name.startswith("negative")}
    negatives = {name: value for name, value in base.items() if name.startswith("negative")}
    shifts = [ShiftActivation(it.name, values(it.d_out), "conditional") for it in sites]
    with applied(Edit(tuple(shifts)), model, pipeline):
        kept = encoded(pipeline, None, **given, **prompts)
        edited = encoded(pipeline, do_classifier_free_guidance=True, **negatives)
    assert same_bits(kept[1], base["negative_prompt_embeds"])
    assert relative_error(edited[0], base["prompt_embeds"]) > 1e-2


def test_a_drawing_is_guided_away_from_what_was_not_edited(model, pipeline):
    """What the whole pipeline draws is what it draws of these embeddings."""
    shift = ShiftActivation(TEXT, values(16))
    (base_prompt, negative), given = pipeline.encode_prompt("a dog", "cpu", 1, True), {"prompt": "a dog"}
    with applied(Edit((shift,)), model, pipeline):
        edited, both = pipeline.encode_prompt("a dog", "cpu", 1, True)
        everywhere = draw(pipeline, 7.5, **given)
    with applied(Edit((replace(shift, rows="conditional"),)), model, pipeline):
        found = draw(pipeline, 7.5, **given)
    assert same_bits(found, draw(pipeline, 7.5, prompt_embeds=edited, negative_prompt_embeds=negative))
    assert not same_bits(found, everywhere)
    assert not same_bits(found, draw(pipeline, 7.5, prompt_embeds=base_prompt, negative_prompt_embeds=both))


def test_outside_of_encode_prompt_nobody_knows_which_prompts_are_negative(either):
    model, pipeline, sites = either
    edit = Edit(tuple(ShiftActivation(it.name, values(it.d_out), "conditional") for it in sites))
    before = dict(vars(pipeline))
    tokens = pipeline.tokenizer(["a dog"], padding="max_length", return_tensors="pt").input_ids
    with applied(edit, model, pipeline):
        for _ in range(2):
            with pytest.raises(InputError, match="skips negative prompts"):
                pipeline.text_encoder(tokens)
            encoded(pipeline, do_classifier_free_guidance=False)
        with pytest.raises(TypeError):
            encoded(pipeline, 7)
        with pytest.raises(InputError, match="skips negative prompts"):
            pipeline.text_encoder(tokens)
        with pytest.raises(InputError, match="run the whole text encoder"):
            model.module(pipeline, sites[0])(values(1, 77, sites[0].d_out), None)
    assert vars(pipeline) == before
    pipeline.text_encoder(tokens)


def test_rows_of_every_sort_are_told_apart_in_one_edit_and_in_nested_ones(model, pipeline):
    given = {"prompt": ["a dog", ""], "do_classifier_free_guidance": True, "negative_prompt": ["", "a cat"]}
    layers = ("text_encoder.layer.0", "text_encoder.layer.1")
    for site in layers:
        shifts = {rows: ShiftActivation(site, values(16), rows) for rows in ("all", "prompted", "conditional")}
        base = encoded(pipeline, **given)
        changed = {}
        for rows, shift in shifts.items():
            with applied(Edit((shift,)), model, pipeline):
                pairs = list(zip(encoded(pipeline, **given), base, strict=True))
            changed[rows] = [[not same_bits(own[row], other[row]) for row in range(2)] for own, other in pairs]
        assert changed == {
            "all": [[True, True], [True, True]],
            "prompted": [[True, False], [False, True]],
            "conditional": [[True, True], [False, False]],
        }
    one, two = (Edit((ShiftActivation(site, values(16), "conditional"),)) for site in layers)
    prompted = Edit((ShiftActivation(layers[0], values(16, seed=1), "prompted"),))
    with applied(merge([one, prompted]), model, pipeline), applied(two, model, pipeline):
        nested = encoded(pipeline, **given)
    with applied(merge([one, two, prompted]), model, pipeline):
        assert all(same_bits(*it) for it in zip(encoded(pipeline, **given), nested, strict=True))
    assert "encode_prompt" not in vars(pipeline)


def test_embeddings_that_are_passed_bypass_the_text_encoder(model, pipeline):
    given = {"prompt_embeds": values(1, 77, 16), "negative_prompt_embeds": values(1, 77, 16, seed=1)}
    base = draw(pipeline, 7.5, **given)
    with applied(Edit((ShiftActivation(TEXT, values(16), "prompted"),)), model, pipeline):
        assert same_bits(draw(pipeline, 7.5, **given), base)


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (ShiftActivation("unet.down.7.attn.0.block.0.ffn2", values(16)), "no site"),
        (PatchWeightInput(FFN2, mask(64, 16)), "another model"),
        (PatchActivation(TEXT, "output", mask(16), values(16)), "no Linear"),
        (ShiftActivation(FFN2, values(16), "prompted"), "no prompts"),
    ],
)
def test_an_edit_of_another_model_is_refused(model, pipeline, operation, message):
    with pytest.raises(InputError, match=message), applied(Edit((operation,)), model, pipeline):
        pass


def test_a_pipeline_of_another_model_is_refused(model, pipeline):
    textless = SimpleNamespace(unet=pipeline.unet, text_encoder=None)
    with pytest.raises(InputError, match="no module for"), applied(WHOLE, model, textless):
        pass
    wider = replace(model, sites=tuple(replace(it, d_in=65) if it.name == FFN2 else it for it in model.sites))
    with (
        pytest.raises(InputError, match="another width"),
        applied(Edit((ShiftActivation(FFN2, values(16)),)), wider, pipeline),
    ):
        pass
    untold = SimpleNamespace(text_encoder=pipeline.text_encoder)
    with (
        pytest.raises(InputError, match="no tokenizer"),
        applied(Edit((ShiftActivation(TEXT, values(16), "prompted"),)), model, untold),
    ):
        pass


OUT = "unet.mid.attn.0.block.0.attn_out"  # 32 → 32, 4 tokens


@pytest.mark.parametrize("names", [("features in",), ("tokens in", "tokens out"), ("pruning", "tokens in", "shift")])
def test_the_output_of_the_cross_attention_is_a_place_as_well(model, pipeline, names):
    site = (OUT, 32, 32, 4)
    operations = [at_site(*site)[name] for name in names]
    x, y = outputs_at(model, pipeline, operations, OUT)
    assert relative_error(y, naive(model.module(pipeline, model.site(OUT)), x, operations)) <= EXACT


def patch(site: str, tokens: int, width: int, at: str = "input", seed: int = 0, **changes: Any) -> PatchActivation:
    shape = (tokens, width) if tokens else (width,)
    return PatchActivation(site, at, mask(*shape, seed=seed), values(*shape, seed=seed), **changes)


def naive_patches(patches: list[PatchActivation], x: torch.Tensor) -> torch.Tensor:
    """x [tokens, d] of one row in which all of them hold."""
    y = x.clone()
    for token in range(x.shape[0]):
        for feature in range(x.shape[1]):
            place = [(token, feature) if it.mask.ndim == 2 else (feature,) for it in patches]
            found = [float(it.value[at]) for it, at in zip(patches, place, strict=True) if it.mask[at]]
            if found:
                y[token, feature] = sum(found) / len(found)
    return y


@contextmanager
def calls_of(module: nn.Module) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = module.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    yield seen
    handle.remove()


def drawn_at(model: Model, pipeline: Any, edit: Edit, site: str, guidance: float, steps: int = 3) -> Any:
    """What a site is given and gives in each call of a drawing of two pictures."""
    latents = values(2, 4, 4, 4, seed=9).to(pipeline.unet.dtype)
    with applied(edit, model, pipeline), calls_of(model.module(pipeline, model.site(site))) as seen:
        pipeline(
            prompt=["a dog", "a cat"], negative_prompt=["", "a cat"], num_inference_steps=steps, latents=latents,
            guidance_scale=guidance, output_type="latent", height=16, width=16,
        )  # fmt: skip
    return seen


@pytest.mark.parametrize("dtype", [torch.float64, *EPSILON])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("at", ["input", "output"])
def test_patches_of_one_place_are_one_in_the_calls_and_rows_in_which_they_hold(model, at, guidance, dtype):
    """Of four patches, by call and row; where several hold, their mean is."""
    pipeline, width = model.pipeline(dtype=dtype), 64 if at == "input" else 16
    everywhere = patch(FFN2, 16, width, at, 1)
    prompts = patch(FFN2, 0, width, at, 2, rows="conditional")
    early = patch(FFN2, 16, width, at, 3, calls=(0, 2))
    late_prompts = patch(FFN2, 16, width, at, 4, calls=(1, 3), rows="conditional", latents=(4, 4))
    four = [everywhere, prompts, early, late_prompts]
    seen = drawn_at(model, pipeline, Edit(tuple(four)), FFN2, guidance)
    linear = model.module(pipeline, model.site(FFN2))
    assert len(seen) == 3
    assert len(seen[0][0]) == (4 if guidance > 1 else 2)
    for call, (x, y) in enumerate(seen):
        for row in range(len(x)):
            is_prompt = guidance == 1 or row >= 2
            hold = [
                everywhere,
                *[prompts] * is_prompt,
                *[early] * (call < 2),
                *[late_prompts] * (is_prompt and call > 0),
            ]

            def expected(hold: list[PatchActivation], x: torch.Tensor = x[row]) -> torch.Tensor:
                if at == "input":
                    return torch.nn.functional.linear(naive_patches(hold, x), linear.weight, linear.bias)
                return naive_patches(hold, torch.nn.functional.linear(x, linear.weight, linear.bias))

            assert y.dtype == dtype
            assert relative_error(y[row], expected(hold)) <= EPSILON.get(dtype, EXACT)
            for other in four:
                others = [it for it in hold if it is not other] if other in hold else [*hold, other]
                assert relative_error(y[row], expected(others)) > 10 * EPSILON.get(dtype, EXACT)


def test_features_and_tokens_of_one_place_are_one_patch(model, pipeline):
    two = [patch(FFN2, 16, 64, seed=1), patch(FFN2, 0, 64, seed=2)]
    x, y = outputs_at(model, pipeline, two, FFN2)
    linear = model.module(pipeline, model.site(FFN2))
    expected = torch.stack([naive_patches(two, row) for row in x])
    assert relative_error(y, torch.nn.functional.linear(expected, linear.weight, linear.bias)) <= EXACT


@pytest.mark.parametrize("changes", [{"rows": "conditional"}, {"calls": (0, 2)}], ids=str)
def test_outside_of_a_drawing_nobody_knows_rows_and_calls(model, pipeline, changes):
    edit, kind = Edit((patch(FFN2, 16, 64, **changes),)), type(pipeline)
    base = drawn_at(model, pipeline, Edit(()), FFN2, 7.5)
    with applied(edit, model, pipeline):
        assert isinstance(pipeline, kind)
        for _ in range(2):
            with pytest.raises(InputError, match="run the pipeline"):
                run(pipeline)
            with pytest.raises(InputError, match="or the pipeline"):
                model.module(pipeline, model.site(FFN2))(values(1, 16, 64))
            draw(pipeline, 7.5, prompt="a dog")
        with pytest.raises(ZeroDivisionError):
            pipeline(prompt="a dog", num_inference_steps=3, callback_on_step_end=lambda *_: 1 / 0)
        with pytest.raises(InputError, match="run the pipeline"):
            run(pipeline)
    assert type(pipeline) is kind
    again = drawn_at(model, pipeline, Edit(()), FFN2, 7.5)
    assert all(
        same_bits(one, other) for pair in zip(base, again, strict=True) for one, other in zip(*pair, strict=True)
    )


def test_calls_are_counted_from_the_start_of_each_drawing(model, pipeline):
    """Also of one within another, and for a scheduler that calls twice for a noise level."""
    from diffusers import PNDMScheduler

    second = Edit((patch(FFN2, 16, 64, calls=(1, 2)),))
    first = Edit((patch(KEY, 77, 16, calls=(0, 1)),))
    own = pipeline.scheduler
    try:
        pipeline.scheduler = PNDMScheduler.from_config(own.config, skip_prk_steps=True)
        linear = model.module(pipeline, model.site(FFN2))

        def patched(seen: Any) -> list[bool]:
            plain = [torch.nn.functional.linear(x, linear.weight, linear.bias) for x, _ in seen]
            return [not same_bits(it, y) for it, (_, y) in zip(plain, seen, strict=True)]

        for _ in range(2):
            assert patched(drawn_at(model, pipeline, second, FFN2, 7.5)) == [False, True, False, False]
        with applied(first, model, pipeline):
            assert patched(drawn_at(model, pipeline, second, FFN2, 7.5)) == [False, True, False, False]
        inner: list[torch.Tensor] = []

        def step_done(running: Any, step: int, *_: Any) -> dict[str, Any]:
            if step == 0 and not inner:
                inner.append(draw(running, 7.5, prompt="a dog"))
            return {}

        with applied(second, model, pipeline), calls_of(linear) as seen:
            pipeline(prompt="a dog", num_inference_steps=3, callback_on_step_end=step_done)
        # The inner drawing has three calls as well: it lies behind the first of four.
        assert patched(seen) == [False, *(False, True, False), True, False, False]
    finally:
        pipeline.scheduler = own


def test_latents_of_another_shape_are_refused(model, pipeline):
    """Also with as many tokens."""
    edit = Edit((patch(FFN2, 16, 64, latents=(4, 4)),))
    text = values(1, 77, 16)
    before = all_hooks(pipeline)
    with applied(edit, model, pipeline):
        pipeline.unet(values(1, 4, 4, 4), 7, text)
        for height, width in ((2, 8), (8, 2), (8, 8)):
            message = f"latents of 4x4 .* and not of {width}x{height}; draw pictures of 16x16 pixels"
            with pytest.raises(InputError, match=message):
                pipeline.unet(values(1, 4, height, width), 7, text)
            with pytest.raises(InputError, match=message):
                pipeline.unet(sample=values(1, 4, height, width), timestep=7, encoder_hidden_states=text)
        with pytest.raises(InputError, match="latents of 4x4"):
            pipeline(prompt="a dog", num_inference_steps=1, height=8, width=32)
    assert all_hooks(pipeline) == before
    pipeline.unet(values(1, 4, 2, 8), 7, text)
    with applied(Edit((patch(FFN2, 16, 64, latents=(2, 8)),)), model, pipeline):
        pipeline.unet(values(1, 4, 2, 8), 7, text)
        with pytest.raises(InputError, match=r"latents of 8x2 .* and not of 4x4; draw pictures of 32x8 pixels"):
            pipeline.unet(values(1, 4, 4, 4), 7, text)
    two = Edit((patch(FFN2, 16, 64, latents=(4, 4)), patch(OUT, 4, 32, latents=(2, 8))))
    with pytest.raises(InputError, match="latents of 8x2 and 4x4; calibrate"), applied(two, model, pipeline):
        pass
    assert all_hooks(pipeline) == before


def test_a_text_encoder_is_patched_in_the_rows_of_prompts(either):
    model, pipeline, sites = either
    sites = [model.site(f"{it.name}.ffn2") for it in sites]
    given = {"prompt": "a dog", "do_classifier_free_guidance": True, "negative_prompt": "a cat"}
    patches = [patch(it.name, 77, it.d_in) for it in sites]
    base = encoded(pipeline, **given)
    with applied(Edit(tuple(patches)), model, pipeline):
        edited = encoded(pipeline, **given)
    with applied(Edit(tuple(replace(it, rows="conditional") for it in patches)), model, pipeline):
        found = encoded(pipeline, **given)
    for place, own in enumerate(found):
        assert same_bits(own, (edited, base)[place % 2][place])
    assert not same_bits(base[0], edited[0])
    with (
        pytest.raises(InputError, match="before the first call of a drawing"),
        applied(Edit((replace(patches[0], calls=(0, 1)),)), model, pipeline),
    ):
        pass
