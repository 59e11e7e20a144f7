"""Prompts in files: each format by a file of the format's own library, every mistake one sentence, memory constant."""

from __future__ import annotations

import csv
import json
import os
import sys
import tracemalloc
from collections import deque
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from bakeout.editor.errors import InputError
from bakeout.editor.sae import prompt_files
from bakeout.editor.sae.prompt_files import PromptFile

PROMPTS = ["a cat", 'a "red" cat, on grass', "ein Kätzchen 🐈", "two\nlines"]
ONE_LINE = PROMPTS[:3]


def write_table(path: Path, rows: list[dict[str, object]]) -> Path:
    """`rows` in the format that the ending names."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    else:
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0], delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    return path


TABLES = (".csv", ".tsv", ".jsonl", ".parquet")


def read(path: Path, column: str | None = None) -> list[str]:
    return list(PromptFile(path, column))


@pytest.mark.parametrize("ending", TABLES)
def test_a_table_gives_the_prompts_of_its_column(tmp_path, ending):
    rows = [{"number": str(number), "words": text, "score": "0.5"} for number, text in enumerate(PROMPTS * 3)]
    file = PromptFile(write_table(tmp_path / f"a{ending}", rows), "words")
    assert list(file) == PROMPTS * 3
    assert list(file) == PROMPTS * 3, "it does not begin anew"


@pytest.mark.parametrize("ending", TABLES)
def test_without_a_column_the_usual_or_the_only_one_is_taken(tmp_path, ending):
    several = [{"text": "no", "caption": "no", "prompt": it} for it in PROMPTS]
    assert read(write_table(tmp_path / f"a{ending}", several)) == PROMPTS
    assert read(write_table(tmp_path / f"b{ending}", [{"odd": it} for it in PROMPTS])) == PROMPTS
    unusual = write_table(tmp_path / f"c{ending}", [{"x": "no", "y": "no"}])
    with pytest.raises(InputError, match=r"has the columns 'x', 'y'; say with --column which"):
        read(unusual)
    with pytest.raises(InputError, match=r"has no column 'z'; it has 'x', 'y'$"):
        read(unusual, "z")


@pytest.mark.parametrize("ending", TABLES)
def test_blank_and_missing_prompts_are_left_out(tmp_path, ending):
    rows = [{"prompt": it, "n": "1"} for it in ("a", "", "  ", None, " b ")]
    assert read(write_table(tmp_path / f"a{ending}", rows)) == ["a", "b"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_text_file_has_a_prompt_a_line(tmp_path, encoding, newline):
    path = tmp_path / "A.TXT"
    path.write_bytes(newline.join([*ONE_LINE, "", " "]).encode(encoding))
    assert read(path) == ONE_LINE
    path.write_bytes(b"")
    assert read(path) == []


def test_dictionaries_and_large_strings_of_parquet_are_text(tmp_path):
    for kind in (pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        parquet.write_table(pa.table({"prompt": pa.array(ONE_LINE).cast(kind)}), tmp_path / "a.parquet")
        assert read(tmp_path / "a.parquet") == ONE_LINE


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"a\nb\xff\n", "after line 0: this is not UTF-8 text"),
        ("a.txt", b"\xff\xfea\x00\x00\xd8", "this is not UTF-16 text"),
        ("a.txt", b"a\n" + b"b" * 1_000_001, "line 2 has more than 1,000,000 characters"),
        ("a.txt", b"a\n" + b"b" * 100_001, "line 2: this has 100,001 characters"),
        ("a.csv", b'prompt\n"a\n', "unexpected end of data"),
        ("a.csv", b'prompt\n"a"b\n', "line 2: "),
        ("a.csv", b'prompt\n"' + b"a\n" * 70_000, "field larger than field limit"),
        ("a.csv", b"n,prompt\n1\n", "line 2: this has 1 columns"),
        ("a.tsv", b"\xff", "after line 0"),
        ("a.jsonl", b'{"prompt": "a"}\nb\n', "line 2: this is no object"),
        ("a.jsonl", b'["a"]\n', "line 1: this is no object"),
        ("a.jsonl", b"[" * 100_000, "line 1: this is no object"),
        ("a.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "line 2: this has no 'prompt'"),
        ("a.jsonl", b'{"prompt": ["a"]}\n', "line 1: this is no text"),
        ("a.jsonl", b'{"prompt": "\\ud800"}\n', "line 1: this has half of a surrogate pair"),
        ("a.parquet", b"PAR1 and nothing else", "this is not a whole Parquet file"),
        ("a.parquet", b"", "this is not a whole Parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_of_prompts_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"a.xlsx is no file of prompts; give one that ends in .txt, .csv, .tsv"):
        PromptFile(tmp_path / "a.xlsx")
    with pytest.raises(InputError, match="does not exist"):
        read(tmp_path / "a.txt")
    (tmp_path / "b.txt").mkdir()
    with pytest.raises(InputError, match="is not a file"):
        read(tmp_path / "b.txt")
    os.mkfifo(tmp_path / "c.txt")
    with pytest.raises(InputError, match="is not a file"):
        read(tmp_path / "c.txt")


def test_parquet_columns_must_be_text_and_row_groups_small(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"n": [1, 2], "prompt": ONE_LINE[:2]}), path)
    with pytest.raises(InputError, match="the column 'n' is int64 and no text"):
        read(path, "n")
    damaged = bytearray(path.read_bytes())
    page = parquet.ParquetFile(path).metadata.row_group(0).column(1).dictionary_page_offset
    damaged[page : page + 20] = bytes(20)
    (tmp_path / "b.parquet").write_bytes(damaged)
    with pytest.raises(InputError, match="after row 0: this is not a whole Parquet file"):
        read(tmp_path / "b.parquet", "prompt")
    monkeypatch.setattr(prompt_files, "MAX_COLUMN_BYTES", 10)
    with pytest.raises(InputError, match="write it with smaller row groups"):
        read(path)


def test_a_long_text_that_a_small_file_repeats_is_in_memory_once(tmp_path):
    path = tmp_path / "a.parquet"
    bomb = pa.DictionaryArray.from_arrays(pa.array([0] * 50_000, pa.int32()), pa.array(["x" * 2_000_000]))
    parquet.write_table(pa.table({"prompt": bomb}), path, store_schema=False, dictionary_pagesize_limit=1 << 30)
    assert path.stat().st_size < 1_000_000
    before = pa.total_allocated_bytes()
    rows = prompt_files._parquet_rows(path, None)
    assert len(next(rows)[1]) == 2_000_000
    assert pa.total_allocated_bytes() - before < 20_000_000
    rows.close()
    with pytest.raises(InputError, match="row 1: this has 2,000,000 characters"):
        read(path)


def test_without_pyarrow_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    path = write_table(tmp_path / "a.parquet", [{"prompt": "a"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'bakeout\[parquet\]'"):
        read(path)


@pytest.mark.parametrize("ending", [".txt", ".csv", ".jsonl", ".parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, ending):
    def peak(count: int) -> int:
        path = tmp_path / f"{count}{ending}"
        texts = [f"a prompt of some length, number {number}" for number in range(count)]
        if ending == ".txt":
            path.write_text("\n".join(texts), encoding="utf-8")
        elif ending == ".parquet":
            parquet.write_table(pa.table({"prompt": texts}), path, row_group_size=500)
        else:
            write_table(path, [{"prompt": text} for text in texts])
        del texts
        used = pa.total_allocated_bytes()
        tracemalloc.start()
        deque(PromptFile(path), maxlen=0)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert pa.total_allocated_bytes() == used
        return found

    peak(1_000)  # imports
    assert peak(40_000) < 1.5 * peak(1_000)


@pytest.mark.parametrize("ending", [".txt", ".csv", ".jsonl"])
def test_a_line_without_an_end_is_not_read_whole(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    path.write_bytes(b"a" * 50_000_000)
    tracemalloc.start()
    with pytest.raises(InputError, match="line 1 has more than 1,000,000 characters"):
        read(path)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
