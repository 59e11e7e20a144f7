"""`report.html`: one page that needs nothing but itself: no network, no script, no other file."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final
from xml.etree.ElementTree import Element

from pydantic import JsonValue

from bakeout.validate.report.charts import interval_bar, scale_of, step_chart
from bakeout.validate.report.gallery import gallery
from bakeout.validate.report.markup import count, element, folded, foreign, number, row, table, to_html
from bakeout.validate.report.schema import Check, Curve, Detection, Kind, Report, TensorParity, Verdict

_STYLE = Path(__file__).with_name("report.css")
_KINDS: Final[tuple[Kind, ...]] = ("erased", "kept")
_PROMPTS: Mapping[Kind, str] = {"erased": "prompts with what was erased", "kept": "prompts without it"}
_SIGNS: Mapping[Verdict, str] = {"pass": "✓", "fail": "✕", "unjudged": "?"}
_WORDS: Mapping[Verdict, str] = {"pass": "Pass", "fail": "Fail", "unjudged": "Could not judge"}
_ORDER: tuple[Verdict, ...] = ("fail", "unjudged", "pass")
# Rows of the table of tensors that are there without unfolding, and in all.
_TOP_TENSORS, _MOST_TENSORS = 12, 400


def to_page(report: Report, pictures: Mapping[str, bytes]) -> str:
    """The page.

    Args:
        report: what was found.
        pictures: PNGs by the names of the report's files.
    """
    style = _STYLE.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("link", rel="icon", href="data:,"),
        element("title", f"{_WORDS[report.verdict]}: {report.artifact}, bakeout validation"),
        element("style", style),
    )
    sections = {
        "Checks": _checks(report),
        "Erasure": _erasure(report),
        "Pictures": _pictures(report, pictures),
        "Steps": _steps(report),
        "Tensors": _tensors(report),
        "Limits": _limits(report),
        "Settings": _settings(report),
    }
    links = (element("a", name, href=f"#{name.lower()}") for name in sections)
    main = element("main", *(_section(name, content) for name, content in sections.items()))
    nav = element("nav", *links, aria_label="Sections")
    return to_html(element("html", head, element("body", _verdict(report), nav, main), lang="en"))


def targets_of(report: Report) -> tuple[str, ...]:
    """The formats of the artifact that a report speaks of, in the order in which it names them."""
    named = [
        *(check.target for check in report.checks),
        *(tensor.target for tensor in report.tensors),
        *(curve.model for curve in report.curves),
        *(model for scene in report.scenes for model in scene.drawn),
        *(detection.model for detection in report.detections),
    ]
    return tuple(name for name in dict.fromkeys(named) if name not in (None, "base", "reference"))


def _section(name: str, content: Iterator[Element]) -> Element:
    return element("section", element("h2", name), *content, id=name.lower())


def _verdict(report: Report) -> Element:
    checks = {verdict: [check for check in report.checks if check.verdict == verdict] for verdict in _ORDER}
    scenes = count(len(report.scenes), "prompt")
    told = {
        "pass": "It draws what the reference draws, the erasure included.",
        "fail": f"Failed: {_listed(checks['fail'])}.",
        "unjudged": f"Not judged, which is no pass: {_listed(checks['unjudged'])}.",
    }
    heading = element(
        "h1", element("span", _SIGNS[report.verdict], class_="sign", aria_hidden="true"), _WORDS[report.verdict]
    )
    erased = element("ul", *(element("li", foreign(line)) for line in report.erased)) if report.erased else None
    return element(
        "header",
        element("p", "Validation of ", foreign(report.artifact), class_="what"),
        element("div", heading, element("p", told[report.verdict]), class_=f"banner {report.verdict}"),
        element(
            "p", "Erased from ", foreign(report.base), ":" if erased is not None else ": nothing named.",
            class_="erased-from",
        ),
        erased,
        element("p", f"{scenes}, profile {report.profile}, {_duration(report.seconds)}.", class_="note"),
        element("div", *_key_figures(report), class_="figures"),
        id="verdict",
    )  # fmt: skip


def _listed(checks: list[Check], most: int = 4) -> str:
    more = [f"{len(checks) - most} more"] if len(checks) > most else []
    return ", ".join([*map(_name, checks[:most]), *more])


def _name(check: Check) -> str:
    return f"{check.name} ({check.target})" if check.target else check.name


def _key_figures(report: Report) -> Iterator[Element]:
    passed = sum(check.verdict == "pass" for check in report.checks)
    yield _figure(f"{passed} of {len(report.checks)}", "checks passed", "")
    targets = targets_of(report)
    for concept in dict.fromkeys(it.concept for it in report.detections if it.kind == "erased"):
        seen = {it.model: it for it in report.detections if (it.concept, it.kind) == (concept, "erased")}
        shipped = [seen[target] for target in targets if target in seen]
        if shipped:
            worst = max(shipped, key=lambda it: it.high)
            before = ", ".join(f"{model} {_of(seen[model])}" for model in ("base", "reference") if model in seen)
            yield _figure(_of(worst), f"pictures still show “{concept}” ({worst.model})", before)
    broken = [it for it in report.tensors if _excess(it)[0]]
    if broken:
        yield _figure(f"{len(broken)} of {len(report.tensors)}", "tensors cannot be compared", "")
    elif report.tensors:
        it = max(report.tensors, key=_excess)
        where = f"{it.component} {it.output} ({it.target})"
        yield _figure(
            number(it.relative_rms, 2), f"relative RMS of the worst tensor; limit {number(it.limit, 2)}", where
        )
    differences = [
        drawn.max_difference
        for scene in report.scenes
        for model, drawn in scene.drawn.items()
        if model in targets and drawn.max_difference is not None
    ]
    if differences:
        yield _figure(f"{max(differences)} of 255", "largest difference of a value in a picture", "")


def _figure(value: str, what: str, more: str) -> Element:
    return element(
        "div", element("b", value), element("span", what), element("span", more, class_="note") if more else None
    )


def _checks(report: Report) -> Iterator[Element]:
    checks = sorted(report.checks, key=lambda check: _ORDER.index(check.verdict))
    for check in checks:
        if check.verdict != "pass":
            title = element("h3", _badge(check.verdict), _name(check))
            yield element("div", title, element("p", check.summary), class_=f"bad {check.verdict}")
    head = ("check", "measured")
    label = f"All {count(len(checks), 'check')}"
    yield folded(label, table(label, head, map(_check_row, checks)), open_=report.verdict == "pass")


def _check_row(check: Check) -> Element:
    title = element("span", _badge(check.verdict), f" {_name(check)}")
    found = element("span", title, element("span", check.summary, class_="sentence"), class_="check")
    limit = "" if check.limit is None else f"{check.bound} {number(check.limit)}"
    return row(found, element("span", number(check.measured), element("span", limit, class_="bound")))


def _badge(verdict: Verdict) -> Element:
    return element("span", f"{_SIGNS[verdict]} {_WORDS[verdict].lower()}", class_=f"badge {verdict}")


def _erasure(report: Report) -> Iterator[Element]:
    if report.detector is None:
        yield element(
            "p", "There is no detector for this model, so nobody counted what the pictures show: the verdict rests on "
            "how near the artifact is to the reference, and on how like the base's the pictures are whose prompts are "
            "without what was erased.",
        )  # fmt: skip
        return
    yield element("p", "Detector: ", foreign(report.detector), ".")
    for concept, kind in dict.fromkeys((it.concept, it.kind) for it in report.detections):
        group = [it for it in report.detections if (it.concept, it.kind) == (concept, kind)]
        if kind == "erased":
            caption = f"Prompts with “{concept}”: pictures that show it (fewer is better)"
        else:
            caption = f"Prompts without “{concept}”: pictures that show what was asked for (more is better)"
        head = ("model", "pictures", f"{group[0].confidence:.0%} interval, on 0 to 100 %")
        yield table(caption, head, map(_detection_row, group), caption=caption, kind="intervals")
    yield element("p", "The intervals are exact binomial ones (Clopper and Pearson).", class_="note")


def _detection_row(it: Detection) -> Element:
    interval = element("div", element("span", f"{100 * it.low:.1f} to {100 * it.high:.1f} %"), interval_bar(it))
    return row(it.model, _of(it), interval)


def _of(it: Detection) -> str:
    return f"{it.detected} of {it.pictures}"


def _pictures(report: Report, pictures: Mapping[str, bytes]) -> Iterator[Element]:
    if not report.scenes:
        yield element("p", "None was drawn.")
        return
    yield element(
        "p", "Each box is one prompt and seed. The reference is the base with the edit as hooks: what the artifact "
        "should draw. The numbers compare a picture with the reference's, its values from 0 to 255. A picture links to "
        "its file in pictures/, and one of more than 256 pixels is shown smaller.",
    )  # fmt: skip
    models = ("base", "reference", *targets_of(report))
    for kind in _KINDS:
        if any(scene.kind == kind for scene in report.scenes):
            yield element("h3", _PROMPTS[kind].capitalize())
            yield from gallery(report.scenes, kind, models, pictures)


def _steps(report: Report) -> Iterator[Element]:
    if not report.curves:
        yield element("p", "No steps were compared.")
        return
    yield element(
        "p", "Relative RMS distance of the latents to the reference's after each step, on a logarithmic axis. "
        "Teacher-forced: every step begins at the reference's latents. Free-running: at the model's own. "
        "A cross at the upper edge is a step that is not finite.",
    )  # fmt: skip
    models = ("base", *targets_of(report))
    scale = scale_of(report.curves)
    panels = element("div", class_="panels")
    for forced in (True, False):
        for kind in _KINDS:
            curves = [curve for curve in report.curves if (curve.forced, curve.kind) == (forced, kind)]
            if curves:
                title = f"{'Teacher-forced' if forced else 'Free-running'}, {_PROMPTS[kind]}"
                panel = (
                    step_chart(curves, models, scale, title),
                    element("figcaption", title),
                    _numbers(curves, title),
                )
                panels.append(element("figure", *panel))
    yield panels


def _numbers(curves: list[Curve], title: str) -> Element:
    steps = range(max(len(curve.relative_rms) for curve in curves))
    rows = (row(str(step + 1), *(_at(curve, step) for curve in curves)) for step in steps)
    return folded("Numbers", table(title, ("step", *(curve.model for curve in curves)), rows, kind="numbers"))


def _at(curve: Curve, step: int) -> str:
    if step >= len(curve.relative_rms):
        return number(None)
    value = curve.relative_rms[step]
    return "not finite" if value is None else number(value)


def _tensors(report: Report) -> Iterator[Element]:
    if not report.tensors:
        yield element("p", "None was compared.")
        return
    yield element(
        "p", "Every component of the artifact, fed what the reference's received while it drew; worst first. "
        "The base's distance shows how much of a difference there is to see.",
    )  # fmt: skip
    rows = sorted(report.tensors, key=_excess, reverse=True)
    head = ("output", "relative RMS", "limit", "SQNR", "base's", "worst element")
    yield table("The tensors farthest from the reference", head, map(_tensor_row, rows[:_TOP_TENSORS]), kind="numbers")
    rest = rows[_TOP_TENSORS:_MOST_TENSORS]
    if rest:
        label = f"{len(rest)} more"
        yield folded(label, table(f"Tensors: {label}", head, map(_tensor_row, rest), kind="numbers"))
    if len(rows) > _MOST_TENSORS:
        yield element("p", f"Another {len(rows) - _MOST_TENSORS:,}, all nearer, are in report.json.", class_="note")


def _excess(it: TensorParity) -> tuple[bool, float]:
    """How bad: what cannot be compared is worst, then by the part of the limit that is used."""
    if it.problem is not None or it.relative_rms is None:
        return True, math.inf
    return False, it.relative_rms / it.limit if it.limit else math.inf if it.relative_rms else 0.0


def _tensor_row(it: TensorParity) -> Element:
    broken, used = _excess(it)
    verdict: Verdict = "fail" if broken or used > 1 else "pass"
    call = f"{it.target}, {it.call}, {it.kind}, {list(it.shape)}"
    name = element(
        "span", _badge(verdict), f" {it.component} {it.output}", element("span", call, class_="call"),
        element("span", it.problem, class_="problem") if it.problem else None, class_="output",
    )  # fmt: skip
    sqnr = "identical" if it.relative_rms == 0 else number(it.sqnr_db, unit=" dB")
    worst = number(None)
    if it.worst is not None:
        place = ", ".join(map(str, it.worst.index))
        worst = f"[{place}]: {_value(it.worst.artifact)} for {_value(it.worst.reference)}"
    return row(name, number(it.relative_rms), number(it.limit), sqnr, number(it.base_relative_rms), worst)


def _value(value: float | None) -> str:
    return "not finite" if value is None else number(value, 5)


def _limits(report: Report) -> Iterator[Element]:
    rows = (row(it.name, number(it.limit), element("span", it.reason, class_="sentence")) for it in report.tolerances)
    yield table("Limits and their reasons", ("limit", "is", "because"), rows, kind="limits")


def _settings(report: Report) -> Iterator[Element]:
    yield table("Settings", ("setting", "value"), (row(name, _setting(it)) for name, it in report.settings.items()))
    identity = {
        "artifact": report.artifact,
        "SHA-256 of its bakeout.json": report.manifest,
        "base": report.base,
        "digest of the edit": report.edit,
        "profile": report.profile,
        "took": _duration(report.seconds),
    }
    yield table("Identity", ("identity", "value"), (row(name, foreign(it)) for name, it in identity.items()))
    yield element(
        "p", "If the artifact's bakeout.json has another SHA-256 by now, this report is of an older state.",
        class_="note",
    )  # fmt: skip
    yield table("Versions", ("tool", "version"), (row(name, it) for name, it in sorted(report.tools.items())))


def _setting(value: JsonValue) -> Element:
    return foreign(value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
