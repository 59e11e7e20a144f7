"""Training against the loss written out naively and differentiated by autograd, in fp64."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import torch as safetensors_torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional as F

from bakeout.editor.errors import InputError
from bakeout.editor.sae import train
from bakeout.editor.sae.model import fidelity
from bakeout.editor.sae.train import Trainer, TrainingSettings

SITE = "text_encoder.layer.9"
NAMES = ("encoder", "encoder_bias", "decoder", "center")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def activations(tokens: int, seed: int = 1, width: int = 24) -> Tensor:
    """Correlated, off centre, and with a feature much larger than the rest, as a text encoder's are."""
    mixing = random(width, width, seed=99)
    x = random(tokens, width, seed=seed) @ mixing + 2 * random(width, seed=98)
    x[:, 3] *= 20
    return x.float()


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def naive_loss(
    weights: Sequence[Tensor], x: Tensor, k: int, scale: float, dead: Tensor, aux_k: int, aux_weight: float = 1 / 32
) -> Tensor:
    """The loss of the module's docstring, `decoder` [m, d], all dense."""
    encoder, encoder_bias, decoder, center = weights
    pre = (x - center) @ encoder.T + encoder_bias
    top = pre.topk(k)
    z = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    reconstructed = z @ decoder + center
    loss = scale * ((reconstructed - x) ** 2).mean()
    if not len(dead):
        return loss
    left = (x - reconstructed).detach()
    top = pre[:, dead].topk(min(aux_k, len(dead)))
    code = torch.zeros_like(pre[:, dead]).scatter(1, top.indices, top.values.relu())
    aux = ((code @ decoder[dead] - left) ** 2).mean() / ((left - left.mean(0)) ** 2).mean()
    return loss + aux_weight * aux.nan_to_num(0)


def weights_of(width: int = 24, latents: int = 96) -> train.Weights:
    return train.Weights(
        random(latents, width, seed=2) / 5, random(latents, seed=3) / 5,
        F.normalize(random(latents, width, seed=4), dim=1), random(width, seed=5),
    )  # fmt: skip


def gradients(weights: train.Weights, x: Tensor, k: int, scale: float, dead: Tensor, aux_k: int) -> train.Weights:
    passed = train.forward(weights, x, k, torch.float64)
    total, aux_weight = train.reconstruction_gradient(weights, passed, scale), 1 / 32
    if len(dead):
        spread = passed.residual.var(0, correction=0).mean()
        _, of_dead = train.auxiliary(weights, passed, dead, aux_k, spread, torch.float64)
        for name in NAMES[:3]:
            getattr(total, name)[dead] += aux_weight * getattr(of_dead, name)
        total.center.add_(of_dead.center, alpha=aux_weight)
    return total


def naive_gradients(weights: Sequence[Tensor], *given: Any) -> Sequence[Tensor]:
    leaves = [weight.clone().requires_grad_() for weight in weights]
    return torch.autograd.grad(naive_loss(leaves, *given), leaves)


@pytest.mark.parametrize("k", [5, 12, 40, 96], ids="k={}".format)
@pytest.mark.parametrize(
    ("dead", "aux_k"), [((), 0), ((1, 30, 77), 8), (tuple(range(10, 60)), 8)], ids=["none dead", "few", "many"]
)
def test_the_gradient_is_that_of_the_naive_loss(k: int, dead: Sequence[int], aux_k: int) -> None:
    weights, x = weights_of(), random(300, 24, seed=6)
    given = (x, k, 0.7, torch.tensor(dead, dtype=torch.int64), aux_k)
    ours = gradients(weights, *given)
    for name, actual, expected in zip(NAMES, ours, naive_gradients(weights, *given), strict=True):
        assert relative(actual, expected) < 1e-10, name
    if dead:
        without = gradients(weights, x, k, 0.7, torch.empty(0), 0)
        assert all(relative(one, other) > 1e-4 for one, other in zip(without, ours, strict=True))


def test_chunks_of_preactivations_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, x = weights_of(), random(300, 24, seed=6)
    whole = train.forward(weights, x, 5, torch.float64)
    monkeypatch.setattr(train, "_CHUNK", 96 * 7)
    chunked = train.forward(weights, x, 5, torch.float64)
    assert torch.equal(whole.indices.sort(1).values, chunked.indices.sort(1).values)
    assert relative(chunked.residual, whole.residual) < 1e-12


