"""CLIP's byte-level byte-pair encoding, trained on the captions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
CONTEXT = 77


def train_tokenizer(captions: Iterable[str], folder: Path, merges: int = 256) -> CLIPTokenizer:
    """Write `vocab.json` and `merges.txt` to `folder` and open them as a CLIPTokenizer.

    The vocabulary is laid out as CLIP's: 256 byte symbols, the same with `</w>` (end of word), one token a merge, then
    the start and the end mark. Since every byte is in it, any text encodes.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + merges,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator((caption.lower() for caption in captions), trainer)
    learned = json.loads(bpe.to_str())["model"]["merges"]
    tokens = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet), *dict.fromkeys("".join(pair) for pair in learned)]
    vocabulary = {token: index for index, token in enumerate([*dict.fromkeys(tokens), START, END])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in learned)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=CONTEXT, pad_token=END
    )
