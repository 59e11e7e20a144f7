"""Training of a TopK sparse autoencoder (Gao et al., 2024, "Scaling and evaluating sparse autoencoders").

    z = relu(topk(E (x - c) + e, k)),   x̂ = D z + c
    loss = s · mean((x̂ - x)²) + w · aux,   s = 1 / mean((x - mean(x))²) of a sample

aux is the normalised error with which the `aux_k` largest of the dead latents, as a code z' of their own, reconstruct
what the autoencoder left, t = x - x̂, held constant:

    aux = mean((D z' - t)²) / mean((t - mean(t))²),   0 where that is not a number

Means are over tokens and features, those inside a square over tokens. The equations are those of the paper's section 2
and appendix A; what they leave open is taken from its released code: uniform initial weights of bound 1/sqrt(d), the
counting of dead latents before aux is computed. What departs from that code: the input has no norm; E is not scaled up
at the start so that unit inputs come back at unit length, as steps of the same rate would turn it less; the gradient of
aux does not move c as if c were part of D z'; and the columns of D are brought back to unit length after a step, not
before.

The gradient is written out: a token touches k of the m latents, so only the first product is dense. The rest gathers
and adds up rows: 4 k n d multiplications instead of 4 m n d.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bakeout.editor.errors import InputError
from bakeout.editor.sae.model import SparseAutoencoder

SAMPLE = 32_768  # tokens that the start is made from, at most
# Averages each of some fp32 tensors over processes, in place.
Reduce = Callable[[list[Tensor]], None]
# Preactivations that exist at a time: 16 MiB in fp32, which stay in the processor's cache until the largest are found.
_CHUNK = 1 << 22
# Columns whose maximum is looked at first, in `largest`.
_BLOCK = 8
_ROWS = 4096  # points of which the distances are taken at a time
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainingSettings:
    """How an autoencoder is trained; the defaults are SNCE's.

    Attributes:
        latents: m; None is four times the width.
        k: latents of a token that are not zero, at most.
        learning_rate: of Adam, constant.
        epsilon: of Adam.
        batch: tokens of a step, over all processes.
        aux_k: dead latents of a token that aux takes, at most; 0 goes without aux.
        aux_weight: w.
        dead_after: tokens; a latent is dead that was not above `dead_threshold` for the last dead_after / batch steps.
        dead_threshold: see `dead_after`.
        seed: of the initial weights.
        dtype: of the dense products; weights, moments, sums and losses are fp32.
    """

    latents: int | None = None
    k: int = 32
    learning_rate: float = 4e-4
    epsilon: float = 6.25e-10
    batch: int = 4096
    aux_k: int = 256
    aux_weight: float = 1 / 32
    dead_after: int = 10_000_000
    dead_threshold: float = 1e-3
    seed: int = 0
    dtype: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        """Check the values. Raises InputError."""
        least = {"latents": 1, "k": 1, "batch": 1, "aux_k": 0, "dead_after": 1, "seed": 0}
        for name, smallest in least.items():
            value = getattr(self, name)
            if not (type(value) is int and smallest <= value < 2**63) and (name, value) != ("latents", None):
                raise InputError(f"{name} is {value!a:.30}: give a whole number from {smallest} to 2^63 - 1")
        for name in ("learning_rate", "epsilon", "aux_weight", "dead_threshold"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} is {value!a:.20}: give a finite number, 0 or more")
        if self.dtype not in ("fp32", "bf16"):
            raise InputError(f"dtype is {self.dtype!a:.20}: give fp32 or bf16")

    @property
    def dead_steps(self) -> int:
        """After how many steps below the threshold a latent is dead."""
        return max(1, self.dead_after // self.batch)


@dataclass(frozen=True)
class StepResult:
    """What a step found, before it changed the weights, over all processes.

    Attributes:
        numbers: fp32 [5], on the training's device: the five properties. Only reading one waits for the device.
    """

    numbers: Tensor

    @cached_property
    def _values(self) -> list[float]:
        return [float(number) for number in self.numbers.tolist()]

    @property
    def loss(self) -> float:
        """What is minimised: s · mean((x̂ - x)²) + w · aux."""
        return self._values[0]

    @property
    def variance_explained(self) -> float:
        """1 - s · mean((x̂ - x)²): of this batch's error and the sample's variance."""
        return self._values[1]

    @property
    def l0(self) -> float:
        """Latents of a token that are above zero, on average."""
        return self._values[2]

    @property
    def dead_share(self) -> float:
        """Of the latents."""
        return self._values[3]

    @property
    def aux(self) -> float:
        """Without its weight; 0 while no latent is dead."""
        return self._values[4]


class Weights(NamedTuple):
    """What is trained, or a gradient of it; floating point, of one dtype.

    Attributes:
        encoder: [m, d], E.
        encoder_bias: [m], e.
        decoder: [m, d], D transposed: a latent's direction lies in memory in one piece.
        center: [d], c.
    """

    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    center: Tensor


class Forward(NamedTuple):
    """A batch's way through the autoencoder; floating point, but for `indices`.

    Attributes:
        centered: [n, d], x - c.
        indices: int64 [n, k], the latents of each token's largest preactivations, in no order.
        activations: [n, k], z at those, a leaf of the graph of `decoded`.
        decoded: [n, d], D z.
        residual: [n, d], x̂ - x.
    """

    centered: Tensor
    indices: Tensor
    activations: Tensor
    decoded: Tensor
    residual: Tensor


class Trainer:
    """Trains one autoencoder, batch by batch.

    Attributes:
        settings: how.
        site: of the autoencoder.
        scale: s.
        weights: fp32, on the device.
        idle: int64 [m]: for how many steps each latent was not above the threshold.
        steps: made so far.
    """

    def __init__(
        self, settings: TrainingSettings, site: str, sample: Tensor, device: torch.device | str = "cpu"
    ) -> None:
        """Start from a sample: c at its geometric median, s from its variance.

        Args:
            settings: how to train.
            site: whose output the activations are.
            sample: floating point [tokens, d], of which the first `SAMPLE` count; the same in every process.
            device: to train on.

        Raises:
            InputError: k above m, or a sample that is empty, does not vary, or is not finite.
        """
        sample = sample[:SAMPLE].to(device, torch.float32)
        if sample.ndim != 2:
            raise ValueError(f"the sample is {list(sample.shape)}, not [tokens, d]")
        variance = float(sample.double().var(0, correction=0).mean()) if sample.numel() else 0.0
        if not 0 < variance < math.inf:
            raise InputError(
                "the activations to start from do not vary or are not finite; give more prompts, and check the model"
            )
        width = sample.shape[1]
        latents = settings.latents or 4 * width
        if settings.k > latents:
            raise InputError(f"k is {settings.k} and there are {latents} latents: give a smaller k or more latents")
        self.settings = settings
        self.site = site
        self.scale = 1 / variance
        self.weights = initial_weights(geometric_median(sample).float(), latents, settings.seed)
        self.idle = torch.zeros(latents, dtype=torch.int64, device=device)
        self.steps = 0
        self._optimizer = torch.optim.Adam(
            self.weights, lr=settings.learning_rate, betas=(0.9, 0.999), eps=settings.epsilon, fused=True
        )

    @torch.no_grad()
    def step(self, x: Tensor, reduce: Reduce | None = None) -> StepResult:
        """Learn from activations x, floating point [n, d].

        With `reduce`, x is this process's share, as large as every other's, and the step is that of one process on all
        of them: gradients are averaged, and so is what decides on dead latents and normalises aux.
        """
        settings = self.settings
        x = x.to(self.idle.device, torch.float32)
        passed = forward(self.weights, x, settings.k, _DTYPES[settings.dtype])
        fired = torch.zeros_like(self.weights.encoder_bias).scatter_reduce_(
            0, passed.indices.flatten(), (passed.activations > settings.dead_threshold).float().flatten(), "amax"
        )
        mean, square = passed.residual.mean(0), passed.residual.square().mean()
        l0 = (passed.activations > 0).sum() / len(x)
        if reduce is not None:
            reduce([fired, mean, square, l0])
        self.idle.add_(1).masked_fill_(fired > 0, 0)
        dead = self.idle >= settings.dead_steps
        gradient = reconstruction_gradient(self.weights, passed, self.scale)
        self.steps += 1
        aux = torch.zeros_like(square)
        # Before, no latent can be dead, and to ask would make the host wait for the device.
        if self.steps >= settings.dead_steps and settings.aux_k and dead.any():
            aux = self._add_auxiliary(gradient, passed, dead.nonzero()[:, 0], square - mean.square().mean())
        if reduce is not None:
            reduce([*gradient, aux])
        self._update(gradient)
        error = self.scale * square
        return StepResult(torch.stack([error + settings.aux_weight * aux, 1 - error, l0, dead.float().mean(), aux]))

    def _add_auxiliary(self, gradient: Weights, passed: Forward, dead: Tensor, spread: Tensor) -> Tensor:
        """Add the gradient of w · aux; returns aux."""
        settings = self.settings
        aux, of_dead = auxiliary(self.weights, passed, dead, settings.aux_k, spread, _DTYPES[settings.dtype])
        for total, part in zip(gradient[:3], of_dead[:3], strict=True):
            total.index_add_(0, dead, part, alpha=settings.aux_weight)
        gradient.center.add_(of_dead.center, alpha=settings.aux_weight)
        return aux

    def _update(self, gradient: Weights) -> None:
        """A step of Adam in which the columns of D turn, but keep unit length."""
        decoder = self.weights.decoder
        gradient.decoder.sub_((gradient.decoder * decoder).sum(1, keepdim=True) * decoder)
        for weight, its_gradient in zip(self.weights, gradient, strict=True):
            weight.grad = its_gradient
        self._optimizer.step()
        self._optimizer.zero_grad()
        decoder.div_(decoder.norm(dim=1, keepdim=True))

    def autoencoder(self) -> SparseAutoencoder:
        """What was learnt, in fp32 on the CPU, its columns of unit length.

        Raises:
            InputError: the training diverged.
        """
        encoder, encoder_bias, decoder, center = (weight.cpu().clone() for weight in self.weights)
        if not all(weight.isfinite().all() for weight in (encoder, encoder_bias, decoder, center)):
            raise InputError("the training diverged: its weights are not finite; give a smaller learning rate")
        unit = F.normalize(decoder.double(), dim=1).float().T.contiguous()
        k = self.settings.k
        activation: Literal["topk", "relu"] = "relu" if k == len(encoder) else "topk"
        return SparseAutoencoder(encoder, encoder_bias, unit, center, k, activation, "none", self.site)

    def state_dict(self) -> dict[str, Tensor | int | float]:
        """A copy on the CPU of all that further steps depend on, but for the settings and what they are given."""
        state: dict[str, Tensor | int | float] = {"steps": self.steps, "scale": self.scale, "idle": self.idle}
        for name, weight in self.weights._asdict().items():
            moments = self._optimizer.state.get(weight)
            state[name] = weight
            for moment in _MOMENTS:
                state[f"{name}.{moment}"] = moments[moment] if moments else torch.zeros_like(weight)
        return {name: it.cpu().clone() if isinstance(it, Tensor) else it for name, it in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor | int | float]) -> None:
        """Go on where another training of the same settings stood: the same steps give the same bits.

        Raises:
            InputError: the state is of another training.
        """
        expected = self.state_dict()
        if state.keys() != expected.keys() or any(_kind(state[name]) != _kind(it) for name, it in expected.items()):
            raise InputError("this checkpoint is of a training with other settings; give those, or begin anew")
        given = {name: it.to(self.idle.device) for name, it in state.items() if isinstance(it, Tensor)}
        self.steps, self.scale = int(state["steps"]), float(state["scale"])
        self.idle.copy_(given["idle"])
        optimizer = self._optimizer.state_dict()
        for position, (name, weight) in enumerate(self.weights._asdict().items()):
            weight.copy_(given[name])
            moments = {moment: given[f"{name}.{moment}"].clone() for moment in _MOMENTS}
            optimizer["state"][position] = {"step": torch.tensor(float(self.steps)), **moments}
        self._optimizer.load_state_dict(optimizer)


def forward(weights: Weights, x: Tensor, k: int, dtype: torch.dtype) -> Forward:
    """The autoencoder on x, floating point [n, d], its dense product in `dtype`."""
    centered = x - weights.center
    encoder, bias = weights.encoder.to(dtype), weights.encoder_bias.to(dtype)
    chunks = [
        largest(F.linear(rows.to(dtype), encoder, bias), k)
        for rows in torch.split(centered, max(1, _CHUNK // len(encoder)))
    ]
    indices = torch.cat([chunk[1] for chunk in chunks])
    activations = torch.cat([chunk[0] for chunk in chunks]).to(x.dtype).relu_().requires_grad_()
    with torch.enable_grad():
        decoded = F.embedding_bag(indices, weights.decoder.detach(), per_sample_weights=activations, mode="sum")
    return Forward(centered, indices, activations, decoded, decoded.detach() - centered)


def reconstruction_gradient(weights: Weights, passed: Forward, scale: float) -> Weights:
    """The gradient of scale · mean((x̂ - x)²), the active latents held fixed, as they are almost everywhere."""
    tokens, k = passed.indices.shape
    by_decoded = passed.residual * (2 * scale / passed.residual.numel())
    # Of all products of `by_decoded` and a direction, this computes those of active latents.
    (by_activation,) = torch.autograd.grad(passed.decoded, passed.activations, by_decoded)
    by_activation *= passed.activations > 0

    latents, order = passed.indices.flatten().sort(stable=True)
    starts = torch.searchsorted(latents, torch.arange(len(weights.encoder), device=latents.device))
    token = order // k

    def sum_by_latent(rows: Tensor, factors: Tensor) -> Tensor:
        return F.embedding_bag(token, rows, starts, per_sample_weights=factors.flatten()[order], mode="sum")

    bias = sum_by_latent(by_decoded.new_ones(tokens, 1), by_activation)[:, 0]
    return Weights(
        encoder=sum_by_latent(passed.centered, by_activation),
        encoder_bias=bias,
        decoder=sum_by_latent(by_decoded, passed.activations.detach()),
        center=by_decoded.sum(0) - bias @ weights.encoder,
    )


def auxiliary(
    weights: Weights, passed: Forward, dead: Tensor, k: int, spread: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Weights]:
    """The loss aux and its gradient; of E, e and D only what belongs to the dead latents, in their order.

    Few latents are dead, or most of those that are among the k: dense products pay.

    Args:
        weights: of the autoencoder.
        passed: the batch's way through it.
        dead: int64 [latents], which are dead.
        k: how many of them a token takes, at most.
        spread: floating point [], mean((t - mean(t))²).
        dtype: of the products.
    """

    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a.to(dtype) @ b.to(dtype)).to(a.dtype)

    encoder, decoder = weights.encoder[dead], weights.decoder[dead]
    code = (product(passed.centered, encoder.T) + weights.encoder_bias[dead]).relu_()
    if k < len(dead):
        values, columns = largest(code, k)
        code = torch.zeros_like(code).scatter_(1, columns, values)
    error = product(code, decoder) + passed.residual
    square = error.square().mean()
    # A spread that is all rounding is none: aux would be no number.
    varies = spread > torch.finfo(spread.dtype).eps * square
    share = torch.where(varies, 1 / spread, 0.0)
    by_error = error * (2 / error.numel() * share)
    by_code = product(by_error, decoder.T) * (code > 0)
    bias = by_code.sum(0)
    gradient = Weights(product(by_code.T, passed.centered), bias, product(code.T, by_error), -(bias @ encoder))
    return square * share, gradient


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their columns, both [n, k] and in no order; of equal ones any.

    A block whose maximum is not among the k largest maxima holds none of them: k other values are as large. So one
    pass finds the maxima, and only k blocks of each row are searched.

    Args:
        values: floating point [n, m].
        k: at most m.
    """
    width = values.shape[1]
    blocks = width // _BLOCK
    if width % _BLOCK or blocks <= k:
        top = values.topk(k, sorted=False)
        return top.values, top.indices
    # A block is every `blocks`-th column, so that its maximum is one of whole vectors.
    chosen = values.view(-1, _BLOCK, blocks).amax(1).topk(k, sorted=False).indices
    columns = (chosen[:, None] + torch.arange(0, width, blocks, device=values.device)[:, None]).flatten(1)
    top = values.gather(1, columns).topk(k, sorted=False)
    return top.values, columns.gather(1, top.indices)


