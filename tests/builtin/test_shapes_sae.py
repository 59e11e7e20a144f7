"""The shipped autoencoder of `shapes`: what it tells of captions that it never saw, and what is drawn from that."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bakeout.builtin import shapes
from bakeout.builtin.shapes import load_detector
from bakeout.builtin.shapes.evaluation import accuracy, generate, scenes_with, scenes_without, uniform_scenes
from bakeout.builtin.shapes.scenes import mentioned, prompt
from bakeout.editor.model import open_model
from bakeout.editor.sae.activations import split
from bakeout.editor.sae.model import SparseAutoencoder
from bakeout.sae import prompts_from

FILE = Path(shapes.__file__).parent / "sae.safetensors"
SITE = "text_encoder.layer.9"


@pytest.fixture(scope="module")
def stored():
    return SparseAutoencoder.load(FILE)


@pytest.fixture(scope="module")
def autoencoder(stored):
    return stored.to(torch.float32)


@pytest.fixture(scope="module")
def pipeline():
    return open_model("shapes").pipeline(dtype=torch.float32)


@pytest.fixture(scope="module")
def held_out():
    """Captions that its training left out."""
    return split(prompts_from(["shapes"])).held_out


@pytest.fixture(scope="module")
def activations(pipeline, held_out):
    """[prompts, 77, 96], of the layer that it reads."""
    found = []
    handle = layer(pipeline).register_forward_hook(lambda _module, _inputs, output: found.append(output))
    try:
        with torch.no_grad():
            for start in range(0, len(held_out), 64):
                pipeline.text_encoder(tokens(pipeline, held_out[start : start + 64]))
    finally:
        handle.remove()
    return torch.cat(found)


def layer(pipeline):
    return pipeline.text_encoder.encoder.layers[9]


def tokens(pipeline, prompts):
    return pipeline.tokenizer(list(prompts), padding="max_length", max_length=77, return_tensors="pt").input_ids


@contextmanager
def replaced(pipeline, by):
    handle = layer(pipeline).register_forward_hook(lambda _module, _inputs, output: by(output))
    try:
        yield
    finally:
        handle.remove()


def latents(autoencoder, x):
    """z [tokens, 384], by a sort of each token."""
    before = (x - autoencoder.center) @ autoencoder.encoder.T + autoencoder.encoder_bias
    order = before.argsort(dim=-1, descending=True)[..., : autoencoder.k]
    return torch.zeros_like(before).scatter(-1, order, before.gather(-1, order).clamp_min(0))


def variance_explained(autoencoder, x):
    error = latents(autoencoder, x) @ autoencoder.decoder.T + autoencoder.center - x
    return 1 - float(error.square().sum() / (x - x.mean(0)).square().sum())


def shares(pipeline, scenes):
    found = accuracy(load_detector(), generate(pipeline, [prompt(scene) for scene in scenes]), scenes)
    return {name: it["share"] for name, it in found.items()}


def test_it_is_stored_in_half_precision_and_reads_the_default_layer(stored):
    assert (stored.site, stored.width, stored.latents, stored.k) == (SITE, 96, 384, 4)
    assert (stored.activation, stored.input_norm) == ("topk", "none")
    for tensor in (stored.encoder, stored.encoder_bias, stored.decoder, stored.center):
        assert tensor.dtype == torch.float16
    assert (stored.decoder.float().norm(dim=0) - 1).abs().max() < 1e-3


def test_it_explains_captions_that_it_never_saw(autoencoder, held_out, activations):
    assert len(held_out) >= 400
    x = activations.flatten(0, 1)
    assert variance_explained(autoencoder, x) >= 0.94
    z = latents(autoencoder, x)
    assert 3.9 <= float((z > 0).sum(-1).float().mean()) <= 4
    assert float((~(z > 0).any(0)).float().mean()) <= 0.70


def test_with_its_decoder_in_another_order_it_explains_nothing(autoencoder, activations):
    broken = replace(autoencoder, decoder=autoencoder.decoder.roll(1, dims=1))
    assert variance_explained(broken, activations.flatten(0, 1)) <= 0.2


def test_its_reconstruction_is_that_of_the_formula(autoencoder, activations):
    x = activations[:20].flatten(0, 1)
    expected = latents(autoencoder, x) @ autoencoder.decoder.T + autoencoder.center
    assert float((autoencoder.reconstruct(x) - expected).norm() / expected.norm()) <= 1e-6


@pytest.mark.parametrize("concept", ["star", "red", "yellow", "striped"])
def test_a_concept_has_a_neuron_of_its_own(pipeline, autoencoder, held_out, activations, concept):
    z = latents(autoencoder, activations)
    named = torch.tensor([concept in mentioned(caption) for caption in held_out])
    active = (z > 0).sum(1).float()
    best = int((active[named].mean(0) - active[~named].mean(0)).argmax())
    assert active[named, best].mean() >= 15
    assert active[~named, best].mean() <= 2


def test_the_model_draws_from_what_it_reconstructs(pipeline, autoencoder):
    scenes = uniform_scenes(24)
    with replaced(pipeline, autoencoder.reconstruct):
        assert min(shares(pipeline, scenes).values()) >= 0.9
    with replaced(pipeline, autoencoder.center.expand_as):
        assert shares(pipeline, scenes)["object"] <= 0.5


@pytest.mark.slow
def test_the_model_draws_nearly_as_well_from_what_it_reconstructs(pipeline, autoencoder):
    scenes = uniform_scenes(300)
    with replaced(pipeline, autoencoder.reconstruct):
        assert min(shares(pipeline, scenes).values()) >= 0.94


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attribute", "concept", "left"), [("object", "star", 0.15), ("colour", "yellow", 0.1), ("style", "striped", 0.5)]
)
def test_without_a_neuron_its_concept_is_drawn_less_and_the_rest_is_there(
    pipeline, autoencoder, held_out, activations, attribute, concept, left
):
    z = latents(autoencoder, activations)
    named = torch.tensor([concept in mentioned(caption) for caption in held_out])
    active = (z > 0).sum(1).float()
    best = int((active[named].mean(0) - active[~named].mean(0)).argmax())

    def without(x):
        return x - latents(autoencoder, x)[..., best, None] * autoencoder.decoder[:, best]

    with replaced(pipeline, without):
        assert shares(pipeline, scenes_with(attribute, concept, 50))[attribute] <= left
        assert min(shares(pipeline, scenes_without([concept], 50)).values()) >= 0.9
