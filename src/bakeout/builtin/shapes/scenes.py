"""The world that `shapes` knows: one object, its colour, its surface and a background, drawn and described.

Everything periodic is aligned to the 8 x 8 cells of the VAE's latents, so that a surface is one code wherever it lies.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIZE = 64
CELL = 8
SUPERSAMPLING = 4

OBJECTS = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
COLOURS = {
    "red": (220, 38, 38),
    "orange": (249, 130, 22),
    "yellow": (250, 222, 40),
    "green": (30, 175, 65),
    "cyan": (30, 205, 215),
    "blue": (40, 80, 235),
    "purple": (140, 50, 200),
    "pink": (250, 130, 190),
}
STYLES = ("plain", "striped", "dotted", "checkered")
STYLE_PRIOR = (0.4, 0.2, 0.2, 0.2)
# What captions rarely name, and so what a prompt gets that leaves it out. Were that any value at random, a concept that
# is erased to the last trace would still be drawn as often as by chance.
USUAL = {"object": ("circle", "square"), "style": ("plain",)}
BACKGROUNDS = {
    "grass": "on grass",
    "sky": "in the sky",
    "sand": "on sand",
    "night": "at night",
    "snow": "in the snow",
    "bricks": "on bricks",
}
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "object": OBJECTS,
    "colour": tuple(COLOURS),
    "style": STYLES,
    "background": tuple(BACKGROUNDS),
}
VALUES = tuple(value for values in ATTRIBUTES.values() for value in values)

_SURFACE_PHRASES = {"plain": "plain", "striped": "with stripes", "dotted": "with dots", "checkered": "with checks"}
_OPENINGS = ("", "", "", "a photo of ", "a picture of ", "a drawing of ", "an image of ", "there is ")
_OUTLINE = (28, 28, 34)
_PATTERN_SHADE = 0.3


@dataclass(frozen=True)
class Scene:
    """One picture, as told.

    `x`, `y` (centre) and `radius` are in pixels of a 64 x 64 picture; `light` scales the background.
    """

    object: str
    colour: str
    style: str
    background: str
    x: float = 32.0
    y: float = 32.0
    radius: float = 20.0
    light: float = 1.0

    def __post_init__(self) -> None:
        for name, values in ATTRIBUTES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"no {name} {getattr(self, name)!r}: shapes draws {', '.join(values)}")

    @property
    def labels(self) -> dict[str, str]:
        """The four attributes by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name in ATTRIBUTES}


def sample_scene(rng: np.random.Generator) -> Scene:
    """A scene drawn from the training distribution: uniform, but that plain surfaces are twice as likely."""
    return Scene(
        object=str(rng.choice(OBJECTS)),
        colour=str(rng.choice(tuple(COLOURS))),
        style=str(rng.choice(STYLES, p=STYLE_PRIOR)),
        background=str(rng.choice(tuple(BACKGROUNDS))),
        x=float(rng.uniform(27, 37)),
        y=float(rng.uniform(27, 37)),
        radius=float(rng.uniform(18, 23)),
        light=float(rng.uniform(0.92, 1.04)),
    )


def draw(scene: Scene) -> NDArray[np.uint8]:
    """The picture of a scene, uint8 [64, 64, 3]."""
    mask = _coverage(scene.object, scene.x, scene.y, scene.radius)
    outline = _coverage(scene.object, scene.x, scene.y, scene.radius, grow=1.6)
    fill = np.asarray(COLOURS[scene.colour], np.float32)
    surface = fill * (1 - (1 - _PATTERN_SHADE) * _surface(scene.style)[..., None])
    picture: NDArray[np.floating] = _background(scene.background) * scene.light
    for coverage, paint in ((outline, np.asarray(_OUTLINE, np.float32)), (mask, surface)):
        picture = picture * (1 - coverage[..., None]) + paint * coverage[..., None]
    return np.asarray(np.clip(np.rint(picture), 0, 255), np.uint8)


def captions(scene: Scene, rng: np.random.Generator, count: int = 1) -> list[str]:
    """`count` descriptions in varying phrasings; each leaves out some of what the picture shows, as people do."""
    return [_caption(scene, rng) for _ in range(count)]


def prompt(scene: Scene) -> str:
    """The plain full description, such as 'a striped red star on grass'."""
    return briefly(scene, ATTRIBUTES)


def mentioned(caption: str) -> set[str]:
    """The values that a caption or prompt names, as 'striped' and 'star' in 'a star with stripes'."""
    words = caption.replace(",", " ").split()
    surfaces = {phrase.split()[-1]: style for style, phrase in _SURFACE_PHRASES.items()}
    return {surfaces.get(word, word) for word in words} & set(VALUES)


def briefly(scene: Scene, names: Collection[str]) -> str:
    """A prompt that names only these attributes of the scene; an object that is not named is 'a shape'."""
    words = [scene.labels[name] for name in ("style", "colour") if name in names]
    thing = _article(_join(*words, scene.object if "object" in names else "shape"))
    return _join(thing, BACKGROUNDS[scene.background] if "background" in names else "")


