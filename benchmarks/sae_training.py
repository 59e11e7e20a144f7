"""The training of a sparse autoencoder against sae-lens and eai-sparsify, side by side.

Tokens a second, and how much of the variance of held-out tokens each explains after the same tokens in the same order.

    python benchmarks/sae_training.py --environments FOLDER

The two others are driven by their own trainers (`SAETrainer.fit` with `TopKTrainingSAE`; `Trainer.fit` with the loss
fvu), each in a virtual environment of its own, which is made in FOLDER if it is not there. All use Adam at the same
constant rate; start, loss, constraints and everything else are their own. eai-sparsify would let the rate fall to zero
at the end of its data, so its data do not end. Its own choice, signum at its own rate of 1.15e-2, is a variant too, and
so are the sparse activations of sae-lens, and bakeout at a larger rate.

The variants take turns of a few steps. Only the time between receiving a batch and asking for the next counts: with one
thread the processor's, so that other work on the machine counts as little as can be, else the clock's. Only ratios mean
anything.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
PACKAGES = {"bakeout": None, "sae-lens": "sae-lens", "sparsify": "eai-sparsify"}
WIDTH, LATENTS, K, BATCH = 768, 3072, 32, 4096
RATE = 4e-4
FEATURES, FEATURES_PER_TOKEN, NOISE = 2 * LATENTS, 24, 0.02
HELD_OUT = 8  # batches
# Makes of tokens [n, d] what an autoencoder gives back.
Reconstruct = Callable[[Tensor], Tensor]


class Tokens:
    """Sums of few of many features, some far more frequent than others, around a mean, with noise; and the clock.

    The batches depend on their numbers alone.
    """

    def __init__(self, steps: int, steps_a_turn: int, turn_over: Callable[[float], object], wall: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.features = F.normalize(torch.randn(FEATURES, WIDTH, generator=generator), dim=1)
        self.frequencies = torch.arange(1, FEATURES + 1) ** -0.8
        self.mean = torch.randn(WIDTH, generator=generator) / 4
        self.steps, self.steps_a_turn, self.turn_over = steps, steps_a_turn, turn_over
        self.clock = time.perf_counter if wall else time.process_time

    def batch(self, number: int) -> Tensor:
        """Tokens [BATCH, WIDTH]."""
        generator = torch.Generator().manual_seed(1000 + number)
        drawn = BATCH * FEATURES_PER_TOKEN
        chosen = torch.multinomial(self.frequencies, drawn, replacement=True, generator=generator)
        sizes = 0.5 + torch.rand(drawn, generator=generator)
        shape = (BATCH, FEATURES_PER_TOKEN)
        signal = F.embedding_bag(chosen.view(shape), self.features, per_sample_weights=sizes.view(shape), mode="sum")
        return signal + self.mean + NOISE * torch.randn(BATCH, WIDTH, generator=generator)

    def __iter__(self) -> Iterator[Tensor]:
        """The batches, timing how long each is in use; `turn_over` gets a turn's seconds and waits for its next."""
        seconds = 0.0
        for number in range(self.steps):
            if number % self.steps_a_turn == 0:
                self.turn_over(seconds)
                seconds = 0.0
            batch = self.batch(number)
            begin = self.clock()
            yield batch
            seconds += self.clock() - begin
        self.turn_over(seconds)

    def sample(self) -> Tensor:
        """What bakeout starts from: the first eight batches."""
        return torch.cat([self.batch(number) for number in range(8)])

    def variance_explained(self, reconstruct: Reconstruct) -> float:
        """Of batches that no one trains on."""
        x = torch.cat([self.batch(10**6 + number) for number in range(HELD_OUT)])
        with torch.no_grad():
            error = sum(float((reconstruct(it) - it).double().square().sum()) for it in torch.split(x, BATCH))
        return 1 - error / float((x - x.mean(0)).double().square().sum())


