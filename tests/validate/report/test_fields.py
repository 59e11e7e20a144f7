"""docs/report.md documents the schema as it is."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from bakeout.validate.report import schema
from bakeout.validate.report.fields import to_markdown

RECORDS = ("Report", "Check", "TensorParity", "Worst", "Curve", "Scene", "Drawn", "Detection", "Tolerance")


def printed(*arguments):
    command = (sys.executable, "-m", "bakeout.validate.report", *arguments)
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_page_is_up_to_date(root):
    page = (root / "docs" / "report.md").read_text(encoding="utf-8")
    assert page.partition("<!-- fields -->\n")[2] == to_markdown()
    assert printed() == to_markdown()


@pytest.mark.parametrize("name", RECORDS)
def test_every_field_is_documented(name):
    (section,) = re.findall(rf"^### {name}\n(.*?)(?=^### |\Z)", to_markdown(), re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", section, re.MULTILINE)
    assert [field for field, *_ in rows] == list(getattr(schema, name).model_fields)


def test_no_record_is_left_out():
    assert set(re.findall(r"^### (\w+)", to_markdown(), re.MULTILINE)) == set(RECORDS)
    assert "None" not in to_markdown()


def test_a_report_holds_what_the_json_schema_requires(samples):
    described = json.loads(printed("--json-schema"))
    said = json.loads(samples("fail")[0].to_json())
    assert set(described["required"]) <= said.keys() == described["properties"].keys()
    assert described["additionalProperties"] is False
