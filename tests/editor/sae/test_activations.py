"""Activations are those of the real encoder, the stream is the prompts' tokens in order but for a shuffle in blocks."""

from __future__ import annotations

import hashlib
import itertools
import threading
import tracemalloc
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bakeout.editor.errors import InputError
from bakeout.editor.model import open_model
from bakeout.editor.sae import activations
from bakeout.editor.sae.activations import (
    HELD_OUT,
    ActivationStream,
    TextActivations,
    cached,
    default_layer,
    split,
    text_site,
)
from bakeout.editor.sae.processes import Processes

ALONE = Processes(0, 1, "cpu")
POSITIONS, WIDTH, BATCH = 7, 3, 30


class NumberEncoder:
    """Says of each token which it is: the prompt's number, the position, and how often it was made."""

    width = WIDTH
    positions = POSITIONS

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, prompts) -> Tensor:
        self.calls.append(len(prompts))
        numbers = torch.tensor([float(text) for text in prompts])
        places = torch.arange(POSITIONS, dtype=torch.float32)
        parts = (numbers[:, None].expand(-1, POSITIONS), places.expand(len(prompts), -1))
        return torch.stack([*parts, torch.zeros(len(prompts), POSITIONS)], dim=-1)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(activations, "CHUNK", 4)
    monkeypatch.setattr(activations, "BLOCK", 100)  # 4 batches of 30


def stream_of(count: int, batches: int, *, seed: int = 0, processes: Processes = ALONE, encode=None, **more):
    encoder = NumberEncoder()
    return ActivationStream(
        [str(number) for number in range(count)], count, encode or (lambda _number, texts: encoder(texts)),
        POSITIONS, WIDTH, batches, BATCH, seed, processes, **more,
    )  # fmt: skip


def tokens_of(count: int, total: int) -> list[tuple[int, int]]:
    """The first `total` tokens of endless epochs of `count` prompts, as (prompt, position)."""
    epoch = [(prompt, position) for prompt in range(count) for position in range(POSITIONS)]
    return list(itertools.islice(itertools.cycle(epoch), total))


def told(tokens: Tensor) -> list[tuple[int, int]]:
    return [(int(prompt), int(position)) for prompt, position, _ in tokens.tolist()]


def batches_of(stream: ActivationStream, start: int = 0) -> list[Tensor]:
    return [x for block in stream.blocks(start) for x in block.batches(max(start, block.first))]


@pytest.mark.parametrize("count", [5, 8, 23, 1000])
@pytest.mark.parametrize("batches", [1, 4, 11])
def test_each_block_has_its_part_of_the_stream_once(count, batches):
    found = batches_of(stream_of(count, batches))
    assert [len(x) for x in found] == [BATCH] * batches
    expected = tokens_of(count, batches * BATCH)
    for first in range(0, batches, 4):
        part = torch.cat(found[first : first + 4])
        assert sorted(told(part)) == sorted(expected[first * BATCH : (first + 4) * BATCH])


def test_a_block_is_shuffled_by_its_number_and_the_seed():
    found = batches_of(stream_of(1000, 8))
    assert told(torch.cat(found[:4])) != tokens_of(1000, 4 * BATCH)
    # A token's place in its block, in the order in which it was drawn.
    orders = [
        [prompt * POSITIONS + position for prompt, position in told(torch.cat(found[at : at + 4]))] for at in (0, 4)
    ]
    assert orders[0] != [number - 4 * BATCH for number in orders[1]]
    assert told(torch.cat(batches_of(stream_of(1000, 8, seed=1)))) != told(torch.cat(found))
    assert torch.equal(torch.cat(batches_of(stream_of(1000, 8))), torch.cat(found))


@pytest.mark.parametrize("count", [5, 8, 23, 1000])
def test_the_stream_goes_on_anywhere(count):
    found = batches_of(stream_of(count, 11))
    for start in range(11):
        rest = batches_of(stream_of(count, 11), start)
        assert torch.equal(torch.stack(rest), torch.stack(found[start:])), start