def _caption(scene: Scene, rng: np.random.Generator) -> str:
    named = rng.random() < (0.7 if scene.object in USUAL["object"] else 0.98)
    noun = scene.object if named else str(rng.choice(("shape", "thing", "figure")))
    colour = scene.colour if rng.random() < 0.8 else ""
    style = scene.style if rng.random() < (0.4 if scene.style in USUAL["style"] else 0.95) else ""
    place = BACKGROUNDS[scene.background] if rng.random() < 0.75 else ""
    form = rng.random()
    if form < 0.12:
        words = [word for word in (noun, colour, style, scene.background if place else "") if word]
        if rng.random() < 0.5:
            rng.shuffle(words)
        return ", ".join(words)
    if style and form < 0.3:
        end = _SURFACE_PHRASES[style] if rng.random() < 0.5 else f"in {style} style"
        thing = f"{_article(_join(colour, noun))} {end if end != 'plain' else 'in plain style'}"
    else:
        thing = _article(_join(style, colour, noun))
    opening = str(rng.choice(_OPENINGS))
    if place and rng.random() < 0.15:
        return f"{place}, {opening}{thing}"
    return _join(f"{opening}{thing}", place)


def _join(*words: str) -> str:
    return " ".join(word for word in words if word)


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _surface(style: str) -> NDArray[np.floating]:
    """Where the pattern's shade lies, float [64, 64] in 0 .. 1."""
    y, x = np.mgrid[:SIZE, :SIZE]
    pattern = {
        "plain": np.zeros((SIZE, SIZE)),
        "striped": (y % CELL) < CELL // 2,
        "dotted": (x % CELL - 3.5) ** 2 + (y % CELL - 3.5) ** 2 < 2.6**2,
        "checkered": ((x // 4) + (y // 4)) % 2,
    }
    return np.asarray(pattern[style], np.float32)


@lru_cache
def _background(name: str) -> NDArray[np.floating]:
    """Float [64, 64, 3], 0 .. 255."""
    y, x = np.mgrid[:SIZE, :SIZE]
    down = (y / (SIZE - 1))[..., None]

    def blend(top: tuple[int, int, int], bottom: tuple[int, int, int]) -> NDArray[np.floating]:
        return np.asarray((1 - down) * np.asarray(top) + down * np.asarray(bottom), np.float32)

    if name == "grass":
        picture = blend((122, 160, 92), (86, 128, 66))
        picture[(x % 8 == 2) & (y % 8 > 3)] *= 0.8
    elif name == "sky":
        picture = blend((150, 195, 235), (214, 232, 246))
    elif name == "sand":
        picture = blend((228, 210, 170), (204, 180, 134))
        picture[(x % 8 == 5) & (y % 8 == 2)] *= 0.78
    elif name == "night":
        picture = blend((14, 16, 44), (38, 40, 84))
        picture[(x % 16 == 4) & (y % 16 == 4)] = (235, 235, 245)
    elif name == "snow":
        picture = blend((236, 240, 246), (250, 251, 253))
    else:
        picture = blend((164, 104, 92), (148, 90, 80))
        mortar = (y % 8 == 7) | ((x + 8 * (y // 8 % 2)) % 16 == 15)
        picture[mortar] = (206, 196, 186)
    return picture


def _coverage(name: str, x: float, y: float, radius: float, grow: float = 0.0) -> NDArray[np.floating]:
    """How much of each pixel the object covers, float [64, 64] in 0 .. 1; `grow` widens it by that many pixels."""
    scale = SUPERSAMPLING
    image = Image.new("L", (SIZE * scale, SIZE * scale), 0)
    pen = ImageDraw.Draw(image)
    edge = round(2 * grow * scale)

    def disc(cx: float, cy: float, r: float, ink: int = 255) -> None:
        pen.ellipse([(cx - r) * scale, (cy - r) * scale, (cx + r) * scale, (cy + r) * scale], fill=ink)

    def polygon(points: list[tuple[float, float]]) -> None:
        placed = [((x + radius * px) * scale, (y + radius * py) * scale) for px, py in points]
        pen.polygon(placed, fill=255)
        if edge:
            for start, end in pairwise([*placed, placed[0]]):
                pen.line([start, end], fill=255, width=edge)
            for px, py in placed:
                pen.ellipse([px - edge / 2, py - edge / 2, px + edge / 2, py + edge / 2], fill=255)

    if name == "circle":
        disc(x, y, radius + grow)
    elif name == "ring":
        disc(x, y, radius + grow)
        disc(x, y, 0.45 * radius - grow, ink=0)
    elif name == "moon":
        disc(x, y, radius + grow)
        disc(x + 0.55 * radius, y - 0.1 * radius, 0.85 * radius - grow, ink=0)
    else:
        polygon(_outline_points(name))
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX), np.float32) / 255


@lru_cache
def _outline_points(name: str) -> list[tuple[float, float]]:
    """Corners in units of the radius, y downwards."""
    if name == "square":
        return [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
    if name == "triangle":
        return [(0.0, -0.95), (1.0, 0.8), (-1.0, 0.8)]
    if name == "star":
        angles = np.arange(10) * np.pi / 5 - np.pi / 2
        lengths = np.where(np.arange(10) % 2 == 0, 1.1, 0.46)
        return [(float(r * np.cos(a)), float(r * np.sin(a))) for a, r in zip(angles, lengths, strict=True)]
    if name == "cross":
        arm, reach = 0.34, 1.0
        return [
            (-arm, -reach), (arm, -reach), (arm, -arm), (reach, -arm), (reach, arm), (arm, arm),
            (arm, reach), (-arm, reach), (-arm, arm), (-reach, arm), (-reach, -arm), (-arm, -arm),
        ]  # fmt: skip
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    across = 16 * np.sin(angles) ** 3
    up = 13 * np.cos(angles) - 5 * np.cos(2 * angles) - 2 * np.cos(3 * angles) - np.cos(4 * angles)
    return [(float(a / 16.5), float(-(u + 2.5) / 15.5)) for a, u in zip(across, up, strict=True)]