@pytest.mark.parametrize(("width", "k"), [(96, 5), (96, 11), (96, 12), (97, 5), (16, 1), (8, 8), (3072, 32)])
def test_largest_finds_the_largest(width: int, k: int) -> None:
    for values in (random(64, width), random(64, width).round(), torch.zeros(64, width), -random(64, width).abs()):
        found, columns = train.largest(values, k)
        assert torch.equal(found.sort(1).values, values.sort(1).values[:, -k:])
        assert torch.equal(values.gather(1, columns), found)
        assert all(len(set(row)) == k for row in columns.tolist())


def test_an_aux_that_is_no_number_counts_as_zero() -> None:
    weights = weights_of()
    x = weights.center.repeat(50, 1)
    weights = weights._replace(encoder_bias=torch.full_like(weights.encoder_bias, -1.0))
    passed = train.forward(weights, x, 5, torch.float64)
    assert not passed.residual.any()
    dead = torch.arange(20)
    zero = torch.zeros((), dtype=torch.float64)
    aux, gradient = train.auxiliary(weights, passed, dead, 8, zero, torch.float64)
    assert float(aux) == 0
    assert not any(part.any() for part in gradient)

    passed = passed._replace(residual=random(50, 24, seed=7))
    aux, gradient = train.auxiliary(weights, passed, dead, 8, zero + 1, torch.float64)
    assert float(aux) > 0


def test_the_center_starts_at_the_geometric_median() -> None:
    points = random(200, 5, seed=8).exp()
    best = minimize(lambda at: (points - torch.from_numpy(at)).norm(dim=1).sum().item(), points.mean(0), tol=1e-12)
    scale = points.std(0).norm()
    assert (train.geometric_median(points) - torch.from_numpy(best.x)).norm() < 1e-4 * scale
    assert (points.mean(0) - torch.from_numpy(best.x)).norm() > 0.1 * scale


def test_a_geometric_median_may_be_one_of_the_points() -> None:
    most = random(5, seed=9)
    points = torch.cat([most.repeat(60, 1), random(40, 5, seed=10)])
    assert (train.geometric_median(points) - most).norm() < 1e-5


def test_the_start() -> None:
    x = activations(4000)
    trainer = Trainer(TrainingSettings(latents=80, k=7), SITE, x)
    encoder, bias, decoder, center = (it.double() for it in trainer.weights)
    assert relative(decoder, F.normalize(encoder, dim=1)) < 1e-6
    assert not bias.any()
    assert relative(center, train.geometric_median(x)) < 1e-6
    spread = ((x.double() - x.double().mean(0)) ** 2).mean()
    assert math.isclose(trainer.scale, 1 / float(spread), rel_tol=1e-6)
    # Uniform numbers within a bound have a standard deviation of bound / sqrt(3).
    assert 0.98 * 24**-0.5 < encoder.abs().max() < 24**-0.5
    assert 1.6 < encoder.abs().max() / encoder.std() < 1.8
    assert Trainer(TrainingSettings(), SITE, x).weights.encoder.shape == (96, 24)


SETTINGS = TrainingSettings(latents=96, k=5, batch=128, aux_k=8, dead_after=3 * 128, learning_rate=1e-3)