def test_to_go_on_encodes_one_block_and_no_prompt_before():
    encoder = NumberEncoder()
    seen: list[int] = []

    def encode(number, texts):
        seen.append(number)
        return encoder(texts)

    next(stream_of(1000, 40, encode=encode).blocks(33))
    # Block 8 begins with token 960, of prompt 137, of chunk 34.
    assert seen == [34, 35, 36, 37, 38]


def test_the_sample_is_the_beginning_of_the_first_block():
    block = next(stream_of(1000, 8).blocks())
    assert torch.equal(block.sample(50), torch.cat(list(block.batches(0)))[:50])


class Threads(Processes):
    """Processes that are threads of this one."""

    def __init__(self, rank: int, count: int, shared: dict[int, Tensor], barrier: threading.Barrier) -> None:
        super().__init__(rank, count, "cpu")
        object.__setattr__(self, "shared", shared)
        object.__setattr__(self, "barrier", barrier)

    def gather(self, x: Tensor) -> Tensor:
        self.shared[self.rank] = x
        self.barrier.wait(20)
        gathered = torch.cat([self.shared[rank] for rank in range(self.count)])
        self.barrier.wait(20)
        return gathered


@pytest.mark.parametrize("count", [5, 23])
def test_several_processes_share_the_same_batches_and_the_encoding(count):
    alone, encoders = batches_of(stream_of(count, 11)), [NumberEncoder() for _ in range(3)]
    shared: dict[int, Tensor] = {}
    barrier = threading.Barrier(3)
    parts: dict[int, list[Tensor]] = {}

    def run(rank: int) -> None:
        stream = stream_of(
            count, 11, processes=Threads(rank, 3, shared, barrier), encode=lambda _number, texts: encoders[rank](texts)
        )
        parts[rank] = batches_of(stream)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, whole in enumerate(alone):
        assert torch.equal(torch.cat([parts[rank][number] for rank in range(3)]), whole)
    calls = [len(encoder.calls) for encoder in encoders]
    assert max(calls) == min(calls)
    single = NumberEncoder()
    batches_of(stream_of(count, 11, encode=lambda _number, texts: single(texts)))
    assert max(calls) <= len(single.calls) / 3 + 1


def test_prompts_that_change_while_they_are_read_are_noticed():
    for prompts in (["1"] * 9, ["1"] * 11, []):
        stream = ActivationStream(
            prompts, 10, lambda _number, texts: NumberEncoder()(texts), POSITIONS, WIDTH, 20, BATCH, 0, ALONE
        )
        with pytest.raises(InputError, match="the prompts have changed while they were read"):
            batches_of(stream)


def test_memory_is_that_of_a_block_however_long_the_stream_is():
    def endless():
        return map(str, itertools.count())

    class Endless:
        def __iter__(self):
            return endless()

    def most(batches: int) -> tuple[int, int]:
        living: weakref.WeakSet[Tensor] = weakref.WeakSet()
        encoded = 0

        def encode(_number, texts):
            nonlocal encoded
            encoded += 1
            made = NumberEncoder()(texts)
            living.add(made)
            return made

        stream = ActivationStream(Endless(), 1 << 40, encode, POSITIONS, WIDTH, batches, BATCH, 0, ALONE)
        chunks = 0
        tracemalloc.start()
        for block in stream.blocks():
            for _ in block.batches(block.first):
                chunks = max(chunks, len(living))
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert encoded >= batches
        return chunks, held

    most(8)
    short, long = most(12), most(1_200)
    assert long[0] == short[0] <= 2
    # A hundred bytes kept of each further batch would be more.
    assert long[1] - short[1] < 50_000


def test_the_block_says_how_much_of_it_is_there():
    shares: list[float] = []
    next(stream_of(1000, 8, tick=shares.append).blocks())
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert len(shares) > 3


def hash_of(text: str) -> float:
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64


def test_one_percent_is_held_out_by_its_text():
    texts = [f"prompt {number}" for number in range(20_000)]
    repeated = texts + texts[:5_000]
    parted = split(repeated)
    low = {text for text in texts if hash_of(text) < 0.01}
    assert 150 < len(low) < 250
    assert set(parted.held_out) == low
    trained = list(parted.training(repeated))
    assert trained == [text for text in repeated if text not in low]
    assert parted.count == len(trained)
    again = parted.training(repeated)
    assert list(again) == list(again) == trained


