"""Say in text what a model or an artifact is made of. Reads headers and JSON only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from shlex import quote
from typing import TYPE_CHECKING, Any

from bakeout.editor.errors import InputError
from bakeout.generate import ACCURACY

if TYPE_CHECKING:
    from bakeout.editor.model import Component, Model
    from bakeout.export.artifact import Artifact
    from bakeout.export.manifest import Lowering, Manifest, Shapes
    from bakeout.validate.report.schema import Report

_VERDICTS = {"pass": "passed", "fail": "failed", "unjudged": "could not be judged"}
_MARKS = {"pass": "pass", "fail": "FAIL", "unjudged": "could not judge"}


def describe(model: Model) -> str:
    """What the model is, its components, its sites by kind and, where that was measured, how well it draws."""
    components = [_component_row(component) for component in model.components.values()]
    kinds = dict.fromkeys(site.kind for site in model.sites)
    sites = [(kind, str(len(found)), found[0].name) for kind in kinds if (found := model.sites_of(kind))]
    scheduler = model.parts["scheduler"].class_name
    blocks = [
        f"{model.source}: {model.family}, opened as {model.format} from {model.path}; scheduler {scheduler}",
        table(("component", "class", "dtype", "parameters"), components),
        table(("site", "number", "the first is"), sites),
    ]
    if model.format == "builtin":
        blocks.append(describe_accuracy(json.loads((model.path / ACCURACY).read_text(encoding="utf-8"))))
    return "\n\n".join(blocks)


def describe_artifact(artifact: Artifact) -> str:
    """What was erased from which model, how much of each layer that touches, how it was realised, and where it ends."""
    manifest = artifact.manifest
    rows = [
        (
            it.site, f"{it.touched:>11,}", f"{it.of:>11,}", it.unit, f"{it.touched / it.of:.2%}",
            f"{it.how}: {it.reason}", it.cost,
        )
        for it in manifest.lowering
    ]  # fmt: skip
    rows += [
        ("in all", f"{touched:>11,}", f"{of:>11,}", unit, f"{touched / of:.2%}", "", "")
        for unit, touched, of in totals(manifest)
    ]
    validity = manifest.validity
    ends = [
        f"It holds at {_resolutions(artifact)} and with {validity.schedules} schedule.",
        *(["Its limits:", *(f"  - {limit}" for limit in validity.limits)] if validity.limits else []),
        "It is undone by",
        *(f"  - {bypass}" for bypass in validity.bypasses),
        f"and it tells something: {validity.reveals}.",
    ]
    blocks = [
        f"{artifact.folder}: {headline(manifest)}",
        table(("site", f"{'touched':>11}", f"{'of':>11}", "", "share", "realised", "cost at run time"), rows),
        describe_widths(manifest),
        "\n".join(_compiled(manifest)),
        "\n".join(ends),
    ]
    return "\n\n".join(filter(None, blocks))


def describe_widths(manifest: Manifest) -> str:
    """How many hidden units the compiled target is without, in a line; nothing where it has all of them."""
    widths = manifest.onnx.widths.values() if manifest.onnx is not None else ()
    if not widths:
        return ""
    gone, of = sum(it.of - it.kept for it in widths), sum(it.of for it in widths)
    where = f"{len(widths)} FFN{'s' * (len(widths) > 1)}"
    return f"onnx/ is without {gone:,} of {of:,} hidden units of {where}, constant by the edit ({gone / of:.1%})"


def _compiled(manifest: Manifest) -> Iterator[str]:
    """In what each compiled target computes, and where it runs, in a line each."""
    if manifest.onnx is not None:
        yield f"onnx/ computes in {manifest.onnx.precision}."
    if (made := manifest.tensorrt) is not None:
        yield (
            f"tensorrt/ computes in {made.precision}, by TensorRT {made.version} on {made.gpu} alone: "
            f"{described(made.shapes)}."
        )


def described(shapes: Shapes) -> str:
    """Pictures in words: how many at a time, and of which sizes."""
    width, height, batch = shapes.width, shapes.height, shapes.batch
    sizes = dict.fromkeys((f"{width.min}x{height.min}", f"{width.max}x{height.max}"))
    batches = dict.fromkeys((str(batch.min), str(batch.max)))
    return f"{' to '.join(batches)} picture{'s' * (batch.max > 1)} of {' to '.join(sizes)} pixels at a time"


def _resolutions(artifact: Artifact) -> str:
    if artifact.size is None:
        return "any resolution"
    return f"{'x'.join(map(str, artifact.size))} pixels only"


def describe_validation(artifact: Artifact) -> str:
    """A line on the report beside an artifact: its verdict, and whether it is of the artifact as it is now."""
    from bakeout.artifact import report_folder
    from bakeout.export.manifest import MANIFEST, file_digest
    from bakeout.validate.report import REPORT, read_report

    path = report_folder(artifact.folder) / REPORT
    again = f"run `bakeout validate {quote(str(artifact.folder))}`"
    if not path.is_file():
        return f"Not validated: {again}"
    try:
        report = read_report(path)
    except InputError as error:
        return f"Not validated: {error}"
    if report.manifest != file_digest(artifact.folder / MANIFEST):
        return f"Not validated as it is now (an earlier state {_VERDICTS[report.verdict]}): {again}"
    return f"Validated, profile {report.profile}: it {_VERDICTS[report.verdict]} ({path})"


def describe_report(report: Report) -> str:
    """What a validation found: its verdict, what is wrong, its checks in a line each, and what the detector sees."""
    erased = ", ".join(report.erased) or "anything named"
    wrong = [f"- {it.name}{f' of {it.target}' if it.target else ''}: {it.summary}"
             for it in report.checks if it.verdict != "pass"]  # fmt: skip
    checks = [
        (
            it.name,
            it.target or "",
            _MARKS[it.verdict],
            "" if it.measured is None else f"{it.measured:.2g}",
            "" if it.limit is None else f"{it.bound} {it.limit:g}",
        )
        for it in report.checks
    ]
    seen = [
        (
            it.model,
            f"{it.concept} is seen" if it.kind == "erased" else "another prompt is drawn as told",
            f"{it.detected} of {it.pictures}",
            f"{it.low:.1%} to {it.high:.1%} ({it.confidence:.0%})",
        )
        for it in report.detections
    ]
    blocks = [f"{report.artifact} {_VERDICTS[report.verdict]}: {report.base} without {erased}", "\n".join(wrong)]
    blocks.append(table(("check", "of", "verdict", "measured", "limit"), checks))
    if seen:
        blocks.append(table(("model", report.detector or "detector", "pictures", "interval"), seen))
    return "\n\n".join(filter(None, blocks))


def headline(manifest: Manifest) -> str:
    """The base and what was erased from it, in a line."""
    erased = ", ".join(
        f"{it.concept!r} ({it.method}, {it.pairs} {'pair' if it.pairs == 1 else 'pairs'})" for it in manifest.edits
    )
    return f"{manifest.base.name} ({manifest.base.family}) without {erased or 'anything named'}"


def totals(manifest: Manifest) -> list[tuple[str, int, int]]:
    """For each unit, how many were touched and of how many."""
    of_unit: dict[str, list[Lowering]] = {}
    for it in manifest.lowering:
        of_unit.setdefault(it.unit, []).append(it)
    return [(unit, sum(it.touched for it in group), sum(it.of for it in group)) for unit, group in of_unit.items()]


def describe_accuracy(measured: Mapping[str, Any]) -> str:
    """What was measured of a built-in model, as how often its detector found in a picture what was asked for.

    Args:
        measured: `settings` by name; every other key is a measurement, and its value has by attribute `correct`, `of`,
            `share` and `interval_95`.
    """
    rows = [
        (
            measurement.replace("_", " "),
            name,
            f"{found['correct']} of {found['of']}",
            f"{found['share']:.1%}",
            "{:.1%} to {:.1%}".format(*found["interval_95"]),
        )
        for measurement, attributes in measured.items()
        if measurement != "settings"
        for name, found in attributes.items()
    ]
    settings = ", ".join(f"{name} {value}" for name, value in measured["settings"].items())
    return f"{table(('measured', 'of', 'right', 'share', '95 % interval'), rows)}\n({settings})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines with the cells of each column one under the other."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows))
    return "\n".join(line.rstrip() for line in lines)


def _component_row(component: Component) -> tuple[str, str, str, str]:
    # Tensors that no parameter uses are on disk only; some parameters are parts of one stored tensor.
    used = [component.tensors[name] for name in {location.tensor for location in component.locations.values()}]
    dtypes = ", ".join(sorted({tensor.dtype for tensor in used}))
    return component.name, component.class_name, dtypes, f"{sum(prod(tensor.shape) for tensor in used):,}"
