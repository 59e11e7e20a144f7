"""Train a sparse autoencoder on what a model's text encoder makes of prompts: stream, steps, checkpoints, and a log.

Training goes on where it was interrupted, and comes out the same to the last bit: the number of a step says which
tokens it has, and a checkpoint holds everything else that a step depends on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from bakeout import __version__
from bakeout.editor.checkpoint_header import read_header
from bakeout.editor.errors import InputError
from bakeout.editor.model import open_model
from bakeout.editor.sae.prompt_files import PromptFile, is_table
from bakeout.generate import NO_MEMORY, device_from_text, reserve_file, write_whole

if TYPE_CHECKING:
    from torch import Tensor

    from bakeout.editor.sae.activations import ActivationStream, TextActivations
    from bakeout.editor.sae.model import Fidelity, SparseAutoencoder
    from bakeout.editor.sae.processes import Processes
    from bakeout.editor.sae.train import StepResult, Trainer, TrainingSettings

TOKENS = 400_000_000
CHECKPOINT_EVERY = 500
_METADATA_KEY = "bakeout.sae.training"
_TOOLS = ("safetensors", "tokenizers", "torch", "transformers")
_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9}
_CURVE = ("loss", "variance_explained", "l0", "dead_share", "aux")
# Points of the curve; it has fewer than twice as many.
_POINTS = 250
_SECONDS_BETWEEN_LINES = 0.5
# Tells how it goes by a line, which is made only when it is time for one.
_Say: TypeAlias = "Callable[[Callable[[], str]], object]"


@dataclass(frozen=True)
class Prompts:
    """Prompts to train on, one source after the other; iterating reads them from the start.

    Attributes:
        names: of sources: files, as `bakeout.editor.sae.prompt_files.PromptFile` reads them, or a built-in model
            (`shapes`), for the captions that it was trained on.
        column: of the files that have columns.
    """

    names: tuple[str, ...]
    column: str | None = None

    def __iter__(self) -> Iterator[str]:
        for name in self.names:
            yield from BUILTIN_PROMPTS[name]() if name in BUILTIN_PROMPTS else PromptFile(Path(name), self.column)


def prompts_from(names: Iterable[str | os.PathLike[str]], column: str | None = None) -> Prompts:
    """The prompts of files and built-in models (`Prompts`).

    Raises:
        InputError: there are no names, one is no file of prompts by its ending, or none has columns and one is given.
            Files are opened when they are read.
    """
    texts = tuple(os.fspath(name) for name in names)
    if not texts:
        raise InputError("there are no prompts: give at least one file of them with --prompts")
    files = [PromptFile(Path(text), column) for text in texts if text not in BUILTIN_PROMPTS]
    if column is not None and not any(is_table(file.path) for file in files):
        raise InputError(f"there is no column {column!a:.100}: none of the files has columns, so leave --column out")
    return Prompts(texts, column)


def _shapes_captions() -> Iterator[str]:
    """What `shapes` was trained on: three captions of each of 40,000 scenes."""
    import numpy as np

    from bakeout.builtin.shapes.scenes import captions, sample_scene
    from bakeout.builtin.shapes.training import TRAINING_SEED, Settings

    of_scenes, of_captions = (np.random.default_rng([TRAINING_SEED, part]) for part in range(2))
    settings = Settings()
    for _ in range(settings.drawings):
        yield from captions(sample_scene(of_scenes), of_captions, settings.captions_each)


BUILTIN_PROMPTS: Mapping[str, Callable[[], Iterator[str]]] = {"shapes": _shapes_captions}


def tokens_from_text(text: str) -> int:
    """A number of tokens: `400M` → 400_000_000; K, M and B are thousands, millions and billions.

    Raises:
        InputError: it reads otherwise.
    """
    number, factor = text.strip().replace("_", ""), 1
    if number[-1:].upper() in _SUFFIXES:
        number, factor = number[:-1], _SUFFIXES[number[-1].upper()]
    whole, _, part = number.partition(".")
    if len(number) > 20 or not (whole + part).isascii() or not (whole + part).isdigit():
        raise InputError(f"tokens is {text!a:.50}: write a number such as 400M, 2.5B or 100000")
    return round(float(number) * factor)


def train(
    model: str | os.PathLike[str],
    prompts: Iterable[str],
    output: str | os.PathLike[str],
    *,
    tokens: int | None = None,
    epochs: int | None = None,
    k: int = 32,
    latents: int | None = None,
    encoder: str = "text_encoder",
    layer: int | None = None,
    batch: int = 4096,
    learning_rate: float = 4e-4,
    seed: int = 0,
    device: str = "auto",
    dtype: Literal["fp32", "bf16"] = "fp32",
    cache: str | os.PathLike[str] | None = None,
    cache_dtype: Literal["fp32", "fp16"] = "fp32",
    checkpoint_every: int = CHECKPOINT_EVERY,
    force: bool = False,
    progress: Callable[[float], object] | None = None,
    told: Callable[[str], object] | None = None,
) -> SparseAutoencoder:
    """Train a TopK autoencoder of a text encoder's layer, and write it, its curves and its log.

    Written are `output`, beside it `<stem>-training.png` and `<stem>-training.json`, and while it runs
    `<output>.partial`, from which the same call goes on. Under `accelerate launch` the processes share each batch.

    Args:
        model: as `open_model` takes it.
        prompts: texts, such as `prompts_from` gives; iterating must begin anew each time.
        output: a `.safetensors` file.
        tokens: to train on; None is `TOKENS`, unless `epochs` is given. Prompts are repeated as often as needed.
        epochs: how often each prompt is trained on, instead of `tokens`.
        k: latents of a token that are not zero, at most.
        latents: m; None is four times the width.
        encoder: `text_encoder` or `text_encoder_2`.
        layer: whose output it reads, from 0; None is `bakeout.editor.sae.activations.default_layer`.
        batch: tokens of a step.
        learning_rate: of Adam, constant.
        seed: of the initial weights and of the order of tokens.
        device: `auto` is the GPU where there is one.
        dtype: of large products; everything else is in fp32.
        cache: a folder that keeps an epoch's activations, so that the encoder runs each prompt only once.
        cache_dtype: in which it does; fp32 changes no bit of the result.
        checkpoint_every: steps.
        force: overwrite what is there, and begin anew where what was interrupted had other settings.
        progress: called with the part, of one, of the steps that was just done.
        told: called with a line on how it goes, twice a second at most.

    Raises:
        InputError: something given cannot be used, a file is there already, or the training diverged.
    """
    from bakeout.editor.sae.activations import ActivationStream, TextActivations, split, text_site
    from bakeout.editor.sae.processes import join_processes
    from bakeout.editor.sae.train import TrainingSettings

    if isinstance(prompts, str | os.PathLike):
        prompts = prompts_from([prompts])
    if iter(prompts) is prompts:
        raise InputError("the prompts can be read only once: give a list of them, or prompts_from(...)")
    if checkpoint_every < 1:
        raise InputError(f"checkpoint_every is {checkpoint_every}: give a number of steps, 1 or more")
    if cache is None and cache_dtype != "fp32":
        raise InputError("--cache-dtype is of the activations that --cache keeps: give both, or neither")
    opened = open_model(model)
    site = text_site(opened, encoder, layer)
    latents = 4 * site.d_out if latents is None else latents
    settings = TrainingSettings(latents, k, learning_rate, batch=batch, seed=seed, dtype=dtype)
    if k > latents:
        raise InputError(f"k is {k} and there are {latents} latents: give a smaller k or more latents")
    files = _Files(Path(output))
    files.check(force=force)
    processes = join_processes(device_from_text(device))
    if batch % processes.count:
        raise InputError(f"a batch of {batch} does not divide into {processes.count} processes: give another --batch")
    if processes.rank:
        progress = told = None
    say = _throttled(told)
    with _told_of_memory():
        parted = split(_counted(prompts, say))
        activations = TextActivations(opened, site, processes.device, dtype)
        steps = _steps(tokens, epochs, parted.count * activations.positions, batch)
        checkpoint = _Checkpoint(files.partial, checkpoint_every, {
            **asdict(settings), "steps": steps, "site": site.name, "prompts": parted.digest,
            "model, device or version of a library": activations.digest,
            "cache-dtype": "fp32" if cache is None else cache_dtype,
        })  # fmt: skip
        journal, state = checkpoint.load(force=force)
        stream = ActivationStream(
            parted.training(prompts), parted.count, _encode(activations, parted.digest, cache, cache_dtype),
            activations.positions, activations.width, steps, batch, seed, processes,
            tick=lambda share: say(lambda: f"encoding prompts: {share:.0%} of a block"),
        )  # fmt: skip
        with _noting(files.partial, processes):
            trainer = _train(
                settings, site.name, stream, checkpoint, journal, state, progress or (lambda _part: None), say
            )
            autoencoder = trainer.autoencoder()
            if processes.rank == 0:
                reached = _measure(autoencoder, activations, parted.held_out)
                files.write(autoencoder, {
                    "model": Path(model).name if Path(model).exists() else os.fspath(model),
                    "site": site.name,
                    "prompts": {
                        "from": [Path(it).name for it in prompts.names] if isinstance(prompts, Prompts) else None,
                        "training": parted.count, "held_out": len(parted.held_out), "sha256": parted.digest,
                    },
                    "settings": asdict(settings) | {"cache_dtype": None if cache is None else cache_dtype},
                    "steps": steps, "tokens": steps * batch, "seconds": round(journal.seconds, 1),
                    "device": processes.device.partition(":")[0], "processes": processes.count,
                    "tools": {"bakeout": __version__} | {tool: version(tool) for tool in _TOOLS},
                    "held_out": asdict(reached),
                    "curve": journal.curve,
                })  # fmt: skip
    processes.wait()
    return autoencoder


@contextmanager
def _told_of_memory() -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError("the GPU's memory is full: use a smaller --batch or --latents, or --device cpu") from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in NO_MEMORY):
            raise
        raise InputError("the training does not fit into memory: use a smaller --batch or --latents") from error


@contextmanager
def _noting(checkpoint: Path, processes: Processes) -> Iterator[None]:
    """Say of what breaks off how to go on; the same command would only repeat an InputError."""
    try:
        yield
    except BaseException as error:
        if processes.rank == 0 and not isinstance(error, InputError) and checkpoint.exists():
            error.add_note(f"{checkpoint} keeps what was trained: the same command, run again, goes on from there.")
        raise


def training_log(output: Path) -> Path:
    """The JSON log of the training that wrote `output`."""
    return output.with_name(f"{output.stem}-training.json")


@dataclass(frozen=True)
class _Files:
    """What a training writes."""

    output: Path

    @property
    def partial(self) -> Path:
        return self.output.with_name(f"{self.output.name}.partial")

    def check(self, *, force: bool) -> None:
        """Raise InputError if they cannot be written, or are there and neither forced nor of what goes on."""
        output = self.output
        reserve_file(output, "sae.safetensors", "a safetensors file", force=force)
        log = training_log(output)
        try:
            # Those beside it may be of a training that was killed just before the autoencoder was there.
            beside = [] if self.partial.exists() else [log, log.with_suffix(".png")]
            if not force and (there := [path for path in beside if path.exists()]):
                raise InputError(
                    f"{there[0]} exists already: choose another file with -o, or overwrite it with --force"
                )
            output.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=output.parent):
                pass
        except OSError as error:
            raise InputError(
                f"cannot write to {output.parent} ({error.strerror}): choose another place with -o"
            ) from error

    def write(self, autoencoder: SparseAutoencoder, log: Mapping[str, Any]) -> None:
        """The autoencoder is the last to appear, and the checkpoint goes when it is there."""
        from bakeout.training_chart import draw_training

        text = json.dumps(log, indent=2, ensure_ascii=False) + "\n"
        write_whole(training_log(self.output), lambda path: path.write_text(text, encoding="utf-8"))
        title = f"{log['model']}, {autoencoder!r}: {log['tokens']:,} tokens of {log['prompts']['training']:,} prompts"
        chart = partial(draw_training, log["curve"], log["held_out"], title)
        write_whole(training_log(self.output).with_suffix(".png"), chart)
        write_whole(self.output, autoencoder.save)
        self.partial.unlink(missing_ok=True)


@dataclass
class _Journal:
    """How a training went so far.

    Attributes:
        curve: by name, what some of the steps found; `tokens` are those trained on until then.
        seconds: that it took, in all runs.
    """

    curve: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in ("tokens", *_CURVE)})
    seconds: float = 0.0

    def note(self, tokens: int, result: StepResult) -> None:
        """Add a point. Raises InputError if there is no loss any more."""
        if not math.isfinite(result.loss):
            raise InputError(f"the training diverged within {tokens:,} tokens: give a smaller --learning-rate")
        self.curve["tokens"].append(tokens)
        for name in _CURVE:
            self.curve[name].append(getattr(result, name))


@dataclass(frozen=True)
class _Checkpoint:
    """The file from which a training goes on: the trainer's state, and its journal.

    Attributes:
        path: of the file.
        every: steps between two.
        training: all that the steps depend on, as JSON.
    """

    path: Path
    every: int
    training: Mapping[str, Any]

    def load(self, *, force: bool) -> tuple[_Journal, dict[str, Any] | None]:
        """The journal and the trainer's state; a new one and None where there is no file.

        Raises:
            InputError: the file is damaged, or of another training, and `force` is not given.
        """
        try:
            return self._load() if self.path.exists() else (_Journal(), None)
        except InputError:
            if force:
                return _Journal(), None
            raise

    def _load(self) -> tuple[_Journal, dict[str, Any]]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        text = read_header(self.path).metadata.get(_METADATA_KEY, "")
        try:
            said = json.loads(text)
            training = dict(said["training"])
            if others := [name for name, value in self.training.items() if training.get(name) != value]:
                raise InputError(
                    f"{self.path} is of an interrupted training with another {' and '.join(others)}: repeat that one "
                    "to go on with it, or begin anew with --force"
                )
            journal = _Journal({name: list(said["curve"][name]) for name in ("tokens", *_CURVE)}, said["seconds"])
            state = load_file(self.path) | said["numbers"]
            if not 0 < state["steps"] <= self.training["steps"]:
                raise ValueError(f"it has made {state['steps']} steps")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.path} is damaged: delete it, or begin anew with --force") from None
        return journal, state

    def save(self, trainer: Trainer, journal: _Journal) -> None:
        """Write the file anew, whole or not at all. Raises InputError if it cannot be written."""
        import torch
        from safetensors.torch import save

        state = trainer.state_dict()
        tensors = {name: it.contiguous() for name, it in state.items() if isinstance(it, torch.Tensor)}
        numbers = {name: it for name, it in state.items() if name not in tensors}
        said = {"training": self.training, "numbers": numbers} | asdict(journal)
        # Not by the library, whose errors in writing are no OSError.
        content = save(tensors, {_METADATA_KEY: json.dumps(said)})
        write_whole(self.path, lambda path: path.write_bytes(content))


def _train(
    settings: TrainingSettings,
    site: str,
    stream: ActivationStream,
    checkpoint: _Checkpoint,
    journal: _Journal,
    state: dict[str, Any] | None,
    progress: Callable[[float], object],
    say: _Say,
) -> Trainer:
    """Make all steps that are left, and the checkpoints on the way."""
    from bakeout.editor.sae.train import SAMPLE, Trainer

    processes, steps = stream.processes, stream.batches
    average = processes.average if processes.count > 1 else None
    between = max(1, steps // _POINTS)
    done = state["steps"] if state else 0
    progress(done / steps)
    began = time.monotonic()
    before = journal.seconds
    trainer: Trainer | None = None
    # Where nothing is left to do, the last block is made all the same: a trainer starts from a sample.
    for block in stream.blocks(min(done, steps - 1)):
        if trainer is None:
            trainer = Trainer(settings, site, block.sample(SAMPLE), processes.device)
            if state is not None:
                trainer.load_state_dict(state)
        for x in block.batches(trainer.steps):
            result = trainer.step(x, average)
            seconds = time.monotonic() - began
            journal.seconds = before + seconds
            if trainer.steps % between == 0 or trainer.steps in (1, steps):
                journal.note(trainer.steps * settings.batch, result)
            if trainer.steps % checkpoint.every == 0 and processes.rank == 0:
                checkpoint.save(trainer, journal)
            progress(1 / steps)
            say(partial(_line, result, (trainer.steps - done) * settings.batch / seconds))
    if trainer is None:
        raise AssertionError("a stream has at least one block")
    return trainer


def _line(result: StepResult, tokens_a_second: float) -> str:
    return (
        f"variance explained {result.variance_explained:.4f}, L0 {result.l0:.1f}, dead {result.dead_share:.1%}, "
        f"{tokens_a_second:,.0f} tokens/s"
    )


def _measure(autoencoder: SparseAutoencoder, activations: TextActivations, prompts: Sequence[str]) -> Fidelity:
    import torch

    from bakeout.editor.sae.activations import CHUNK
    from bakeout.editor.sae.model import fidelity

    chunks = [activations(prompts[start : start + CHUNK]) for start in range(0, len(prompts), CHUNK)]
    held_out = torch.cat(chunks).flatten(0, 1)
    return fidelity(autoencoder.to(held_out.device), held_out)


def _encode(
    activations: TextActivations, prompts: str, cache: str | os.PathLike[str] | None, stored: Literal["fp32", "fp16"]
) -> Callable[[int, Sequence[str]], Tensor]:
    """What makes a chunk's activations; a cache has a folder for each model and set of `prompts`, by their digests."""
    from bakeout.editor.sae.activations import cached

    if cache is None:
        return lambda _number, texts: activations(texts)
    key = hashlib.sha256(f"{activations.digest} {prompts} {stored}".encode()).hexdigest()[:16]
    return cached(activations, Path(cache) / key, stored)