def test_of_many_held_out_prompts_those_of_the_smallest_hashes_are_measured():
    texts = [f"prompt {number}" for number in range(120_000)]
    parted = split(itertools.chain(texts, texts[:1000]))
    low = sorted((text for text in texts if hash_of(text) < 0.01), key=hash_of)
    assert len(low) > 2 * HELD_OUT
    assert list(parted.held_out) == low[:HELD_OUT]
    assert parted.count == 121_000 - len(low) - sum(hash_of(text) < 0.01 for text in texts[:1000])


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (9, 1), (40, 4), (320, 32), (1500, 32)])
def test_of_few_prompts_some_are_held_out_all_the_same(count, held_out):
    texts = [f"prompt {number}" for number in range(count)]
    parted = split(texts * 3)
    assert list(parted.held_out) == sorted(texts, key=hash_of)[:held_out]
    trained = list(parted.training(texts * 3))
    assert set(trained).isdisjoint(parted.held_out)
    assert parted.count == len(trained) == 3 * (count - held_out)


def test_without_two_prompts_there_is_nothing_to_train_on():
    with pytest.raises(InputError, match="no prompt to train on"):
        split([])
    with pytest.raises(InputError, match="one prompt, however often"):
        split(["a"] * 100)


def test_the_digest_is_of_all_prompts_in_their_order():
    digests = {split(texts).digest for texts in (list("abc"), list("acb"), list("abcc"), ["ab", "c", "d"], list("abd"))}
    assert len(digests) == 5
    assert split(list("abc")).digest == split(iter("abc")).digest


def test_the_split_needs_no_memory_for_the_prompts():
    def peak(count: int) -> int:
        tracemalloc.start()
        split(f"prompt {number}" for number in range(count))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(60_000) < 1.5 * peak(6_000)


@pytest.mark.parametrize(("layers", "layer"), [(12, 9), (23, 18), (24, 19), (32, 26), (2, 1), (3, 1)])
def test_the_default_layer_is_as_deep_as_the_papers(layers, layer):
    assert default_layer(layers) == layer


def test_the_site_of_a_layer(folders):
    model = open_model(folders("sdxl"))
    assert text_site(model).name == "text_encoder.layer.1"
    assert text_site(model, "text_encoder_2", 2).name == "text_encoder_2.layer.2"
    with pytest.raises(InputError, match="has no layer 3; its layers are 0 to 2"):
        text_site(model, layer=3)
    with pytest.raises(InputError, match="has no layer -1"):
        text_site(model, layer=-1)
    with pytest.raises(InputError, match=r"has no 'text_encoder_2'; choose one of text_encoder$"):
        text_site(open_model(folders("sd1")), "text_encoder_2")


TEXTS = ["a red circle", "x", "a very long prompt " * 40]