class NaiveTraining:
    """In fp64, its gradients by autograd and Adam written out; begins where `trainer` does."""

    def __init__(
        self,
        trainer: Trainer,
        *,
        tangent: bool = True,
        normed: bool = True,
        aux_weight: float = 1 / 32,
        epsilon: float = 6.25e-10,
    ) -> None:
        self.weights = [weight.double() for weight in trainer.weights]
        self.moments = [(torch.zeros_like(it), torch.zeros_like(it)) for it in self.weights]
        self.scale, self.settings = trainer.scale, trainer.settings
        self.tangent, self.normed, self.aux_weight, self.epsilon = tangent, normed, aux_weight, epsilon
        self.steps = 0
        self.last_above = [0] * len(self.weights[0])

    def step(self, x: Tensor) -> None:
        x, settings = x.double(), self.settings
        self.steps += 1
        encoder, bias, _, center = self.weights
        top = ((x - center) @ encoder.T + bias).topk(settings.k)
        for latent in top.indices[top.values > settings.dead_threshold].tolist():
            self.last_above[latent] = self.steps
        self.dead = [i for i, last in enumerate(self.last_above) if self.steps - last >= 3]
        dead = torch.tensor(self.dead, dtype=torch.int64)
        given = (x, settings.k, self.scale, dead, settings.aux_k, self.aux_weight)
        self.loss = float(naive_loss(self.weights, *given))
        grads = list(naive_gradients(self.weights, *given))
        if self.tangent:
            decoder = self.weights[2]
            grads[2] = grads[2] - (grads[2] * decoder).sum(1, keepdim=True) * decoder
        rate = settings.learning_rate / (1 - 0.9**self.steps)
        for index, (grad, (mean, square)) in enumerate(zip(grads, self.moments, strict=True)):
            mean.copy_(0.9 * mean + 0.1 * grad)
            square.copy_(0.999 * square + 0.001 * grad**2)
            unbiased = (square / (1 - 0.999**self.steps)).sqrt()
            self.weights[index] = self.weights[index] - rate * mean / (unbiased + self.epsilon)
        if self.normed:
            self.weights[2] = F.normalize(self.weights[2], dim=1)


def distance(trainer: Trainer, naive: NaiveTraining, start: Sequence[Tensor]) -> list[float]:
    """Of each weight, relative to how far it moved."""
    return [
        relative(actual - begin, expected - begin.double())
        for actual, expected, begin in zip(trainer.weights, naive.weights, start, strict=True)
    ]


def test_steps_are_those_of_a_naive_training() -> None:
    sample = activations(2000)
    trainer = Trainer(SETTINGS, SITE, sample)
    start = [weight.clone() for weight in trainer.weights]
    naive = NaiveTraining(trainer)
    wrong = {
        name: NaiveTraining(trainer, **{name: value})
        for name, value in {"tangent": False, "normed": False, "aux_weight": 0.0, "epsilon": 1e-3}.items()
    }
    saw_dead = False
    for seed in range(12):
        x = activations(128, seed=100 + seed)
        result = trainer.step(x)
        for training in (naive, *wrong.values()):
            training.step(x)
        assert math.isclose(result.loss, naive.loss, rel_tol=1e-5)
        assert math.isclose(result.dead_share, len(naive.dead) / 96, rel_tol=1e-6)
        assert math.isclose(result.loss, 1 - result.variance_explained + result.aux / 32, rel_tol=1e-5)
        saw_dead |= len(naive.dead) > SETTINGS.aux_k
        norms = trainer.weights.decoder.double().norm(dim=1)
        assert (norms - 1).abs().max() < 1e-6
    assert saw_dead
    right = max(distance(trainer, naive, start))
    assert right < 1e-3
    for name, training in wrong.items():
        assert max(distance(trainer, training, start)) > 10 * right, name


def test_the_gradient_along_a_column_of_the_decoder_is_removed() -> None:
    trainer = Trainer(SETTINGS, SITE, activations(2000))
    decoder = trainer.weights.decoder.clone()
    trainer.step(activations(128))
    moment = trainer.state_dict()["decoder.exp_avg"]
    active = moment.norm(dim=1) > 0
    assert active.sum() > 20
    along = (moment * decoder).sum(1)[active] / moment.norm(dim=1)[active]
    assert along.abs().max() < 1e-5


@pytest.mark.parametrize("threshold", [1e-3, 20.0])
def test_dead_latents_are_those_below_the_threshold_for_as_many_steps_as_said(threshold: float) -> None:
    settings = TrainingSettings(
        latents=96, k=5, batch=10, aux_k=0, dead_after=45, learning_rate=0.0, dead_threshold=threshold
    )
    assert settings.dead_steps == 4
    trainer = Trainer(settings, SITE, activations(2000))
    autoencoder = trainer.autoencoder()
    above, shares = [], []
    for seed in range(12):
        x = activations(10, seed=seed)
        above.append((autoencoder.encode(x) > threshold).any(0))
        dead = ~torch.stack(above[-4:]).any(0) if seed >= 3 else torch.zeros(96, dtype=torch.bool)
        result = trainer.step(x)
        shares.append(result.dead_share)
        assert math.isclose(result.dead_share, float(dead.double().mean()), rel_tol=1e-6)
        assert math.isclose(result.l0, float((autoencoder.encode(x) > 0).sum(1).double().mean()), rel_tol=1e-6)
    assert not any(shares[:3])
    assert all(0 < share < 1 for share in shares[3:])
    assert len(set(shares)) > 3


