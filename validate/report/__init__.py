"""What a validation found: its schema, and the files that tell it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from bakeout.editor.errors import InputError
from bakeout.editor.text_files import read_text
from bakeout.validate.report.schema import REPORT_VERSION, Report

REPORT = "report.json"
JUNIT = "junit.xml"
PAGE = "report.html"
# 600 prompts with three pictures each take one.
_MAX_BYTES = 64_000_000


def write_report(report: Report, pictures: Mapping[str, bytes], folder: Path) -> None:
    """Write `report.json`, `junit.xml`, `report.html` and the pictures.

    Args:
        report: what was found.
        pictures: a PNG for each file that the report names, and no other.
        folder: is there, and is empty.

    Raises:
        ValueError: the pictures are not those of the report.
        OSError: a file cannot be written.
    """
    from bakeout.validate.report.html import to_page
    from bakeout.validate.report.junit import to_junit

    named = {drawn.file for scene in report.scenes for drawn in scene.drawn.values()}
    if named != pictures.keys():
        raise ValueError(f"pictures and report differ in {min(named ^ pictures.keys())!a:.200}")
    # All of them before the first is written: what cannot be written leaves nothing behind.
    texts = {PAGE: to_page(report, pictures).encode(), JUNIT: to_junit(report), REPORT: report.to_json()}
    for name, content in {**pictures, **texts}.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def read_report(path: Path) -> Report:
    """The report in the file `path`, a `report.json`. Raises InputError if there is none, or for anything odd in it."""
    text = read_text(path, _MAX_BYTES)
    try:
        version = json.loads(text, parse_constant=_refuse).get("version")
    except (ValueError, AttributeError, RecursionError):
        raise InputError(f"{path} is no report; run `bakeout validate` again") from None
    if version != REPORT_VERSION or isinstance(version, bool):
        raise InputError(
            f"{path} is of version {version!a:.20} and this bakeout reads {REPORT_VERSION}; run `bakeout validate` "
            "again"
        )
    try:
        return Report.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "report"
        raise InputError(
            f"{path} is not a whole report ({where!a:.200}: {first['msg']!s:.200}); run `bakeout validate` again"
        ) from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