def initial_weights(center: Tensor, latents: int, seed: int) -> Weights:
    """E uniform within 1 / sqrt(d), D its transpose with columns of unit length, e zero; the same on any device.

    Args:
        center: fp32 [d], c.
        latents: m.
        seed: of the random numbers.
    """
    width, device = len(center), center.device
    generator = torch.Generator().manual_seed(seed)
    encoder = torch.empty(latents, width).uniform_(-(width**-0.5), width**-0.5, generator=generator)
    decoder = F.normalize(encoder, dim=1)
    return Weights(encoder.to(device), torch.zeros(latents, device=device), decoder.to(device), center.clone())


def geometric_median(points: Tensor, tolerance: float = 1e-6, iterations: int = 1000) -> Tensor:
    """The point with the least sum of distances to all (Weiszfeld's algorithm, from their mean).

    Args:
        points: floating point [n, d], finite, not all equal.
        tolerance: the last move, as a share of the mean distance.
        iterations: at most.

    Returns:
        fp64 [d].
    """
    chunks = torch.split(points, _ROWS)
    median = points.double().mean(0)
    for _ in range(iterations):
        distances = torch.cat([(chunk - median).norm(dim=1) for chunk in chunks])
        near = tolerance * distances.mean()
        # A point that the median comes to lie on would weigh without end.
        shares = F.normalize(1 / distances.clamp(min=near), p=1, dim=0)
        moved = torch.stack(
            [share @ chunk.double() for share, chunk in zip(torch.split(shares, _ROWS), chunks, strict=True)]
        )
        previous, median = median, moved.sum(0)
        if (median - previous).norm() <= near:
            break
    return median


def _kind(value: Tensor | float) -> object:
    return (value.shape, value.dtype) if isinstance(value, Tensor) else type(value)