def train_bakeout(tokens: Tokens, **settings: Any) -> Reconstruct:
    """With the defaults of `bakeout sae train`, but for `settings`."""
    from bakeout.editor.sae.train import Trainer, TrainingSettings

    given: dict[str, Any] = {"latents": LATENTS, "k": K, "learning_rate": RATE, "batch": BATCH} | settings
    trainer = Trainer(TrainingSettings(**given), "text_encoder.layer.9", tokens.sample())
    for x in tokens:
        trainer.step(x)
    return trainer.autoencoder().reconstruct


def train_sae_lens(tokens: Tokens, sparse: bool) -> Reconstruct:
    """With the defaults of its classes, but for the sizes and the rate.

    Sparse activations need `rescale_acts_by_decoder_norm` off: together they fail in torch 2.13.
    """
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    shape = TopKTrainingSAEConfig(
        d_in=WIDTH, d_sae=LATENTS, k=K, use_sparse_activations=sparse, rescale_acts_by_decoder_norm=not sparse
    )
    sae = TopKTrainingSAE(shape)
    config = SAETrainerConfig(
        total_training_samples=tokens.steps * BATCH, train_batch_size_samples=BATCH, lr=RATE, lr_end=RATE,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    batches = iter(tokens)
    SAETrainer(config, sae, batches).fit()
    next(batches, None)  # ends the last turn
    return lambda x: sae.decode(sae.encode(x))


class _NoMoreTokens(Exception):  # noqa: N818 - not an error
    """Leaves a trainer whose data do not end."""


def train_sparsify(tokens: Tokens, optimizer: str) -> Reconstruct:
    """With the defaults of its classes and aux as in bakeout; for signum also its own rate."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SaeConfig, TrainConfig
    from sparsify import Trainer as SparsifyTrainer

    class Model(torch.nn.Module):
        """Whatever it is asked, its only module gives the next batch."""

        device = torch.device("cpu")
        dummy_inputs: Mapping[str, Tensor] = {}

        def __init__(self) -> None:
            super().__init__()
            self.hookpoint = torch.nn.Identity()
            self.batches: Iterator[Tensor] = iter([torch.zeros(1, WIDTH)])  # to tell the width

        @property
        def base_model(self) -> torch.nn.Module:
            return self

        def forward(self, _input_ids: Tensor | None = None) -> None:
            batch = next(self.batches, None)
            if batch is None:
                raise _NoMoreTokens
            self.hookpoint(batch[None])

    class Endless:
        """As many items as batches and far more, none of which is read for what is in it."""

        def __len__(self) -> int:
            return 10**6

        def __getitem__(self, _index: int) -> dict[str, Tensor]:
            return {"input_ids": torch.ones(BATCH, dtype=torch.int64)}

    model = Model()
    config = TrainConfig(
        SaeConfig(num_latents=LATENTS, k=K), batch_size=1, optimizer=optimizer, auxk_alpha=1 / 32,
        lr=RATE if optimizer == "adam" else None, lr_warmup_steps=0, hookpoints=["hookpoint"], log_to_wandb=False,
        save_every=10**9,
    )  # fmt: skip
    trainer = SparsifyTrainer(config, Endless(), model)
    model.batches = iter(tokens)
    with suppress(_NoMoreTokens):
        trainer.fit()
    (sae,) = trainer.saes.values()

    def reconstruct(x: Tensor) -> Tensor:
        code = sae.encode(x)
        reconstruction: Tensor = sae.decode(code.top_acts, code.top_indices)
        return reconstruction

    if optimizer == "signum":
        trainer.optimizers[0].eval()  # a schedule-free optimiser keeps the averaged weights apart
    return reconstruct


# By name: the environment, and the training.
VARIANTS: Mapping[str, tuple[str, Callable[[Tokens], Reconstruct]]] = {
    "bakeout": ("bakeout", train_bakeout),
    "bakeout, rate 4e-3": ("bakeout", lambda tokens: train_bakeout(tokens, learning_rate=4e-3)),
    "bakeout, bf16": ("bakeout", lambda tokens: train_bakeout(tokens, dtype="bf16")),
    "sae-lens": ("sae-lens", lambda tokens: train_sae_lens(tokens, sparse=False)),
    "sae-lens, sparse": ("sae-lens", lambda tokens: train_sae_lens(tokens, sparse=True)),
    "eai-sparsify": ("sparsify", lambda tokens: train_sparsify(tokens, "adam")),
    "eai-sparsify, signum": ("sparsify", lambda tokens: train_sparsify(tokens, "signum")),
}


def work(name: str, steps: int, steps_a_turn: int, threads: int) -> None:
    """Train one variant: a line on standard input begins a turn, a line on standard output says how long it took."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print
    torch.set_num_threads(threads)

    def turn_over(seconds: float) -> None:
        print(json.dumps(seconds), file=answers, flush=True)
        if not sys.stdin.readline():
            raise SystemExit("the benchmark ended early")

    tokens = Tokens(steps, steps_a_turn, turn_over, wall=threads > 1)
    reconstruct = VARIANTS[name][1](tokens)
    print(json.dumps(tokens.variance_explained(reconstruct)), file=answers, flush=True)


def python_of(environment: str, folder: Path) -> Path:
    """The environment's interpreter; makes the environment if it is not there."""
    package = PACKAGES[environment]
    if package is None:
        return Path(sys.executable)
    python = folder / environment / "bin" / "python"
    done = folder / environment / "complete"
    if not done.exists():
        constraints = ROOT / "constraints.txt"
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder / environment], check=True)  # noqa: S603 - this file
        # torch first and alone: see the constraints.
        for wanted in ("torch", package):
            command = [str(python), "-m", "pip", "install", "--quiet", "-c", str(constraints), wanted]
            subprocess.run(command, check=True)  # noqa: S603 - this file
        done.touch()
    return python


