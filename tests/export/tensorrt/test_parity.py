"""What an engine is compared on, and what is no parity."""

from __future__ import annotations

import pytest
import torch
from onnx import TensorProto

from bakeout.editor.errors import InputError
from bakeout.export.tensorrt.parity import _relative_rms, _sets, inputs_of

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def inputs(graph: str, shapes: dict[str, tuple[int, ...]], config: dict[str, object], timestep: int = 501):
    kinds = {name: INT64 if name == "input_ids" else FLOAT for name in shapes}
    return inputs_of(graph, shapes, kinds, config, timestep)


def test_latents_are_those_of_the_vae_and_pictures_those_of_pipelines():
    latents = {"latent_sample": (1, 4, 32, 32)}
    assert inputs("vae_decoder", latents, {"scaling_factor": 0.25})["latent_sample"].std() == pytest.approx(4, rel=0.05)
    assert inputs("vae_decoder", latents, {})["latent_sample"].std() == pytest.approx(1, rel=0.05)
    picture = inputs("vae_encoder", {"sample": (1, 3, 64, 64)}, {"scaling_factor": 0.25})["sample"]
    assert -1 <= picture.min() < -0.9
    assert 0.9 < picture.max() <= 1


def test_the_unet_sees_noise_at_a_timestep():
    shapes = {"sample": (2, 4, 8, 8), "timestep": (2,), "encoder_hidden_states": (2, 7, 16), "time_ids": (2, 6)}
    found = inputs("unet", shapes, {}, timestep=21)
    assert found["timestep"].tolist() == [21, 21]
    assert found["time_ids"].tolist() == [[1024, 1024, 0, 0, 1024, 1024]] * 2
    assert not torch.equal(found["sample"][0], found["sample"][1])
    assert inputs("unet", shapes, {}, 21)["sample"].equal(found["sample"])
    assert inputs("unet", {"timestep": ()}, {})["timestep"].shape == ()


def test_tokens_are_a_prompt_with_an_end():
    ids = inputs("text_encoder", {"input_ids": (3, 10)}, {"vocab_size": 50})["input_ids"]
    assert ids.dtype == torch.int64
    assert ids[:, 0].tolist() == [48] * 3
    assert (ids[:, 5:] == 49).all()
    assert (ids[:, 1:5] < 48).all()
    with pytest.raises(InputError, match="no vocab_size"):
        inputs("text_encoder", {"input_ids": (3, 10)}, {"vocab_size": "many"})


def test_the_usual_and_the_largest_shapes_are_compared():
    x = ((1, 4, 8), (2, 4, 16), (6, 4, 32))
    assert list(_sets({"x": x})) == [{"x": (2, 4, 16)}, {"x": (1, 4, 32)}]
    assert list(_sets({"x": ((1, 4), (2, 4), (6, 4)), "t": ((), (), ())})) == [{"x": (2, 4), "t": ()}]


def test_the_error_is_free_of_scale():
    expected = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    for scale in (1e-3, 1.0, 1e6):
        assert _relative_rms(scale * expected * 1.01, scale * expected, "unet", "y") == pytest.approx(0.01, rel=1e-4)
    assert _relative_rms(expected, expected, "unet", "y") == 0


@pytest.mark.parametrize(
    ("found", "expected", "said"),
    [
        (torch.ones(2), torch.ones(3), r"of shape \[2\], and not \[3\]"),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0]), "not finite; export again"),
        (torch.tensor([1.0, float("inf")]), torch.tensor([1.0, 2.0]), "not finite; export again"),
        (torch.full((4,), 3.0), torch.arange(4.0), "everywhere the same"),
        (torch.ones(2), torch.zeros(2), "no engine can be compared"),
        (torch.ones(2), torch.full((2,), float("nan")), "no engine can be compared"),
    ],
)
def test_what_cannot_be_parity(found, expected, said):
    with pytest.raises(InputError, match=said):
        _relative_rms(found, expected, "unet", "y")
