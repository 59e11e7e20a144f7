"""Prompts in files, as many as a data set has: read again from the start whenever asked, and never held in memory."""

from __future__ import annotations

import codecs
import csv
import json
import re
import stat
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TextIO

from bakeout.editor.errors import InputError

MAX_LINE = 1_000_000  # characters
MAX_PROMPT = 100_000  # characters; CLIP reads 77 tokens
MAX_COLUMN_BYTES = 1 << 30  # of a row group of a Parquet file, which is read at once
# What a column of prompts is usually called: taken, in this order, where nobody says which one.
USUAL_COLUMNS = ("prompt", "caption", "text")
_ROWS_AT_A_TIME = 1024
_SURROGATE = re.compile("[\ud800-\udfff]")
_NAMED = 20


@dataclass(frozen=True)
class PromptFile:
    """The prompts in a file, in its order; iterating reads it from the start, a line or a few rows at a time.

    By its ending it is `.txt`, a prompt a line; `.csv` or `.tsv`, whose first line names the columns; `.jsonl`, an
    object a line; or `.parquet`. Text is UTF-8, or UTF-16 with a byte order mark. What is blank or null is skipped.

    Attributes:
        path: of the file.
        column: which column, or key of the objects, the prompts are in; None takes the only one, or else the first of
            `USUAL_COLUMNS` that is there. A `.txt` file has none.

    Raises:
        InputError: another ending, or, on iterating: no such file or column, a line or row that cannot be read, by its
            number, or pyarrow is not installed.
    """

    path: Path
    column: str | None = None

    def __post_init__(self) -> None:
        if self.path.suffix.lower() not in _READERS:
            raise InputError(f"{self.path} is no file of prompts; give one that ends in {', '.join(_READERS)}")

    def __iter__(self) -> Iterator[str]:
        _refuse_unless_file(self.path)
        with closing(_READERS[self.path.suffix.lower()](self.path, self.column)) as rows:
            for where, value in rows:
                text = "" if value is None else _prompt(where, value)
                if text:
                    yield text


def _prompt(where: str, value: object) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: this is no text; name the column of the prompts with --column")
    text = value.strip()
    if len(text) > MAX_PROMPT:
        raise InputError(f"{where}: this has {len(text):,} characters; a prompt has at most {MAX_PROMPT:,}")
    if _SURROGATE.search(text):
        raise InputError(f"{where}: this has half of a surrogate pair, which is no text; take it out")
    return text


# Of each prompt where it stands, and what stands there.
_Rows = Generator[tuple[str, object]]


def is_table(path: Path) -> bool:
    """Whether a file of this ending has columns."""
    return path.suffix.lower() != ".txt"


def _refuse_unless_file(path: Path) -> None:
    try:
        # A FIFO or a device would block or never end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path} is not a file; give the path of a file of prompts")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path!s:.300} cannot be read ({error.strerror}); check the path and its permissions")


def _lines(path: Path, newline: str | None) -> Generator[str]:
    """The lines of a text file with their ends; none is longer than MAX_LINE."""
    number = 0
    encoding = "UTF-8"
    try:
        with path.open("rb") as stream:
            if stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                encoding = "UTF-16"
        with _text(path, encoding, newline) as text:
            while line := text.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise InputError(f"{path}, line {number} has more than {MAX_LINE:,} characters; split it")
                yield line
    except UnicodeError:
        raise InputError(f"{path}, after line {number}: this is not {encoding} text; save the file as UTF-8") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _text(path: Path, encoding: str, newline: str | None) -> TextIO:
    return path.open(encoding={"UTF-8": "utf-8-sig"}.get(encoding, encoding), newline=newline)


def _text_rows(path: Path, _column: str | None) -> _Rows:
    with closing(_lines(path, None)) as lines:
        for number, line in enumerate(lines, 1):
            yield f"{path}, line {number}", line