def answer(worker: subprocess.Popen[str], name: str) -> float:
    """The next number that a worker says."""
    stdout: IO[str] = worker.stdout  # type: ignore[assignment]
    line = stdout.readline()
    if not line:
        raise SystemExit(f"{name} ended early, with code {worker.wait()}; what it said is above")
    number: float = json.loads(line)
    return number


def interval(ratios: list[float]) -> tuple[float, float]:
    """Of the median, 95 %, by the bootstrap."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[50], medians[-51]


def main() -> None:
    """Run the variants in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, required=True, help="folder for the others' virtual environments")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="the first is ours")
    parser.add_argument("--steps", type=int, default=240, help="of each variant")
    parser.add_argument("--turn", type=int, default=6, help="steps of a variant before the next has its turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    given: Any = parser.parse_args()
    if given.worker:
        work(given.worker, given.steps, given.turn, given.threads)
        return

    if given.steps <= given.turn:
        parser.error("there must be at least two turns: the first warms up")
    common = [
        f"--steps={given.steps}", f"--turn={given.turn}", f"--threads={given.threads}",
        f"--environments={given.environments}",
    ]  # fmt: skip
    workers = {
        name: subprocess.Popen(  # noqa: S603 - this file
            [python_of(VARIANTS[name][0], given.environments), __file__, *common, "--worker", name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(given.threads)},
        )
        for name in given.variants
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for name, worker in workers.items():
        answer(worker, name)  # it has begun
    turns = -(-given.steps // given.turn)
    for turn in range(turns):
        for name, worker in workers.items():
            print("go", file=worker.stdin, flush=True)
            seconds[name].append(answer(worker, name))
        print(f"turn {turn + 1} of {turns}", end="\r", file=sys.stderr, flush=True)
    explained = {}
    for name, worker in workers.items():
        print("go", file=worker.stdin, flush=True)
        explained[name] = answer(worker, name)
        worker.wait()

    ours = seconds[given.variants[0]][1:]  # the first turn warms up
    print("| | time of it / ours | 95 % interval | held-out variance explained |\n|---|---|---|---|")
    for name in workers:
        ratios = [other / own for other, own in zip(seconds[name][1:], ours, strict=True)]
        low, high = interval(ratios)
        ratio = f"{statistics.median(ratios):.2f} | {low:.2f} to {high:.2f}"
        print(f"| {name} | {'1 | ' if name == given.variants[0] else ratio} | {explained[name]:.4f} |")
    print(f"\n{given.variants[0]}: {BATCH * given.turn / statistics.median(ours):,.0f} tokens a second")


if __name__ == "__main__":
    main()
