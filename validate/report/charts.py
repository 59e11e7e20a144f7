"""The pictures of numbers in `report.html`, as SVG that CSS colours: nothing here has a colour of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from xml.etree.ElementTree import Element

from bakeout.validate.report.markup import count, element, number
from bakeout.validate.report.schema import Curve, Detection

# In units of which a phone has about one a pixel, so that text of 12 can be read there.
_WIDTH, _HEIGHT = 332, 252
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 76, 30, 212
_LINE = 14
_LONGEST_LABEL = 11
_MOST_MARKERS = 30


@dataclass(frozen=True)
class Scale:
    """A logarithmic axis of whole decades, 10^low at the bottom to 10^high at the top, and a place for zero.

    Attributes:
        low: exponent.
        high: exponent, above `low`.
        zero: whether there is a line for zero below 10^low.
    """

    low: int
    high: int
    zero: bool

    def place(self, value: float) -> float:
        """The y coordinate of a value that is not negative; what is off the scale is put on its edge."""
        if value <= 0:
            return _BOTTOM
        bottom = _BOTTOM - (_LINE if self.zero else 0)
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return bottom - min(max(share, 0.0), 1.0) * (bottom - _TOP)

    def ticks(self) -> Iterator[tuple[float, str]]:
        """Places and texts, as many as there is room for."""
        if self.zero:
            yield _BOTTOM, "0"
        every = -(-(self.high - self.low) // 8)
        for exponent in range(self.high, self.low - 1, -every):
            yield self.place(10.0**exponent), f"1e{exponent}"


def scale_of(curves: Sequence[Curve]) -> Scale:
    """A scale that holds all of the curves."""
    values = [value for curve in curves for value in curve.relative_rms if value is not None]
    above = [math.log10(value) for value in values if value > 0] or [0.0]
    low, high = math.floor(min(above)), math.ceil(max(above))
    return Scale(low, max(high, low + 1), zero=any(value <= 0 for value in values))


def step_chart(curves: Sequence[Curve], models: Sequence[str], scale: Scale, title: str) -> Element:
    """Distance to the reference (up, logarithmic) after each step (right), a line for each curve, labelled at its end.

    Args:
        curves: of one panel.
        models: all models of the report, whose order decides how a line looks.
        scale: of all panels.
        title: for those who hear it, with the numbers.
    """
    steps = max(1, *(len(curve.relative_rms) for curve in curves))
    xs = [_LEFT + 8 + (_WIDTH - _LEFT - _RIGHT - 16) * (step / max(steps - 1, 1)) for step in range(steps)]
    parts = [*_axes(scale, xs)]
    ends = []
    for curve in curves:
        style = f"line l{models.index(curve.model) % 4}"
        parts += _line(curve, xs, scale, style)
        ends.append((_end(curve, scale), curve.model, style))
    for (_, model, style), y in zip(ends, _spread([y for y, _, _ in ends]), strict=True):
        label = model if len(model) <= _LONGEST_LABEL else f"{model[: _LONGEST_LABEL - 1]}…"
        parts.append(element("text", label, x=_WIDTH - _RIGHT + 6, y=_y(y + 4), class_=f"{style} label"))
    told = "; ".join(f"{curve.model}: {_in_words(curve)}" for curve in curves)
    return element("svg", *parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=f"{title}. {told}")


def interval_bar(detection: Detection) -> Element:
    """From 0 to 1: the interval as a bar, and the share that was found as a line in it."""
    low, high = 100 * detection.low, 100 * detection.high
    share = 100 * detection.detected / max(detection.pictures, 1)
    return element(
        "svg",
        element("rect", x=0, y=5, width=100, height=2, class_="track"),
        element("rect", x=f"{low:.2f}", y=3, width=f"{max(high - low, 0.5):.2f}", height=6, class_="interval"),
        element("rect", x=f"{min(max(share - 0.75, 0), 98.5):.2f}", y=0, width=1.5, height=12, class_="share"),
        viewBox="0 0 100 12", preserveAspectRatio="none", class_="bar", aria_hidden="true",
    )  # fmt: skip


def _axes(scale: Scale, xs: Sequence[float]) -> Iterator[Element]:
    for y, text in scale.ticks():
        yield element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=_y(y), y2=_y(y), class_="grid")
        yield element("text", text, x=_LEFT - 6, y=_y(y + 4), text_anchor="end")
    for step in _step_ticks(len(xs)):
        x = _y(xs[step - 1])
        yield element("line", x1=x, x2=x, y1=_BOTTOM + 6, y2=_BOTTOM + 10, class_="tick")
        yield element("text", str(step), x=x, y=_BOTTOM + 22, text_anchor="middle")
    yield element("text", "relative RMS", x=0, y=12)
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    yield element("text", "step", x=middle, y=_HEIGHT - 4, text_anchor="middle")


def _step_ticks(steps: int) -> list[int]:
    """The first step, and round numbers: at most seven."""
    every = next(size for ten in (1, 10, 100, 1000) for size in (ten, 2 * ten, 5 * ten) if steps <= 6 * size)
    return [1, *(step for step in range(every, steps + 1, every) if step - 1 >= every / 2)]


def _line(curve: Curve, xs: Sequence[float], scale: Scale, style: str) -> Iterator[Element]:
    points = [(x, value) for x, value in zip(xs, curve.relative_rms, strict=False)]
    for finite, run in groupby(points, key=lambda point: point[1] is not None):
        if finite:
            placed = [(_y(x), _y(scale.place(value))) for x, value in run if value is not None]
            yield element("polyline", points=" ".join(f"{x},{y}" for x, y in placed), class_=style)
            if len(xs) <= _MOST_MARKERS or len(placed) == 1:
                yield from (element("circle", cx=x, cy=y, r=2.2, class_=style) for x, y in placed)
        else:
            # Crosses on the upper edge, since a line that ends says nothing.
            yield from (
                element("path", d=f"M{_y(x - 3)},{_TOP - 3}l6,6m0,-6l-6,6", class_=f"{style} lost") for x, _ in run
            )


def _end(curve: Curve, scale: Scale) -> float:
    last = curve.relative_rms[-1] if curve.relative_rms else None
    return _TOP if last is None else scale.place(last)


def _spread(wanted: Sequence[float]) -> list[float]:
    """Places for lines of text, near the wanted ones, in their order, that do not overlap."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = list(wanted)
    for before, index in pairwise(order):
        placed[index] = max(placed[index], placed[before] + _LINE)
    beyond = max(placed, default=0.0) - _BOTTOM
    if beyond > 0:
        limit = float(_BOTTOM)
        for index in reversed(order):
            placed[index] = min(placed[index], limit)
            limit = placed[index] - _LINE
    return placed


def _in_words(curve: Curve) -> str:
    finite = [value for value in curve.relative_rms if value is not None]
    lost = len(curve.relative_rms) - len(finite)
    told = f"{number(min(finite))} to {number(max(finite))}, {number(finite[-1])} at the end" if finite else "no number"
    return f"{told}, {count(lost, 'step')} not finite" if lost else told


def _y(value: float) -> float:
    return round(value, 1)