def _steps(tokens: int | None, epochs: int | None, epoch: int, batch: int) -> int:
    """How many batches there are to train on, `epoch` being the tokens of one."""
    if tokens is not None and epochs is not None:
        raise InputError("--tokens and --epochs both say how long to train: give one of them")
    if epochs is not None and epochs < 1:
        raise InputError(f"epochs is {epochs}: give 1 or more")
    if epoch < batch:
        raise InputError(
            f"the prompts to train on have {epoch:,} tokens in all and a batch has {batch:,}: give more prompts or a "
            "smaller --batch"
        )
    total = epoch * epochs if epochs is not None else TOKENS if tokens is None else tokens
    if total < batch:
        raise InputError(
            f"{total:,} tokens are less than a batch, which has {batch:,}: give more, or a smaller --batch"
        )
    return total // batch


def _counted(prompts: Iterable[str], say: _Say) -> Iterator[str]:
    for number, text in enumerate(prompts, 1):
        if number % 10_000 == 0:
            say(partial("reading prompts: {:,}".format, number))
        yield text


def _throttled(told: Callable[[str], object] | None) -> _Say:
    """Calls `told` at most twice a second; to make a line makes a GPU wait."""
    last = -math.inf

    def say(line: Callable[[], str]) -> None:
        nonlocal last
        if told is not None and time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            told(line())

    return say