def train_on(trainer: Trainer, seeds: Iterable[int]) -> Trainer:
    for seed in seeds:
        trainer.step(activations(128, seed=seed))
    return trainer


def same_bits(one: Trainer, other: Trainer) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(
        torch.equal(it, b[name]) if isinstance(it, torch.Tensor) else it == b[name] for name, it in a.items()
    )


@pytest.mark.parametrize("after", [0, 5])
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, after: int) -> None:
    whole = train_on(Trainer(SETTINGS, SITE, activations(2000)), range(10))
    state = train_on(Trainer(SETTINGS, SITE, activations(2000)), range(after)).state_dict()
    tensors = {name: it for name, it in state.items() if isinstance(it, torch.Tensor)}
    safetensors_torch.save_file(tensors, tmp_path / "state.safetensors")
    numbers = json.dumps({name: it for name, it in state.items() if name not in tensors})

    resumed = Trainer(SETTINGS, SITE, activations(500, seed=77))
    resumed.load_state_dict({**safetensors_torch.load_file(tmp_path / "state.safetensors"), **json.loads(numbers)})
    train_on(resumed, range(after, 10))
    assert same_bits(resumed, whole)
    assert any(resumed.idle >= SETTINGS.dead_steps)
    if after:
        forgetful = Trainer(SETTINGS, SITE, activations(2000))
        forgetful.load_state_dict({**state, "encoder.exp_avg_sq": torch.zeros(96, 24)})
        assert not same_bits(train_on(forgetful, range(after, 10)), whole)


def test_a_state_is_a_copy() -> None:
    trainer = Trainer(SETTINGS, SITE, activations(2000))
    state = train_on(trainer, range(3)).state_dict()
    kept = {name: it.clone() for name, it in state.items() if isinstance(it, torch.Tensor)}
    other = Trainer(SETTINGS, SITE, activations(2000))
    other.load_state_dict(state)
    train_on(trainer, range(3))
    train_on(other, range(3))
    assert all(torch.equal(it, state[name]) for name, it in kept.items())


def test_the_seed_decides_on_the_start() -> None:
    def encoder(seed: int) -> Tensor:
        return Trainer(TrainingSettings(seed=seed), SITE, activations(500)).weights.encoder

    assert torch.equal(encoder(0), encoder(0))
    assert not torch.equal(encoder(0), encoder(1))


def in_two_processes(trainers: Sequence[Trainer], shares: Sequence[Tensor], *, averaged: bool = True) -> None:
    """A step of each on its share; threads stand for processes."""
    barrier = threading.Barrier(2)
    tables: list[list[Tensor]] = [[], []]

    def run(index: int) -> None:
        def average(tensors: list[Tensor]) -> None:
            tables[index] = [tensor.clone() for tensor in tensors]
            barrier.wait()
            for tensor, one, other in zip(tensors, *tables, strict=True):
                tensor.copy_((one + other) / 2)
            barrier.wait()

        trainers[index].step(shares[index], reduce=average if averaged else None)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)


def test_several_processes_make_the_step_of_one() -> None:
    alone = Trainer(SETTINGS, SITE, activations(2000))
    start = [weight.clone() for weight in alone.weights]
    together, apart = ([Trainer(SETTINGS, SITE, activations(2000)) for _ in range(2)] for _ in range(2))
    for seed in range(8):
        x = activations(128, seed=seed)
        result = alone.step(x)
        in_two_processes(together, x.chunk(2))
        in_two_processes(apart, x.chunk(2), averaged=False)
    assert result.aux > 0
    assert same_bits(*together)
    assert torch.equal(together[0].idle, alone.idle)

    def moved(trainer: Trainer) -> Tensor:
        return torch.cat([(it - begin).flatten() for it, begin in zip(trainer.weights, start, strict=True)])

    assert relative(moved(together[0]), moved(alone)) < 1e-3
    assert relative(moved(apart[0]), moved(alone)) > 0.05


