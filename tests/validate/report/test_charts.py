"""Where lines and labels of the charts lie."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bakeout.validate.report.charts import interval_bar, scale_of, step_chart
from bakeout.validate.report.schema import Curve, Detection


def curve(*values, model="onnx"):
    return Curve(model=model, forced=True, kind="erased", relative_rms=values)


def drawn(curves, models=("base", "onnx", "diffusers")):
    return step_chart(curves, models, scale_of(curves), "title")


def test_a_decade_is_everywhere_as_high():
    scale = scale_of([curve(1e-7, 0.3)])
    assert (scale.low, scale.high, scale.zero) == (-7, 0, False)
    places = [scale.place(10.0**exponent) for exponent in range(-7, 1)]
    heights = [below - above for below, above in pairwise(places)]
    assert max(heights) - min(heights) < 1e-9
    assert min(heights) > 14


def test_zero_has_a_line_of_its_own():
    scale = scale_of([curve(0.0, 1e-7, 1.0)])
    assert scale.zero
    assert scale.place(0.0) - scale.place(1e-7) == 14
    assert next(text for _, text in scale.ticks()) == "0"
    assert scale_of([curve(0.0)]).zero


@given(st.lists(st.one_of(st.none(), st.just(0.0), st.floats(1e-300, 1e300)), max_size=60))
def test_every_curve_can_be_drawn(values):
    models = ("onnx", "a very long name of a target")
    chart = drawn([curve(*values, model=model) for model in models], models)
    lost = sum(value is None for value in values)
    assert sum("lost" in path.get("class") for path in chart.iter("path")) == 2 * lost
    points = " ".join(line.get("points") for line in chart.iter("polyline")).split()
    assert len(points) == 2 * (len(values) - lost)
    width, height = map(float, chart.get("viewBox").split()[2:])
    for x, y in (map(float, point.split(",")) for point in points):
        assert 0 < x < width
        assert 0 < y < height
    ticks = [float(text.get("y")) for text in chart.iter("text") if text.get("text-anchor") == "end"]
    assert all(abs(one - other) >= 12 for one, other in pairwise(ticks))
    assert len(ticks) >= 2


@pytest.mark.parametrize("ends", [(1e-7, 1e-7, 1e-7), (1.0, 0.9, 1.1), (0.0, 0.0, 1e-9), (1e-7, 1e-4, 1.0)])
def test_labels_do_not_overlap_and_stay_in_the_chart(ends):
    models = ("base", "onnx", "diffusers")
    chart = drawn([curve(0.5, end, model=model) for end, model in zip(ends, models, strict=True)])
    labels = {text.text: float(text.get("y")) for text in chart.iter("text") if "label" in (text.get("class") or "")}
    assert list(labels) == list(models)
    places = sorted(labels.values())
    assert all(after - before >= 13.9 for before, after in pairwise(places))
    assert 0 < places[0] < places[-1] <= 220


@pytest.mark.parametrize(
    ("steps", "ticks"),
    [(1, ["1"]), (4, ["1", "2", "3", "4"]), (20, ["1", "5", "10", "15", "20"]),
     (50, ["1", "10", "20", "30", "40", "50"]), (999, ["1", "200", "400", "600", "800"])],
)  # fmt: skip
def test_steps_are_counted_from_one_in_round_numbers(steps, ticks):
    chart = drawn([curve(*[0.1] * steps)])
    said = [text.text for text in chart.iter("text") if text.get("text-anchor") == "middle"]
    assert said == [*ticks, "step"]


def test_the_numbers_are_told_to_those_who_hear_them():
    label = drawn([curve(0.5, None, 1e-7), curve(None, model="diffusers"), curve(model="base")]).get("aria-label")
    assert "onnx: 1e-7 to 0.5, 1e-7 at the end, 1 step not finite" in label
    assert "diffusers: no number, 1 step not finite" in label


def test_each_model_looks_its_own_way():
    chart = drawn([curve(0.5, model=model) for model in ("base", "onnx", "diffusers")])
    assert [line.get("class") for line in chart.iter("polyline")] == ["line l0", "line l1", "line l2"]


@pytest.mark.parametrize(("detected", "low", "high"), [(0, 0.0, 0.26), (6, 0.2, 0.8), (12, 0.74, 1.0)])
def test_the_bar_is_the_interval(detected, low, high):
    values = {"concept": "star", "kind": "erased", "model": "onnx", "confidence": 0.95}
    _, bar, mark = interval_bar(Detection(detected=detected, pictures=12, low=low, high=high, **values))
    assert math.isclose(float(bar.get("x")), 100 * low, abs_tol=0.01)
    assert math.isclose(float(bar.get("x")) + float(bar.get("width")), 100 * high, abs_tol=0.01)
    assert 0 <= float(mark.get("x")) <= 98.5
    assert abs(float(mark.get("x")) + 0.75 - 100 * detected / 12) <= 0.76