def _delimited_rows(delimiter: str, path: Path, column: str | None) -> _Rows:
    with closing(_lines(path, "")) as lines:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        place: int | None = None
        try:
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if not row:
                    continue
                if place is None:
                    names = [name.strip() for name in row]
                    place = names.index(_chosen(path, names, column))
                elif len(row) <= place:
                    raise InputError(f"{where}: this has {len(row)} columns, and the prompts are in number {place + 1}")
                else:
                    yield where, row[place]
        except csv.Error as error:
            raise InputError(
                f"{path}, line {reader.line_num}: {error}; close every quote, and double those inside quotes"
            ) from None


def _json_rows(path: Path, column: str | None) -> _Rows:
    chosen: str | None = None
    with closing(_lines(path, None)) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                said = json.loads(line)
            except (ValueError, RecursionError):
                said = None
            if not isinstance(said, dict):
                raise InputError(f'{where}: this is no object; write one such as {{"prompt": "…"}} a line')
            if chosen is None:
                chosen = _chosen(path, list(said), column)
            if chosen not in said:
                raise InputError(f"{where}: this has no {chosen!a:.100}; give every line one, null where there is none")
            yield where, said[chosen]


def _parquet_rows(path: Path, column: str | None) -> _Rows:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            f"{path} needs pyarrow, which is not installed; run `pip install 'bakeout[parquet]'`"
        ) from None
    row = 0
    try:
        schema = parquet.read_schema(path)
        chosen = _chosen(path, schema.names, column)
        kind = schema.field(chosen).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)):
            raise InputError(f"{path}: the column {chosen!a:.100} is {kind} and no text; name another with --column")
        # Without buffering ahead, which keeps what was read until the file is closed; and as a dictionary, so that a
        # long text that a small file repeats is in memory once.
        with parquet.ParquetFile(path, pre_buffer=False, read_dictionary=[chosen]) as file:
            for group in range(file.num_row_groups):
                _refuse_large_group(path, file.metadata.row_group(group), chosen)
                batches = file.iter_batches(_ROWS_AT_A_TIME, row_groups=[group], columns=[chosen], use_threads=False)
                for value in chain.from_iterable(batch.column(0) for batch in batches):
                    row += 1
                    yield f"{path}, row {row}", value.as_py()
    except (OSError, ValueError, pa.ArrowException) as error:
        if isinstance(error, InputError):
            raise
        fault = str(error).partition("\n")[0]
        raise InputError(
            f"{path}, after row {row}: this is not a whole Parquet file ({fault:.200}); take it from its source again"
        ) from None


def _refuse_large_group(path: Path, group: object, column: str) -> None:
    """Memory is for a row group's column at a time, so that is what must not be large."""
    columns = (group.column(place) for place in range(group.num_columns))  # type: ignore[attr-defined]
    size = sum(it.total_uncompressed_size for it in columns if it.path_in_schema.partition(".")[0] == column)
    if size > MAX_COLUMN_BYTES:
        raise InputError(
            f"{path} has a row group of {size:,} bytes, and {MAX_COLUMN_BYTES:,} are read at most: write it with "
            "smaller row groups"
        )


def _chosen(path: Path, names: Sequence[str], column: str | None) -> str:
    """The name of the column of the prompts among `names`."""
    listed = ", ".join(f"{name!a:.100}" for name in names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
    if column is not None:
        if column not in names:
            raise InputError(f"{path} has no column {column!a:.100}; it has {listed or 'none'}")
        return column
    if len(names) == 1:
        return names[0]
    for usual in USUAL_COLUMNS:
        if usual in names:
            return usual
    raise InputError(f"{path} has the columns {listed or '(none)'}; say with --column which of them has the prompts")


_READERS: Mapping[str, Callable[[Path, str | None], _Rows]] = {
    ".txt": _text_rows,
    ".csv": partial(_delimited_rows, ","),
    ".tsv": partial(_delimited_rows, "\t"),
    ".jsonl": _json_rows,
    ".parquet": _parquet_rows,
}
