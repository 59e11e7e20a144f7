"""Prompts → a text encoder's activations → shuffled batches of tokens, an epoch after the other, in constant memory.

The tokens of all epochs are one stream: all positions of the first prompt, of the second one, and so on. It is cut into
blocks of a fixed number of batches, and each block is shuffled in itself by a generator that is seeded by the block's
number. So the number of a batch says which tokens it has, and a training goes on anywhere by making one block again.

The encoder runs fixed chunks of an epoch's prompts, because the rounding of a kernel depends on the shape it runs on:
where blocks begin, how many processes share the work, and whether a chunk was kept on disk change no bit.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bakeout.editor.errors import InputError
from bakeout.editor.model import Model
from bakeout.editor.pipeline import load_tokenizer
from bakeout.editor.sae.model import SparseAutoencoder
from bakeout.editor.sae.processes import Processes
from bakeout.editor.sites import Site
from bakeout.editor.weights import load_module

CHUNK = 64  # prompts that the encoder runs at a time
BLOCK = 131_072  # tokens of a block, at least: 1,702 prompts
HELD_OUT = 512  # prompts that are measured on, at most
_HELD_OUT_SHARE = 0.01
_HELD_OUT_LEAST = 32
_HASHES = 1 << 64
_LIBRARIES = ("tokenizers", "torch", "transformers")

Stored = Literal["fp32", "fp16"]
STORED: dict[Stored, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}


class Encoder(Protocol):
    """What makes activations of prompts.

    Attributes:
        width: d.
        positions: tokens of a prompt.
    """

    width: int
    positions: int

    def __call__(self, prompts: Sequence[str], /) -> Tensor:
        """The activations of 1 to CHUNK prompts: fp32 [prompts, positions, d]."""


def default_layer(layers: int) -> int:
    """The layer that SNCE reads in a text encoder of so many, from 0: the 9th of 12, and as deep in others."""
    return round(layers * 10 / 12) - 1


def text_site(model: Model, encoder: str = "text_encoder", layer: int | None = None) -> Site:
    """The site of an encoder's layer, of `default_layer` where None is given.

    Raises:
        InputError: the model has no such encoder, or the encoder no such layer.
    """
    sites = [site for site in model.sites_of("text_layer") if site.component == encoder]
    if not sites:
        encoders = dict.fromkeys(site.component for site in model.sites_of("text_layer"))
        raise InputError(f"{model.source} has no {encoder!a:.100}; choose one of {', '.join(encoders)}")
    chosen = default_layer(len(sites)) if layer is None else layer
    if not 0 <= chosen < len(sites):
        raise InputError(f"the {encoder} of {model.source} has no layer {chosen}; its layers are 0 to {len(sites) - 1}")
    return sites[chosen]


def site_of(autoencoder: SparseAutoencoder, model: Model, name: str = "the autoencoder") -> Site:
    """The site of `model` that the autoencoder, called `name`, reads.

    Raises:
        InputError: the model has no such layer of a text encoder, or one of another width.
    """
    sites = model.sites_of("text_layer")
    site = next((it for it in sites if it.name == autoencoder.site), None)
    if site is None:
        raise InputError(
            f"{name} reads {autoencoder.site!a:.100}, and the layers of {model.source} are {sites[0].name} to "
            f"{sites[-1].name}; take an autoencoder of this model"
        )
    if autoencoder.width != site.d_out:
        raise InputError(
            f"{name} reads activations of width {autoencoder.width}, and {site.name} of {model.source} has "
            f"{site.d_out}; take an autoencoder of this model"
        )
    return site


class TextActivations:
    """The output of a layer of a model's text encoder at all positions, prompts padded and cut as the pipelines do.

    Only this encoder is loaded, and only the layers up to the site are kept and run.

    Attributes:
        site: whose output they are.
        device: on which the encoder runs.
        width: d.
        positions: tokens of a prompt, 77.
        digest: SHA-256 of what the activations depend on: weights, tokenizer, site, dtype, libraries' versions and
            the kind of device.
    """

    def __init__(self, model: Model, site: Site, device: str = "cpu", dtype: Literal["fp32", "bf16"] = "fp32") -> None:
        """Load the encoder in fp32; with `bf16` its products are in bf16, and what it adds up stays in fp32.

        Raises:
            InputError: its tokenizer does not load.
        """
        component = model.components[site.component]
        self._tokenizer = load_tokenizer(model.parts[site.component.replace("text_encoder", "tokenizer")])
        self._network = load_module(
            component.class_name, component.config, component.tensors, component.locations, device, torch.float32
        )
        self._layer = model.module(SimpleNamespace(**{site.component: self._network}), site)
        _drop_layers_after(self._network, self._layer)
        self.device = torch.device(device)
        self._dtype = dtype
        self.site = site
        self.width = site.d_out
        self.positions = int(self._tokenizer.model_max_length)
        self.digest = self._digest()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """The activations of prompts, all of which run at once: fp32 [prompts, positions, d], on the device.

        Raises:
            InputError: they are not finite.
        """
        found: list[Tensor] = []
        with (
            self._layer.register_forward_hook(lambda _module, _inputs, output: found.append(output)),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self._dtype == "bf16"),
        ):
            self._network(self._tokens(prompts).to(self.device))
        (output,) = found
        if not output.isfinite().all():
            raise InputError(f"the activations at {self.site.name} are not finite: check the weights of the model")
        return output.float()

    def _tokens(self, prompts: Sequence[str]) -> Tensor:
        tokens = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.positions, return_tensors="pt"
        )
        return torch.as_tensor(tokens.input_ids)

    def _digest(self) -> str:
        backend = json.loads(self._tokenizer.backend_tokenizer.to_str())
        padding = [self._tokenizer.pad_token_id, self.positions]
        facts = [
            self.site.name, self._dtype, self.device.type, CHUNK, backend, padding, str(self._network.config),
            [version(name) for name in _LIBRARIES],
        ]  # fmt: skip
        total = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for name, weight in self._network.state_dict().items():
            total.update(f"{name} {list(weight.shape)}".encode())
            total.update(weight.cpu().contiguous().numpy().tobytes())
        return total.hexdigest()


def _drop_layers_after(network: torch.nn.Module, layer: torch.nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, torch.nn.ModuleList) and layer in list(module):
            del module[list(module).index(layer) + 1 :]
            return


@dataclass(frozen=True)
class Split:
    """Which prompts are trained on, and which only measured on: one in a hundred, by the hash of its text.

    Attributes:
        count: prompts to train on in an epoch, repeated ones as often as they come.
        threshold: texts whose hash lies below it are held out.
        held_out: those of the smallest hashes, each once, `HELD_OUT` at most: a sample of all.
        digest: SHA-256 of all prompts in their order.
    """

    count: int
    threshold: int
    held_out: tuple[str, ...]
    digest: str

    def training(self, prompts: Iterable[str]) -> Iterable[str]:
        """Those of `prompts` that are trained on; iterating begins anew, if it does with `prompts`."""
        return _NotBelow(prompts, self.threshold)


@dataclass(frozen=True)
class _NotBelow:
    prompts: Iterable[str]
    threshold: int

    def __iter__(self) -> Iterator[str]:
        return (text for text in self.prompts if _hash(text) >= self.threshold)


def split(prompts: Iterable[str]) -> Split:
    """Read all prompts once, and hold out 1 % of the texts; of few, up to 32, but at most a tenth.

    Raises:
        InputError: there are none to train on.
    """
    total = hashlib.sha256()
    share = int(_HELD_OUT_SHARE * _HASHES)
    bound = _HASHES
    count = below_share = 0
    smallest: dict[int, str] = {}
    copies: dict[int, int] = {}
    for text in prompts:
        key = _hash(text)
        total.update(key.to_bytes(8, "big"))
        count += 1
        below_share += key < share
        if key < bound:
            smallest.setdefault(key, text)
            copies[key] = copies.get(key, 0) + 1
            if len(smallest) > 2 * HELD_OUT:
                kept = heapq.nsmallest(HELD_OUT, smallest)
                smallest, copies = {it: smallest[it] for it in kept}, {it: copies[it] for it in kept}
                bound = kept[-1] + 1
    ranked = sorted(smallest)
    least = ranked[: min(_HELD_OUT_LEAST, max(1, len(ranked) // 10))]
    threshold = max(share, least[-1] + 1) if least else 0
    held_out = tuple(smallest[key] for key in ranked[:HELD_OUT] if key < threshold)
    held_back = below_share if threshold == share else sum(copies[key] for key in ranked if key < threshold)
    if count == held_back:
        raise InputError(
            f"there {'is no prompt' if not count else 'is one prompt, however often,'} to train on: give more prompts"
        )
    return Split(count - held_back, threshold, held_out, total.hexdigest())


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def cached(encode: Encoder, folder: Path, stored: Stored) -> Callable[[int, Sequence[str]], Tensor]:
    """`encode` for a chunk by its number, kept in `folder`, a file a chunk: what is there is read and not made.

    With `fp16` the activations are rounded, whether they were just made or read. The folder must depend on all that
    they depend on.

    Raises:
        InputError, when called: activations beyond fp16, or the folder cannot be written.
    """

    def read_or_make(number: int, prompts: Sequence[str]) -> Tensor:
        path = folder / f"{number:08}.safetensors"
        shape = (len(prompts), encode.positions, encode.width)
        kept = _read_chunk(path, shape, STORED[stored])
        if kept is None:
            made = encode(prompts)
            kept = made.to(STORED[stored])
            if not kept.isfinite().all():
                raise InputError("the activations are too large for fp16: keep them with --cache-dtype fp32")
            _write_chunk(path, kept)
        return kept.float()

    return read_or_make


def _read_chunk(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """None where it is not there or not whole."""
    try:
        found = load_file(path).get("activations")
    except (OSError, SafetensorError):
        return None
    whole = found is not None and found.shape == shape and found.dtype == dtype and bool(found.isfinite().all())
    return found if whole else None


def _write_chunk(path: Path, activations: Tensor) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Overwritten by the next run if this one is killed here: the name is the same.
        save_file({"activations": activations.cpu().contiguous()}, part)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot write {path} ({error!s:.200}): make room there, or choose another folder with --cache"
        ) from error


@dataclass(frozen=True, eq=False)
class Block:
    """Some batches of the stream, shuffled among each other.

    Attributes:
        first: the number of its first batch in the stream.
        tokens: fp32 [batches * batch, d]; the next block overwrites it.
        order: int64 [batches * batch], a permutation.
        batch: tokens of a batch, over all processes.
        processes: which share each batch, in equal parts.
    """

    first: int
    tokens: Tensor
    order: Tensor
    batch: int
    processes: Processes

    def sample(self, count: int) -> Tensor:
        """Tokens of its beginning, [≤ count, d]: the same in every process."""
        return self.tokens[self.order[:count]]

    def batches(self, start: int) -> Iterator[Tensor]:
        """This process's part of each batch [batch / processes, d], from the stream's batch number `start` on."""
        for batch in torch.split(self.order, self.batch)[start - self.first :]:
            yield self.tokens[batch.chunk(self.processes.count)[self.processes.rank]]


@dataclass(frozen=True, eq=False)
class ActivationStream:
    """Batches of activations of prompts, epoch after epoch.

    Attributes:
        prompts: to train on; iterating begins anew.
        count: how many those are.
        encode: makes the activations of chunk `number` of an epoch from its prompts: fp32 [prompts, positions, d].
        positions: tokens of a prompt.
        width: d.
        batches: of the whole stream.
        batch: tokens of a batch, over all processes; a multiple of their number.
        seed: of the order within the blocks.
        processes: which share the work; each gets the same blocks.
        tick: called whenever chunks were encoded, with the share of the block that is there.
    """

    prompts: Iterable[str]
    count: int
    encode: Callable[[int, Sequence[str]], Tensor]
    positions: int
    width: int
    batches: int
    batch: int
    seed: int
    processes: Processes
    tick: Callable[[float], object] = field(default=lambda _share: None)

    @property
    def batches_of_a_block(self) -> int:
        """All blocks have as many, but the last one."""
        return -(-BLOCK // self.batch)

    def blocks(self, start: int = 0) -> Iterator[Block]:
        """The blocks of the stream, from that on which has batch number `start`.

        Raises:
            InputError: what encoding the prompts raises, or they are not as many as `count` any more.
        """
        size = self.batches_of_a_block
        number = start // size
        pieces = self._pieces(number * size * self.batch)
        buffer = torch.empty(size * self.batch, self.width, device=self.processes.device)
        rest = buffer[:0]
        while (first := number * size) < self.batches:
            tokens = buffer[: min(size, self.batches - first) * self.batch]
            rest = self._fill(tokens, rest, pieces)
            generator = torch.Generator().manual_seed(_seed(self.seed, number))
            order = torch.randperm(len(tokens), generator=generator).to(self.processes.device)
            yield Block(first, tokens, order, self.batch, self.processes)
            number += 1

    def _fill(self, tokens: Tensor, rest: Tensor, pieces: Iterator[Tensor]) -> Tensor:
        """Fill `tokens` with `rest` and pieces, and return what is left over."""
        filled = 0
        while filled < len(tokens):
            piece = rest if len(rest) else next(pieces)
            taken = min(len(piece), len(tokens) - filled)
            tokens[filled : filled + taken] = piece[:taken]
            rest = piece[taken:]
            filled += taken
            self.tick(filled / len(tokens))
        return rest

    def _pieces(self, token: int) -> Iterator[Tensor]:
        """The stream's tokens from number `token` on, [n, d] at a time."""
        prompt, position = divmod(token % (self.count * self.positions), self.positions)
        chunk, row = divmod(prompt, CHUNK)
        skip = row * self.positions + position
        chunks = self._chunks(chunk)
        while True:
            # Every process encodes one of these.
            group = list(islice(chunks, self.processes.count))
            number, prompts = group[self.processes.rank]
            own = self.encode(number, prompts)
            padded = own.new_zeros(CHUNK, self.positions, self.width)
            padded[: len(prompts)] = own
            gathered = self.processes.gather(padded[None])
            for (_, texts), activations in zip(group, gathered, strict=True):
                yield activations[: len(texts)].flatten(0, 1)[skip:]
                skip = 0

    def _chunks(self, start: int) -> Iterator[tuple[int, list[str]]]:
        """Number and prompts of the chunks of an epoch, from number `start` on, and of all further epochs."""
        while True:
            texts = islice(self.prompts, start * CHUNK, None)
            seen = start * CHUNK
            while chunk := list(islice(texts, CHUNK)):
                yield start, chunk
                seen += len(chunk)
                start += 1
            if seen != self.count:
                raise InputError(
                    f"the prompts have changed while they were read ({seen:,}, and {self.count:,} before): run it again"
                )
            start = 0


def _seed(*numbers: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big") >> 1
