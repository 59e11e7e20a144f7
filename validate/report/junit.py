"""`junit.xml`: the checks as the test report that CI systems read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from bakeout.validate.report.schema import Check, Report

# What XML 1.0 (fifth edition), production 2, does not allow, not even as a reference.
_FORBIDDEN = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# A suite's name where a check concerns the whole artifact.
_WHOLE = "artifact"


def to_junit(report: Report) -> bytes:
    """One suite a target, one case a check.

    A failed check is a failure. One that was not judged is an error: as a skipped one it would look like success.
    """
    root = Element("testsuites", _attributes(name=f"bakeout validate {report.artifact}", time=f"{report.seconds:.3f}"))
    root.attrib |= _counts(report.checks)
    for target, checks in _by_target(report):
        suite = SubElement(root, "testsuite", _attributes(name=target) | _counts(checks))
        properties = SubElement(suite, "properties")
        for name, value in _properties(report):
            SubElement(properties, "property", _attributes(name=name, value=value))
        for check in checks:
            suite.append(_case(f"{report.artifact}.{target}", check))
    indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{tostring(root, encoding="unicode")}\n'.encode()


def _case(class_name: str, check: Check) -> Element:
    case = Element("testcase", _attributes(classname=class_name, name=check.name))
    measured = "" if check.measured is None else f"\nmeasured: {check.measured:g}"
    limit = "" if check.limit is None else f"\nlimit: {check.bound} {check.limit:g}"
    text = check.summary + measured + limit
    if check.verdict == "pass":
        SubElement(case, "system-out").text = _allowed(text)
    else:
        tag = "failure" if check.verdict == "fail" else "error"
        SubElement(case, tag, _attributes(message=check.summary, type=check.verdict)).text = _allowed(text)
    return case


def _by_target(report: Report) -> Iterator[tuple[str, list[Check]]]:
    for target in dict.fromkeys(check.target for check in report.checks):
        yield target or _WHOLE, [check for check in report.checks if check.target == target]


def _counts(checks: tuple[Check, ...] | list[Check]) -> dict[str, str]:
    verdicts = [check.verdict for check in checks]
    counts = {"tests": len(verdicts), "failures": verdicts.count("fail"), "errors": verdicts.count("unjudged")}
    return {name: str(value) for name, value in (counts | {"skipped": 0}).items()}


def _properties(report: Report) -> Iterator[tuple[str, str]]:
    yield "verdict", report.verdict
    yield "base", report.base
    for erased in report.erased:
        yield "erased", erased
    yield "edit", report.edit
    yield "manifest", report.manifest
    yield "profile", report.profile
    for tool, version in sorted(report.tools.items()):
        yield f"version of {tool}", version


def _attributes(**values: str) -> dict[str, str]:
    return {name: _allowed(value) for name, value in values.items()}


def _allowed(text: str) -> str:
    return _FORBIDDEN.sub("\ufffd", text)