@pytest.mark.parametrize(
    ("family", "encoder"),
    [("sd1", "text_encoder"), ("sd2", "text_encoder"), ("sdxl", "text_encoder"), ("sdxl", "text_encoder_2")],
)
def test_activations_are_the_hidden_states_of_the_whole_encoder(folders, family, encoder):
    model = open_model(folders(family))
    pipeline = model.pipeline("cpu", torch.float32)
    tokenizer = getattr(pipeline, encoder.replace("text_encoder", "tokenizer"))
    ids = tokenizer(
        TEXTS, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        states = getattr(pipeline, encoder)(ids, output_hidden_states=True).hidden_states
    for layer in range(3):
        found = TextActivations(model, text_site(model, encoder, layer))(TEXTS)
        assert found.dtype == torch.float32
        assert found.shape == (3, 77, model.site(f"{encoder}.layer.{layer}").d_out)
        assert torch.equal(found, states[layer + 1])
        assert not torch.equal(found, states[layer])


def test_only_the_layers_up_to_the_site_run(folders, monkeypatch):
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

    ran = []
    forward = CLIPEncoderLayer.forward
    monkeypatch.setattr(CLIPEncoderLayer, "forward", lambda self, *a, **k: ran.append(1) or forward(self, *a, **k))
    model = open_model(folders("sd1"))
    TextActivations(model, text_site(model, layer=1))(TEXTS)
    assert len(ran) == 2


def test_in_bf16_only_products_are_rounded(folders):
    model = open_model(folders("sd1"))
    exact = TextActivations(model, text_site(model))(TEXTS)
    rounded = TextActivations(model, text_site(model), dtype="bf16")(TEXTS)
    assert rounded.dtype == torch.float32
    error = float((rounded - exact).norm() / exact.norm())
    assert 1e-5 < error < 1e-2
    assert not torch.equal(rounded, rounded.bfloat16().float()), "what is added up is rounded too"


def test_the_digest_is_of_weights_site_and_dtype(folders):
    model = open_model(folders("sdxl"))
    made = [
        TextActivations(model, text_site(model)),
        TextActivations(model, text_site(model, layer=0)),
        TextActivations(model, text_site(model), dtype="bf16"),
        TextActivations(model, text_site(model, "text_encoder_2")),
        TextActivations(open_model(folders("sd1")), text_site(open_model(folders("sd1")))),
    ]
    assert len({it.digest for it in made}) == len(made)
    assert TextActivations(model, text_site(model)).digest == made[0].digest


def test_activations_that_are_not_finite_are_refused(folders):
    model = open_model(folders("sd1"))
    made = TextActivations(model, text_site(model))
    next(made._network.parameters()).data.fill_(float("nan"))
    with pytest.raises(InputError, match=r"the activations at text_encoder.layer.1 are not finite"):
        made(TEXTS)


def test_a_cache_is_written_once_and_changes_no_bit(tmp_path):
    encoder, direct = NumberEncoder(), batches_of(stream_of(23, 11))
    stored = cached(encoder, tmp_path / "new" / "cache", "fp32")
    assert torch.equal(torch.cat(batches_of(stream_of(23, 11, encode=stored))), torch.cat(direct))
    # An epoch has six chunks; the stream has two epochs.
    assert encoder.calls == [4, 4, 4, 4, 4, 3]
    assert len(list((tmp_path / "new" / "cache").iterdir())) == 6
    assert torch.equal(torch.cat(batches_of(stream_of(23, 11, encode=stored))), torch.cat(direct))
    assert len(encoder.calls) == 6


@pytest.mark.parametrize("damage", ["cut", "shape", "other", "nan"])
def test_a_damaged_part_of_a_cache_is_made_again(tmp_path, damage):
    from safetensors.torch import save_file

    encoder = NumberEncoder()
    stored = cached(encoder, tmp_path, "fp32")
    texts = list("1234")
    whole = stored(0, texts)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-5])
    elif damage == "shape":
        save_file({"activations": torch.zeros(3, POSITIONS, WIDTH)}, path)
    elif damage == "nan":
        save_file({"activations": torch.full((4, POSITIONS, WIDTH), float("nan"))}, path)
    else:
        save_file({"weights": whole.contiguous()}, path)
    assert torch.equal(stored(0, texts), whole)
    assert path.read_bytes() == content
    assert len(encoder.calls) == 2


def test_a_cache_in_fp16_rounds_the_first_time_too(tmp_path):
    class Fine(NumberEncoder):
        def __call__(self, prompts) -> Tensor:
            return super().__call__(prompts) + 1 / 3

    stored, texts = cached(Fine(), tmp_path, "fp16"), list("1234")
    first = stored(0, texts)
    assert first.dtype == torch.float32
    assert torch.equal(first, stored(0, texts))
    assert torch.equal(first, Fine()(texts).half().float())
    assert not torch.equal(first, Fine()(texts))
    (path,) = tmp_path.iterdir()
    assert load_file(path)["activations"].dtype == torch.float16
    with pytest.raises(InputError, match="too large for fp16"):
        stored(1, ["70000"] * 4)


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another folder with --cache"):
        cached(NumberEncoder(), Path(tmp_path / "file" / "in"), "fp32")(0, ["1"])
