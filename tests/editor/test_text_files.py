from __future__ import annotations

import os

import pytest

from bakeout.editor.errors import InputError
from bakeout.editor.text_files import read_text, text_fault


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_every_unicode_encoding_that_says_so_is_read(tmp_path, encoding):
    path = tmp_path / "text.csv"
    path.write_bytes("Dalí,ガ\n".encode(encoding))
    assert read_text(path, 100) == "Dalí,ガ\n"


def test_big_endian_utf_16_is_read(tmp_path):
    path = tmp_path / "text.csv"
    path.write_bytes("\ufeffDalí".encode("utf-16-be"))
    assert read_text(path, 100) == "Dalí"


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"fine\nDal\xed\n", "line 2: this is not UTF-8 text; save the file as UTF-8"),
        (b"\xff\xfea\x00b", "this is not UTF-16 text; save the file as UTF-8"),
    ],
)
def test_another_encoding_is_refused_by_its_line(tmp_path, raw, words):
    path = tmp_path / "text.csv"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=words) as caught:
        read_text(path, 100)
    assert str(path) in str(caught.value)


def test_the_limit_is_the_largest_size(tmp_path):
    path = tmp_path / "text.csv"
    path.write_bytes(b"x" * 100)
    assert len(read_text(path, 100)) == 100
    with pytest.raises(InputError, match=r"has more than 99 bytes; give a smaller file"):
        read_text(path, 99)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    for name, words in (
        (".", "is not a file"),
        ("pipe", "is not a file"),
        ("none", "does not exist"),
        ("file/below", "cannot be read"),
        ("x" * 300, "cannot be read"),
        ("a\0b", "is not a path"),
    ):
        with pytest.raises(InputError, match=words):
            read_text(tmp_path / name, 100)


@pytest.mark.parametrize("text", ["a", "Dalí", "group of friends", "👩\u200d🎨", "x" * 20])
def test_a_line_of_text_has_no_fault(text):
    assert text_fault(text, 20) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        (" \t\u00a0", "is empty"),
        ("x" * 21, "has 21 characters; write at most 20"),
        ("a\nb", r"control character '\n' at place 2"),
        ("\x1b[31mred", r"control character '\x1b' at place 1"),
        ("a\u2028b", r"control character '\u2028' at place 2"),
        ("a\u2029b", r"control character '\u2029' at place 2"),
        ("\ud800", r"control character '\ud800' at place 1"),
        ("a\0", r"control character '\x00' at place 2"),
    ],
)
def test_what_is_no_line_of_text_has_one(text, words):
    assert words in text_fault(text, 20)
