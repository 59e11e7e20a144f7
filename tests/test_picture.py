"""Pictures that somebody gives: read as they look, and refused before they cost anything."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from bakeout.editor.errors import InputError
from bakeout.picture import fitted_size, read_picture


def noise(width: int = 24, height: int = 16) -> Image.Image:
    return Image.effect_noise((width, height), 90).convert("RGB")


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG whose header promises pixels that it does not have."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("name", "exact"), [("a.png", True), ("a.jpg", False), ("a.webp", False), ("png.txt", True)])
def test_a_picture_is_read_whatever_its_file_is_called(tmp_path, name, exact):
    picture = noise()
    picture.save(tmp_path / name, format={"jpg": "JPEG", "webp": "WEBP"}.get(name.partition(".")[2], "PNG"))
    found = read_picture(tmp_path / name)
    assert (found.mode, found.size) == ("RGB", (24, 16))
    assert (found.tobytes() == picture.tobytes()) == exact


def test_it_is_upright_and_on_white(tmp_path):
    picture = noise()
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=turned)
    assert read_picture(tmp_path / "turned.png").tobytes() == picture.transpose(Image.Transpose.ROTATE_270).tobytes()
    clear = picture.convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    assert read_picture(tmp_path / "clear.png").getcolors() == [(24 * 16, (255, 255, 255))]
    for mode in ("L", "LA", "P", "1", "I;16"):
        noise().convert("L").convert(mode).save(tmp_path / "mode.png")
        assert read_picture(tmp_path / "mode.png").mode == "RGB"


@pytest.mark.parametrize(("width", "height"), [(8000, 8001), (12_000, 12_000), (100_000, 100_000)])
def test_a_picture_that_claims_to_be_huge_is_refused(tmp_path, width, height):
    (tmp_path / "huge.png").write_bytes(png_that_claims(width, height))
    with pytest.raises(InputError, match=f"has {width}x{height} pixels, more than 64,000,000|exceeds limit"):
        read_picture(tmp_path / "huge.png")


def test_what_is_no_picture_is_refused(tmp_path):
    whole = tmp_path / "whole.png"
    noise(200, 200).save(whole)
    files = {
        "cut.png": whole.read_bytes()[:-900],
        "header.png": png_that_claims(8, 8),
        "text.png": b"hello",
        "empty.png": b"",
        "program.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit\n",
    }
    noise().save(tmp_path / "a.gif")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name in [*files, "a.gif"]:
        with pytest.raises(InputError, match=f"{name} (cannot be read as|is no) (a )?picture") as refused:
            read_picture(tmp_path / name)
        assert "\n" not in str(refused.value)
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path, tmp_path / "none.png", tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(InputError, match="is no file"):
            read_picture(path)


@pytest.mark.parametrize(
    ("size", "fitted"),
    [
        ((512, 512), (512, 512)),
        ((4000, 4000), (512, 512)),
        ((4000, 3000), (592, 440)),
        ((30, 40), (440, 592)),
        ((800, 100), (1448, 184)),
    ],
)
def test_a_size_fits(size, fitted):
    assert fitted_size(size, 512, 8) == fitted


def test_a_size_is_never_nothing_and_a_strip_is_refused():
    assert fitted_size((80, 10), 8, 8) == (24, 8)
    with pytest.raises(InputError, match=r"64x1, too long to fit: choose the size to draw with --size"):
        fitted_size((64, 1), 512, 8)