def test_the_autoencoder_is_what_was_trained() -> None:
    trainer = train_on(Trainer(SETTINGS, SITE, activations(2000)), range(20))
    autoencoder = trainer.autoencoder()
    assert (autoencoder.k, autoencoder.activation, autoencoder.input_norm) == (5, "topk", "none")
    assert (autoencoder.site, autoencoder.source_format) == (SITE, "bakeout")
    assert autoencoder.decoder.dtype == torch.float32
    assert (autoencoder.decoder.double().norm(dim=0) - 1).abs().max() < 1e-7
    x = activations(128, seed=50)
    error = float((autoencoder.reconstruct(x) - x).double().square().mean())
    assert math.isclose(trainer.step(x).variance_explained, 1 - trainer.scale * error, rel_tol=1e-4)
    all_latents = Trainer(TrainingSettings(latents=30, k=30), SITE, activations(500)).autoencoder()
    assert (all_latents.activation, all_latents.k) == ("relu", 30)


def test_bf16_rounds_the_products_and_little_else() -> None:
    settings = {"latents": 96, "k": 5, "batch": 128, "aux_k": 8, "dead_after": 384, "learning_rate": 1e-3}
    x = activations(2000)
    trained = {
        dtype: train_on(Trainer(TrainingSettings(**settings, dtype=dtype), SITE, x), range(150))
        for dtype in ("fp32", "bf16")
    }
    explained = {dtype: fidelity(it.autoencoder(), x).variance_explained for dtype, it in trained.items()}
    assert all(weight.dtype == torch.float32 for weight in trained["bf16"].weights)
    assert not torch.equal(trained["bf16"].weights.encoder, trained["fp32"].weights.encoder)
    assert explained["fp32"] > 0.5
    assert abs(explained["bf16"] - explained["fp32"]) < 0.01


def features_and_tokens(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens of about 6 of 128 unit features in 64 dimensions, each of a magnitude between 0.5 and 1.5."""
    features = F.normalize(random(128, 64, seed=0, dtype=torch.float32), dim=1)
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(tokens, 128, generator=generator) < 6 / 128
    return features, (present * (0.5 + torch.rand(tokens, 128, generator=generator))) @ features


def test_known_features_are_found() -> None:
    features, sample = features_and_tokens(4096, seed=1)
    settings = TrainingSettings(k=8, batch=512, learning_rate=2e-3, dead_after=100 * 512, aux_k=64)
    trainer = Trainer(settings, SITE, sample)

    def found() -> float:
        return float(((features @ trainer.autoencoder().decoder).amax(1) >= 0.9).double().mean())

    assert found() < 0.05
    for step in range(1000):
        trainer.step(features_and_tokens(512, seed=100 + step)[1])
    assert found() >= 0.95


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": True}, "k is True"),
        ({"latents": 0}, "latents is 0"),
        ({"batch": 2.5}, "batch is 2.5"),
        ({"seed": 2**63}, r"seed is 9223372036854775808: give a whole number from 0 to 2\^63 - 1"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"learning_rate": math.inf}, "learning_rate is inf: give a finite number"),
        ({"aux_weight": -1.0}, "aux_weight is -1.0"),
        ({"dtype": "fp16"}, "give fp32 or bf16"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        TrainingSettings(**settings)


def test_a_start_that_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="a smaller k or more latents"):
        Trainer(TrainingSettings(latents=8, k=9), SITE, activations(50))
    for sample in (torch.empty(0, 4), torch.ones(5, 4), torch.full((5, 4), math.nan)):
        with pytest.raises(InputError, match="do not vary or are not finite"):
            Trainer(TrainingSettings(k=2), SITE, sample)


def test_a_state_of_another_training_is_refused() -> None:
    trainer = Trainer(SETTINGS, SITE, activations(500))
    state = trainer.state_dict()
    wide = Trainer(TrainingSettings(latents=80, k=5), SITE, activations(500)).state_dict()
    part = {name: it for name, it in state.items() if name != "center"}
    for other in (wide, part, {**state, "idle": state["idle"].float()}, {**state, "steps": "3"}, {**state, "more": 1}):
        with pytest.raises(InputError, match="a training with other settings"):
            trainer.load_state_dict(other)
    trainer.load_state_dict(state)


def test_a_training_that_diverged_says_so() -> None:
    trainer = Trainer(SETTINGS, SITE, activations(500))
    trainer.step(torch.full((128, 24), math.inf))
    with pytest.raises(InputError, match="a smaller learning rate"):
        trainer.autoencoder()
