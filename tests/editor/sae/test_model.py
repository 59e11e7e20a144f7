"""A sparse autoencoder: its function derived a second time, its file, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bakeout.editor.errors import InputError
from bakeout.editor.sae.model import SparseAutoencoder, fidelity, keep_largest

KEY = "bakeout.sae"
WIDTH, LATENTS = 6, 20


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def autoencoder(dtype: torch.dtype = torch.float64, **changes: Any) -> SparseAutoencoder:
    given = {
        "encoder": numbers(LATENTS, WIDTH, seed=1, dtype=dtype), "encoder_bias": numbers(LATENTS, seed=2, dtype=dtype),
        "decoder": numbers(WIDTH, LATENTS, seed=3, dtype=dtype), "center": numbers(WIDTH, seed=4, dtype=dtype),
        "k": 4, "activation": "topk", "input_norm": "none", "site": "text_encoder.layer.9", **changes,
    }  # fmt: skip
    return SparseAutoencoder(**given)


def naive(it: SparseAutoencoder, token: list[float]) -> tuple[list[float], list[float]]:
    """The latents and the reconstruction of one token, number by number."""
    d = len(token)
    mean = sum(token) / d
    shift, scale = {
        "none": (0.0, 1.0),
        "layer_norm": (mean, math.sqrt(sum((x - mean) ** 2 for x in token) / (d - 1)) + 1e-5),
        "constant_norm": (0.0, math.sqrt(sum(x * x for x in token)) / math.sqrt(d)),
    }[it.input_norm]
    e, bias, decoder, center = (
        np.array(tensor.tolist()) for tensor in (it.encoder, it.encoder_bias, it.decoder, it.center)
    )
    before = [
        sum(e[i][j] * ((token[j] - shift) / scale - center[j]) for j in range(d)) + bias[i] for i in range(len(bias))
    ]
    # Python's sort is stable, so of equal ones the lower index comes first.
    kept = sorted(range(len(before)), key=lambda i: -before[i])[: it.k]
    z = [max(before[i], 0.0) if i in kept else 0.0 for i in range(len(before))]
    x = [scale * (sum(decoder[j][i] * z[i] for i in range(len(z))) + center[j]) + shift for j in range(d)]
    return z, x


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm"])
@pytest.mark.parametrize(("k", "activation"), [(4, "topk"), (1, "topk"), (LATENTS, "relu")])
def test_latents_and_reconstruction_are_those_of_the_formula(norm, k, activation):
    it = autoencoder(input_norm=norm, k=k, activation=activation)
    x = numbers(3, 5, WIDTH, seed=9) * 3 + 1
    expected = [[naive(it, token) for token in row] for row in x.tolist()]
    z, back = (torch.tensor([[of_token[part] for of_token in row] for row in expected]) for part in (0, 1))
    assert torch.equal(it.encode(x) > 0, z > 0)
    assert distance(it.encode(x), z) < 1e-13
    assert distance(it.reconstruct(x), back) < 1e-13
    others = {"none", "layer_norm", "constant_norm"} - {norm}
    assert all(distance(replace(it, input_norm=other).reconstruct(x), back) > 0.01 for other in others)


def test_of_equal_preactivations_the_lower_index_counts():
    values = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0], [5.0, 4.0, 4.0, 4.0, 9.0]])
    assert keep_largest(values, 2).tolist() == [[0, 3, 3, 0, 0], [0] * 5, [5, 0, 0, 0, 9]]
    assert keep_largest(values, 3).tolist() == [[0, 3, 3, 0, 3], [0] * 5, [5, 4, 0, 0, 9]]
    assert torch.equal(keep_largest(values, 5), values)


def test_as_many_latents_as_k_at_most():
    it = autoencoder(encoder_bias=numbers(LATENTS, seed=2) - 3)
    active = (it.encode(numbers(500, WIDTH)) > 0).sum(-1)
    assert int(active.max()) == it.k
    assert int(active.min()) < it.k, "a negative activation must not count"


def test_fidelity_is_what_it_says():
    it, x = autoencoder(), numbers(333, WIDTH, seed=5)
    found = fidelity(it, x, batch=50)
    error = float((it.reconstruct(x) - x).square().sum())
    spread = float((x - x.mean(0)).square().sum())
    z = it.encode(x)
    assert found.variance_explained == pytest.approx(1 - error / spread, rel=1e-12)
    assert found.l0 == pytest.approx(float((z > 0).sum()) / 333)
    assert found.dead_share == int((z.sum(0) == 0).sum()) / LATENTS
    assert found.tokens == 333
    with pytest.raises(ValueError, match="do not vary"):
        fidelity(it, torch.ones(4, WIDTH, dtype=torch.float64))


def test_a_perfect_autoencoder_explains_everything_and_a_silent_one_nothing():
    same = torch.eye(WIDTH, dtype=torch.float64)
    whole = autoencoder(
        encoder=torch.cat([same, -same]), encoder_bias=torch.zeros(12).double(),
        decoder=torch.cat([same, -same], dim=1), center=torch.zeros(WIDTH).double(), k=12, activation="relu",
    )  # fmt: skip
    x = numbers(50, WIDTH)
    assert fidelity(whole, x).variance_explained == pytest.approx(1)
    silent = replace(whole, encoder_bias=torch.full((12,), -100.0).double(), center=x.mean(0))
    measured = fidelity(silent, x)
    assert (measured.variance_explained, measured.l0, measured.dead_share) == (pytest.approx(0), 0, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_file_keeps_every_bit(tmp_path, dtype):
    it = autoencoder(dtype, input_norm="layer_norm", source_format="openai", site="text_encoder_2.layer.26")
    path = tmp_path / "sae.safetensors"
    it.save(path)
    back = SparseAutoencoder.load(path)
    for name, value in vars(it).items():
        found = getattr(back, name)
        assert torch.equal(found, value) and found.dtype == value.dtype if isinstance(value, torch.Tensor) else True
    assert (back.k, back.activation, back.input_norm, back.site, back.source_format, back.digest) == (
        4, "topk", "layer_norm", "text_encoder_2.layer.26", "openai", it.digest,
    )  # fmt: skip
    assert path.read_bytes() == back.to_bytes()
    assert set(load_file(path)) == {"W_enc", "b_enc", "W_dec", "b_pre"}


def test_the_digest_is_of_what_it_computes():
    it = autoencoder(torch.float32)
    assert it.digest == replace(it, site="text_encoder.layer.3", source_format="x").digest
    changed = it.decoder.clone()
    changed[0, 0] += 1
    others = [replace(it, k=5), replace(it, input_norm="layer_norm"), replace(it, decoder=changed)]
    assert len({it.digest, *(other.digest for other in others)}) == 4


def test_it_moves_as_a_whole():
    it = autoencoder().to(torch.float32)
    assert {it.encoder.dtype, it.encoder_bias.dtype, it.decoder.dtype, it.center.dtype} == {torch.float32}
    assert repr(it) == "SparseAutoencoder text_encoder.layer.9: 6 → 20, TopK 4"
    assert "ReLU" in repr(replace(it, k=LATENTS, activation="relu"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder": numbers(LATENTS)}, "W_enc is"),
        ({"decoder": numbers(LATENTS, WIDTH)}, "W_dec is"),
        ({"encoder_bias": numbers(WIDTH)}, "b_enc is"),
        ({"center": numbers(WIDTH) / 0}, "b_pre is not finite"),
        ({"center": torch.zeros(WIDTH, dtype=torch.int64)}, "b_pre is not finite"),
        ({"k": 0}, "k is 0"),
        ({"k": LATENTS + 1}, "k is 21"),
        ({"k": 4.0}, "k is 4.0"),
        ({"k": True}, "k is True"),
        ({"activation": "relu"}, "and that for ReLU"),
        ({"activation": "jumprelu"}, "not known"),
        ({"input_norm": "batch_norm"}, "not known"),
        ({"site": 9}, "9 is not the name of a site"),
        # What a terminal obeys, or that forges a line of a report.
        ({"site": "text_encoder.layer.9\x1b[2J"}, r"\\x1b\[2J' is not the name of a site"),
        ({"site": "text_encoder.layer.9\n"}, "is not the name of a site"),
        ({"source_format": "bakeout\x1b[2J"}, r"\\x1b\[2J' is not the name of a format"),
        ({"source_format": None}, "None is not the name of a format"),
    ],
)
def test_what_means_nothing_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        autoencoder(**changes)


def rewritten(path: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    """The file with other tensors, and with other JSON; a value of None takes a key out."""
    it = autoencoder(torch.float32)
    it.save(path)
    said = {
        "version": 1,
        "k": 4,
        "activation": "topk",
        "input_norm": "none",
        "site": "a",
        "source_format": "b",
        **changes,
    }
    stored = load_file(path) | (tensors or {})
    save_file(stored, path, {KEY: json.dumps({key: value for key, value in said.items() if value is not None})})
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "is of version 2 and this bakeout reads 1"),
        ({"version": True}, "is of version True"),
        ({"version": None}, "not a whole sparse autoencoder"),
        ({"k": None}, "not a whole sparse autoencoder"),
        ({"k": 21}, "k is 21"),
        ({"eval": "1"}, "not a whole sparse autoencoder"),
        ({"activation": None}, "not a whole sparse autoencoder"),
        ({"tensors": {"W_enc": torch.zeros(3, 3)}}, "b_enc is"),
        ({"tensors": {"more": torch.zeros(3)}}, "its tensors are others"),
        ({"tensors": {"W_dec": torch.full((WIDTH, LATENTS), math.nan)}}, "W_dec is not finite"),
    ],
)
def test_a_file_that_lies_is_refused_in_a_sentence(tmp_path, changes, words):
    path = rewritten(tmp_path / "sae.safetensors", **changes)
    with pytest.raises(InputError, match=words) as error:
        SparseAutoencoder.load(path)
    assert "\n" not in str(error.value)
    assert SparseAutoencoder.load(rewritten(path)).k == 4


def test_another_file_is_no_autoencoder(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"W_enc": torch.zeros(2, 2)}, path)
    with pytest.raises(InputError, match="bakeout sae import"):
        SparseAutoencoder.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(InputError):
        SparseAutoencoder.load(path)
    with pytest.raises(InputError):
        SparseAutoencoder.load(tmp_path / "none.safetensors")
