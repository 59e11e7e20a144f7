"""The documentation of `report.json`, made of its schema: a table of fields for each record."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from bakeout.validate.report.schema import Report

_ATTRIBUTE = re.compile(r"^    (\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)


def to_markdown() -> str:
    """A section for each record, `Report` first, then as one leads to the other."""
    schema = Report.model_json_schema()
    records = {"Report": schema, **schema["$defs"]}
    return "\n\n".join(_section(name, records[name]) for name in _reached("Report", records)) + "\n"


def _section(name: str, record: Mapping[str, Any]) -> str:
    told, _, attributes = record["description"].partition("\n\nAttributes:\n")
    meanings = {field: _in_json(" ".join(text.split())) for field, text in _ATTRIBUTE.findall(attributes)}
    rows = (f"| `{field}` | {_type(it)} | {meanings[field]} |" for field, it in record["properties"].items())
    head = ("| field | type | meaning |", "|---|---|---|")
    return "\n".join((f"### {name}", "", _in_json(told), "", *head, *rows))


def _reached(name: str, records: Mapping[str, Any]) -> Iterator[str]:
    """The record and those to which it leads, once each, without those that may be anything."""
    waiting, seen = [name], {name}
    while waiting:
        first = waiting.pop(0)
        yield first
        for other in re.findall(r"'#/\$defs/(\w+)'", str(records[first]["properties"])):
            if other not in seen and "properties" in records[other]:
                seen.add(other)
                waiting.append(other)


def _type(it: Mapping[str, Any]) -> str:
    if "$ref" in it:
        name = it["$ref"].rpartition("/")[2]
        return "anything" if name == "JsonValue" else f"[{name}](#{name.lower()})"
    if "anyOf" in it:
        return " or ".join(map(_type, it["anyOf"]))
    if "enum" in it or "const" in it:
        return " or ".join(f"`{value}`" for value in it.get("enum", [it.get("const")]))
    match it["type"]:
        case "array":
            return f"list of {_type(it['items'])}"
        case "object":
            return f"object of {_type(it['additionalProperties'])}"
        case "null":
            return "`null`"
        case name:
            pattern = f" `{it['pattern']}`" if "pattern" in it else ""
            return f"{name}{pattern}{_bounds(it)}"


def _bounds(it: Mapping[str, Any]) -> str:
    if "maximum" in it:
        return f" from {it['minimum']} to {it['maximum']}"
    return f" from {it['minimum']}" if "minimum" in it else ""


def _in_json(text: str) -> str:
    return re.sub(r"\bNone\b", "`null`", text)
