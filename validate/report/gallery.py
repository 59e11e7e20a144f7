"""The pictures of `report.html`: the same prompt and seed drawn by every model, side by side."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from bakeout.validate.report.markup import count, element, folded, foreign, number, row, table
from bakeout.validate.report.schema import Drawn, Kind, Scene

# How many scenes of a kind are shown: the first of all, those least like the reference, and those with a problem. The
# page carries every picture that it shows, and a validation of 600 prompts draws 1,800 or more.
FIRST, LEAST, PROBLEMS = 12, 2, 24
# A larger picture is shown as a smaller one: a page of pictures of 1024 pixels could not be opened on a phone.
_PREVIEW = 256
_PIXEL_ART = 128


@dataclass(frozen=True)
class Choice:
    """Which scenes of a kind are shown.

    Attributes:
        shown: their numbers, counted from 0: those with a problem first, else in order.
        left_out: the numbers of the others.
        with_problem: how many scenes have a problem, shown or not.
        least: the numbers of those that are shown because they are least like the reference.
    """

    shown: tuple[int, ...]
    left_out: tuple[int, ...]
    with_problem: int
    least: frozenset[int]


def choose(scenes: Sequence[Scene], kind: Kind, models: Sequence[str]) -> Choice:
    """Which of the scenes of `kind` to show; a scene has a problem if a picture has one, or a model drew none."""
    numbers = [index for index, scene in enumerate(scenes) if scene.kind == kind]
    problems = [index for index in numbers if _has_problem(scenes[index], models)]
    likeness = {index: _likeness(scenes[index]) for index in numbers if index not in set(problems)}
    differing = [index for index in likeness if likeness[index] < math.inf]
    least = frozenset(sorted(differing, key=lambda index: likeness[index])[:LEAST])
    shown = {*problems[:PROBLEMS], *least, *numbers[:FIRST]}
    return Choice(
        shown=tuple(sorted(shown, key=lambda index: (index in likeness, index))),
        left_out=tuple(index for index in numbers if index not in shown),
        with_problem=len(problems),
        least=least,
    )


def gallery(
    scenes: Sequence[Scene], kind: Kind, models: Sequence[str], pictures: Mapping[str, bytes]
) -> Iterator[Element]:
    """The scenes of a kind: what is shown, and the names of the files of the rest."""
    choice = choose(scenes, kind, models)
    problems = f"; {count(choice.with_problem, 'scene')} with a problem" if choice.with_problem else ""
    shown, drawn = len(choice.shown), len(choice.shown) + len(choice.left_out)
    rest = ""
    if choice.left_out:
        rest = ": those with a problem, the least like the reference, and the first. The others are files in pictures/"
    yield element("p", f"{shown} of {drawn} shown{rest}{problems}.", class_="note")
    cards = (_card(index, scenes[index], models, pictures, least=index in choice.least) for index in choice.shown)
    yield element("div", *cards, class_="scenes")
    if choice.left_out:
        rows = [_left_out(scenes[index], models) for index in choice.left_out]
        label = f"The other {count(len(rows), 'prompt')} and their files"
        yield folded(label, table(label, ("prompt", "seed", "files"), rows))


def _card(index: int, scene: Scene, models: Sequence[str], pictures: Mapping[str, bytes], *, least: bool) -> Element:
    shown = [_figure(scene, model, pictures) for model in models]
    head = element("h4", element("span", f"{index + 1}", class_="ordinal"), foreign(scene.prompt))
    note = f"seed {scene.seed}{', least like the reference' if least else ''}"
    return element(
        "article",
        head,
        element("p", note, class_="note"),
        element("div", *shown, class_="side-by-side"),
    )


def _figure(scene: Scene, model: str, pictures: Mapping[str, bytes]) -> Element:
    drawn = scene.drawn.get(model)
    if drawn is None:
        return element(
            "figure", element("div", "no picture", class_="empty"),
            element("figcaption", element("b", model), element("span", "drew no picture", class_="problem")),
        )  # fmt: skip
    width, height, kind, preview = _preview(pictures[drawn.file])
    picture = element(
        "img", src=f"data:image/{kind};base64,{base64.b64encode(preview).decode()}", width=width, height=height,
        alt=f"{model}, seed {scene.seed}: {drawn.seen or scene.prompt[:80]}",
        class_="pixels" if max(width, height) <= _PIXEL_ART else None,
    )  # fmt: skip
    facts = (element("span", fact) for fact in _facts(model, drawn))
    problem = element("span", drawn.problem, class_="problem") if drawn.problem else None
    caption = element("figcaption", element("b", model), problem, *facts)
    return element("figure", element("a", picture, href=drawn.file), caption)


def _facts(model: str, drawn: Drawn) -> Iterator[str]:
    if drawn.seen is not None:
        yield f"seen: {drawn.seen}"
    if model == "reference":
        return
    if drawn.max_difference == 0:
        yield "identical to the reference"
        return
    if drawn.max_difference is not None:
        yield f"off by up to {drawn.max_difference}"
    if drawn.psnr_db is not None:
        yield f"PSNR {number(drawn.psnr_db)} dB"
    if drawn.ssim is not None:
        yield f"SSIM {drawn.ssim:.4f}"


def _left_out(scene: Scene, models: Sequence[str]) -> Element:
    files = element("span")
    for model in models:
        drawn = scene.drawn.get(model)
        link = element("a", model, href=drawn.file) if drawn else element("span", f"{model}: none", class_="problem")
        problem = element("span", f" ({drawn.problem})", class_="problem") if drawn and drawn.problem else None
        files.append(element("span", link, problem, " "))
    return row(foreign(scene.prompt, 80), str(scene.seed), files)


def _has_problem(scene: Scene, models: Sequence[str]) -> bool:
    return any(model not in scene.drawn or scene.drawn[model].problem for model in models)


def _likeness(scene: Scene) -> float:
    """PSNR in dB of the picture that is least like the reference's; the base's own is not asked."""
    found = [drawn.psnr_db for model, drawn in scene.drawn.items() if model not in ("base", "reference")]
    return min((psnr for psnr in found if psnr is not None), default=math.inf)


def _preview(png: bytes) -> tuple[int, int, str, bytes]:
    """Width, height, format and bytes of a picture at the size at which the page carries it."""
    from PIL import Image

    with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
        if max(picture.size) <= _PREVIEW:
            return *picture.size, "png", png
        small = picture.convert("RGB")
    small.thumbnail((_PREVIEW, _PREVIEW))
    made = io.BytesIO()
    small.save(made, "JPEG", quality=88)
    return *small.size, "jpeg", made.getvalue()
